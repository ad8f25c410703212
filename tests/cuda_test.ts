/**
 * The CUDA backend, all ranks in one thread: every case of the suite against the reference, bit for bit. DEEPEP_CUDA_TMA=0
 * in the environment makes the library use loads and stores instead of the tensor memory accelerator.
 */
import process from "node:process";
import { runCombineCases, runDispatchCases, runLowLatencyCases } from "./support/cases.ts";
import { noCuda, noCudaLowLatency } from "./support/cuda.ts";
import { localWorlds } from "./support/drivers.ts";

const name = process.env["DEEPEP_CUDA_TMA"] === "0" ? "cuda by loads and stores" : "cuda";
const subject = { name, newWorld: localWorlds("cuda"), skip: noCuda, numRandom: 24 };
runDispatchCases(subject);
runCombineCases(subject);
runLowLatencyCases({ ...subject, skip: noCudaLowLatency });
