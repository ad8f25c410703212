/** Peers of the CPU backend that are late, silent or gone, in each phase of each operation. */
import { runFailureCases } from "./support/failure_cases.ts";
import { runMaskingCases } from "./support/masking_cases.ts";
import { runSurvivorCases } from "./support/survivor_cases.ts";

runFailureCases({ name: "cpu", backend: "cpu" });
runMaskingCases({ name: "cpu", backend: "cpu" });
runSurvivorCases({ name: "cpu", backend: "cpu" });
