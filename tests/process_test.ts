/**
 * The CPU backend with each rank in a process: the same cases over really shared memory, and what happens to the others
 * when a rank is killed.
 */
import { runCombineCases, runDispatchCases, runLowLatencyCases } from "./support/cases.ts";
import { processWorlds } from "./support/drivers.ts";
import { runProcessCases } from "./support/process_cases.ts";

const subject = { name: "cpu in processes", newWorld: processWorlds("cpu"), numRandom: 1 };
runDispatchCases(subject);
runCombineCases(subject);
runLowLatencyCases(subject);
runProcessCases({ name: "cpu", backend: "cpu" });
