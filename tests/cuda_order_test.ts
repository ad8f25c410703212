/**
 * What only a GPU has: streams of other libraries, launch plans, multiprocessors per call, loads and stores in place of the
 * tensor memory accelerator. Order between streams is tested as on the CPU.
 */
import { spawnSync } from "node:child_process";
import process from "node:process";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { EpBuffer, EpError, formatLaunchPlan, Group, launchPlan } from "@deepep/deepep";
import { cudaCapabilities, noCuda } from "./support/cuda.ts";
import { layer, onDefaultStreams, runOrderCases } from "./support/order_cases.ts";
import { ranksOf, reasonOf, tiny } from "./support/ranks.ts";
import { suite } from "./support/suite.ts";
import { runArgs } from "./support/transport.ts";

runOrderCases({ name: "cuda", backend: "cuda", skip: noCuda });
const ranks = ranksOf("cuda");

suite("cuda: launches", noCuda, () => {
  test("the default streams, legacy and per thread", async () => {
    await ranks(1, {}, onDefaultStreams);
  });

  test("the best backend here is cuda, and the reason is short", async () => {
    const [group] = Group.local(1);
    const { backend: _, ...shape } = tiny;
    await using b = await EpBuffer.create(group!, shape);
    assertEquals([b.backend, b.backendReason], ["cuda", "cuda works here"]);
    assert(Number(b.capabilities.driverVersion) >= 12, b.capabilities.driverVersion);
    assert(b.numSms > 0 && b.ranksOnDevice === 1, `${b.numSms} SMs, ${b.ranksOnDevice} ranks`);
  });

  test("the default of multiprocessors is what an operation needs to be fast, or the rank's share", async () => {
    const shape = { rowBytes: 14336, numRanks: 8, numTopk: 8, numExperts: 256, deviceSms: 132, computeCapability: 90 };
    const sms = async (
      op: "dispatch" | "combine" | "lowLatencyDispatch" | "lowLatencyCombine",
      ranksOnDevice: number,
    ) => (await launchPlan({ op, numTokens: 128, ranksOnDevice, ...shape })).numSms;
    for (
      const [op, usual] of [["dispatch", 16], ["combine", 16], ["lowLatencyDispatch", 32], [
        "lowLatencyCombine",
        32,
      ]] as const
    ) {
      assertEquals(
        [await sms(op, 1), await sms(op, 4), await sms(op, 8), await sms(op, 16)],
        [usual, usual, 16, 8],
        op,
      );
    }
  });

  test("a plan says what is launched, and follows numSms", async () => {
    await ranks(2, { hidden: 7168 }, (b) => {
      for (const op of ["dispatch", "combine"] as const) {
        for (const layout of ["rank", "expert"] as const) {
          for (const numSms of [1, 2, 4, 8, 16]) {
            const plan = b.plan({ op, layout, numSms });
            if (b.rank === 0) console.log(formatLaunchPlan(plan));
            assertEquals([plan.op, plan.numSms, plan.rowBytes], [op, numSms, 2 * 7168]);
            assert(plan.warps > 0 && plan.chunkBytes > 0 && plan.chunkBytes % 16 === 0, formatLaunchPlan(plan));
          }
          assertEquals(b.plan({ op, layout }).numSms, b.numSms);
        }
      }
      return Promise.resolve();
    });
  });

  test("a plan needs no buffer, and is the buffer's", async () => {
    await ranks(2, {}, async (b) => {
      const { numSms: deviceSms, computeCapability } = cudaCapabilities!;
      const shape = {
        rowBytes: 32,
        numRanks: 2,
        numTopk: 2,
        deviceSms,
        computeCapability,
        ranksOnDevice: b.ranksOnDevice,
      };
      const mine = b.plan({ op: "dispatch", numSms: 4 });
      if (process.env["DEEPEP_CUDA_TMA"] === "0") return;
      assertEquals(await launchPlan({ op: "dispatch", numSms: 4, ...shape }), mine);
    });
  });

  test("numSms per call, each with the same result", async () => {
    await ranks(2, {}, async (b) => {
      const most = Math.floor(cudaCapabilities!.numSms / b.ranksOnDevice);
      for (const numSms of [1, 2, 3, Math.min(7, most), Math.min(16, most), 0]) {
        await layer(b, numSms === 0 ? {} : { numSms });
      }
    });
  });

  test("more blocks than fit on the device are refused with the arithmetic, on every rank", async () => {
    await ranks(2, {}, async (b) => {
      const reason = await reasonOf(layer(b, { numSms: 1000 }));
      assert(reason instanceof EpError && reason.code === "invalidArgument", String(reason));
      assertStringIncludes(reason.message, String(cudaCapabilities!.numSms));
      await layer(b);
    });
  });

  test("DEEPEP_CUDA_TMA=0 takes loads and stores, with the same bits", { timeout: 120_000 }, () => {
    const child = fileURLToPath(new URL("./support/world_child.ts", import.meta.url));
    const run = spawnSync(process.execPath, runArgs(child), {
      encoding: "utf8",
      timeout: 110_000,
      env: { ...process.env, DEEPEP_CUDA_TMA: "0" },
    });
    assertEquals(run.status, 0, run.stderr);
    assertStringIncludes(run.stdout, "by loads and stores");
    assertStringIncludes(run.stdout, "worlds are the reference's");
  });
});
