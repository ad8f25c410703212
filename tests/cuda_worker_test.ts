/** The CUDA backend with each rank in a Web Worker: the same cases, joined over TCP, plain pointers within the process. */
import { runCombineCases, runDispatchCases, runLowLatencyCases } from "./support/cases.ts";
import { noCuda, noCudaLowLatency } from "./support/cuda.ts";
import { workerWorlds } from "./support/drivers.ts";

const subject = { name: "cuda in workers", newWorld: workerWorlds("cuda"), skip: noCuda, numRandom: 2 };
runDispatchCases(subject);
runCombineCases(subject);
runLowLatencyCases({ ...subject, skip: noCudaLowLatency });
