/** A program that awaits one long operation, says so, and ends without closing its buffer. Run by wake_cases.ts. */
import process from "node:process";
import { EpBuffer, Group } from "@deepep/deepep";
import { constants } from "../../lib/ffi/abi.ts";
import { struct } from "../../lib/ffi/struct.ts";
import { tiny } from "./ranks.ts";

const [group] = Group.local(1);
const buffer = await EpBuffer.create(group!, {
  ...tiny,
  wake: process.argv[2] as "poll" | "callback",
  backend: process.argv[3] as "cpu" | "cuda",
});
const inject = struct("deepep_inject_args").pack({
  op: constants.OP.BARRIER[0],
  phase: constants.PHASE.NOTIFY[0],
  action: constants.INJECT.DELAY[0],
  delay_us: 50_000,
  count: 1,
});
buffer.core.call("deepep_inject", inject, "inject");
await buffer.barrier();
console.log("waited");
