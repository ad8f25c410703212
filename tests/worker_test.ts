/** The CPU backend with each rank in a Web Worker: the same cases, joined over TCP, memory shared within the process. */
import { runCombineCases, runDispatchCases, runLowLatencyCases } from "./support/cases.ts";
import { workerWorlds } from "./support/drivers.ts";

const subject = { name: "cpu in workers", newWorld: workerWorlds("cpu"), numRandom: 2 };
runDispatchCases(subject);
runCombineCases(subject);
runLowLatencyCases(subject);
