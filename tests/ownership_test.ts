/** Who owns what on the CPU backend. */
import { runOwnershipCases } from "./support/ownership_cases.ts";

runOwnershipCases({ name: "cpu", backend: "cpu" });
