/** The CUDA backend when peers are late, silent or gone, memory is given back early, and programs do anything at all. */
import { noCuda, noCudaLowLatency } from "./support/cuda.ts";
import { runFailureCases } from "./support/failure_cases.ts";
import { runMaskingCases } from "./support/masking_cases.ts";
import { runMixedCases } from "./support/mixed_cases.ts";
import { runOwnershipCases } from "./support/ownership_cases.ts";
import { runWakeCases } from "./support/wake_cases.ts";

const subject = { name: "cuda", backend: "cuda", skip: noCuda, skipLowLatency: noCudaLowLatency } as const;
runFailureCases(subject);
runMaskingCases(subject);
runMixedCases(subject);
runOwnershipCases(subject);
runWakeCases(subject);
