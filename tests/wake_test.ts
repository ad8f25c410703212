/** Waking on the CPU backend. */
import { runWakeCases } from "./support/wake_cases.ts";

runWakeCases({ name: "cpu", backend: "cpu" });
