/**
 * A program that runs named worlds on the CUDA backend in every way and compares them with the reference. Its environment
 * chooses how the library moves bytes; it prints the plan. Run by cuda_order_test.ts.
 */
import { EpBuffer, formatLaunchPlan, Group } from "@deepep/deepep";
import { everyCall } from "./dispatch_cases.ts";
import { everyWay } from "./combine_cases.ts";
import { localWorlds } from "./drivers.ts";
import { tiny } from "./ranks.ts";
import { namedWorld } from "./worlds.ts";

const [group] = Group.local(1);
{
  await using buffer = await EpBuffer.create(group!, { ...tiny, backend: "cuda" });
  console.log(formatLaunchPlan(buffer.plan({ op: "dispatch" })));
}
const worlds = ["eight ranks, top 8", "wide rows", "fp8", "scales of any bits", "any bits"].map(namedWorld);
for (const world of worlds) {
  await everyCall(localWorlds("cuda"), world);
  await everyWay(localWorlds("cuda"), world);
}
console.log(`${worlds.length} worlds are the reference's`);
