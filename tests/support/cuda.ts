/**
 * Whether the CUDA backend can be tested here, and if not, why: the reason of every test that is skipped.
 *
 * In: the library and the devices that it sees. Out: reasons, false where there is none. Called by the cuda tests, which
 * thereby run on any GPU machine and are skipped, in words, on all others.
 */
import process from "node:process";
import type { Capabilities } from "@deepep/deepep";
import { openDevice } from "../../lib/device.ts";
import { constants } from "../../lib/ffi/abi.ts";
import { decodeKernels } from "../../scripts/decode/kernels.ts";

async function look(): Promise<Capabilities | string> {
  try {
    const capabilities = (await openDevice("cuda")).capabilities();
    return capabilities.numDevices > 0 ? capabilities : "no cuda: it sees no device";
  } catch (error) {
    const [first] = (error as Error).message.split("\n");
    return `no cuda: ${first!.replace(/, tried:$/, "")}`;
  }
}

const found = await look();

/** What the first device can do. */
export const cudaCapabilities: Capabilities | undefined = typeof found === "string" ? undefined : found;

/** Why there is no CUDA here. */
export const noCuda: string | false = typeof found === "string" ? found : false;

/** Why the device cannot be made one that lacks something: a GPU is as it is. */
export const notEmulated: string | false = noCuda ||
  (cudaCapabilities?.name.startsWith("emulated") ? false : "only an emulated device can be made to lack something");

const has = (feature: keyof typeof constants.FEATURE): boolean =>
  ((cudaCapabilities?.features ?? 0) & constants.FEATURE[feature][0]) !== 0;

/** Why low-latency mode cannot be tested. */
export const noCudaLowLatency: string | false = noCuda ||
  (has("LOW_LATENCY") ? false : "the cuda library of this version has no low-latency mode");

/** Why graphs cannot be tested. */
export const noCudaGraphs: string | false = noCuda || (has("GRAPHS") ? false : "the cuda library has no graphs");

/** Why decode steps cannot be tested: they need low latency, and kernels that nvcc compiles. */
export const noCudaDecode: string | false = noCudaLowLatency || ((kernels) => typeof kernels === "string" && kernels)(
  decodeKernels(),
);

const alone = cudaCapabilities !== undefined && !cudaCapabilities.mps && cudaCapabilities.numDevices < 8 &&
  process.env["DEEPEP_ALLOW_TIME_SLICING"] !== "1";

/** Why ranks cannot be processes of their own. */
export const noCudaProcesses: string | false = noCuda ||
  (alone ? "several processes on one GPU need CUDA MPS: scripts/gpu_check.sh --mps starts it" : false);

/** Shares one GPU's multiprocessors among `numRanks` ranks: for worlds that say how many they use. */
export function smsFor(numRanks: number, most = 8): number {
  const each = Math.floor((cudaCapabilities?.numSms ?? 0) / Math.max(1, numRanks));
  return Math.max(1, Math.min(most, each));
}
