/**
 * The CUDA backend with each rank in a process: the same cases over memory that is mapped by CUDA IPC, and what happens to
 * the others when a rank is killed. Several processes on one GPU need CUDA MPS.
 */
import { runCombineCases, runDispatchCases, runLowLatencyCases } from "./support/cases.ts";
import { noCudaLowLatency, noCudaProcesses } from "./support/cuda.ts";
import { processWorlds } from "./support/drivers.ts";
import { runProcessCases } from "./support/process_cases.ts";

const subject = { name: "cuda in processes", newWorld: processWorlds("cuda"), skip: noCudaProcesses, numRandom: 1 };
runDispatchCases(subject);
runCombineCases(subject);
runLowLatencyCases({ ...subject, skip: noCudaProcesses || noCudaLowLatency });
runProcessCases({ name: "cuda", backend: "cuda", skip: noCudaProcesses });
