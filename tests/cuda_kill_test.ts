/**
 * The CUDA backend with each rank in a process, one of which is killed. Under CUDA MPS, or on one GPU by time slices, which
 * DEEPEP_ALLOW_TIME_SLICING=1 allows: only there a rank can be killed in a kernel without the others' kernels ending too.
 */
import { cudaCapabilities, noCudaLowLatency, noCudaProcesses } from "./support/cuda.ts";
import { runProcessCases } from "./support/process_cases.ts";

const subject = { name: "cuda", backend: "cuda", skip: noCudaProcesses, skipLowLatency: noCudaLowLatency } as const;
runProcessCases({ ...subject, mps: Boolean(cudaCapabilities?.mps) });
