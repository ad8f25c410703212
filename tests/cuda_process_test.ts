/**
 * The CUDA backend with each rank in a process: the same cases over memory that is mapped by CUDA IPC. Several processes on
 * one GPU need CUDA MPS. What happens when one is killed is in cuda_kill_test.ts.
 */
import { runCombineCases, runDispatchCases, runLowLatencyCases } from "./support/cases.ts";
import { noCudaLowLatency, noCudaProcesses } from "./support/cuda.ts";
import { processWorlds } from "./support/drivers.ts";

const subject = { name: "cuda in processes", newWorld: processWorlds("cuda"), skip: noCudaProcesses, numRandom: 1 };
runDispatchCases(subject);
runCombineCases(subject);
runLowLatencyCases({ ...subject, skip: noCudaProcesses || noCudaLowLatency });
