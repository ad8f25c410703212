/** Random programs of both modes on the CPU backend. */
import { runMixedCases } from "./support/mixed_cases.ts";

runMixedCases({ name: "cpu", backend: "cpu" });
