/**
 * Dispatch with its check, and what else the case files share.
 *
 * In: a driver and inputs. Out: a result that was found equal to the reference's. Called by the cases.
 */
import { type RankInput, referenceDispatch } from "../../lib/reference/mod.ts";
import { assertDispatched } from "./compare.ts";
import { type DispatchCall, type Dispatched, WorldFailure } from "./driver.ts";
import type { WorldDriver, WorldOptions } from "./driver.ts";
import { enoughRows, rowShape, type TestWorld } from "./worlds.ts";

/** The largest alignment that the cases use. */
const ALIGNMENT = 8;

/** Options of a buffer that holds a world in either layout. */
export function optionsFor(world: TestWorld, more: Partial<WorldOptions> = {}): WorldOptions {
  const { rowBytes, numScales, scaleElemBytes } = rowShape(world);
  return {
    numRanks: world.numRanks,
    hidden: world.hidden,
    numExperts: world.numExperts,
    numTopk: world.numTopk,
    maxTokensPerRank: world.maxTokensPerRank,
    maxRecvTokens: enoughRows(world, ALIGNMENT),
    maxRowBytes: Math.max(rowBytes, world.hidden * 2),
    maxScaleBytes: Math.max(16, numScales * scaleElemBytes, Math.ceil(world.hidden / 128) * 4),
    ...more,
  };
}

/** Dispatches, and compares with the reference. */
export async function checkedDispatch(
  driver: WorldDriver,
  inputs: readonly RankInput[],
  call: DispatchCall,
  masked: readonly number[] = [],
): Promise<Dispatched> {
  const { cached: _, ...options } = { ...driver.options, ...call, masked };
  const expected = referenceDispatch(call.cached ? routedLike(call.cached, inputs) : inputs, options).ranks;
  const result = await driver.dispatch(inputs, call);
  assertDispatched(result, expected, { inputs, call, options: driver.options, masked });
  routings.set(result, call.cached ? routedLike(call.cached, inputs) : inputs);
  return result;
}

/** What a result was dispatched with, so that the oracle of a cached dispatch needs no handle. */
const routings = new WeakMap<Dispatched, readonly RankInput[]>();

function routedLike(cached: Dispatched, inputs: readonly RankInput[]): RankInput[] {
  return inputs.map((input, rank) => {
    const { topkIdx, isTokenInRank, numTokensPerExpert } = routings.get(cached)![rank]!;
    return {
      ...input,
      ...(topkIdx ? { topkIdx } : {}),
      ...(isTokenInRank ? { isTokenInRank } : {}),
      ...(numTokensPerExpert ? { numTokensPerExpert } : {}),
    };
  });
}

/** The calls that every named world makes. */
export function callsFor(world: TestWorld): DispatchCall[] {
  const { numTopk } = world;
  const calls: DispatchCall[] = [
    { numTopk },
    { numTopk, layout: "rank", expertAlignment: ALIGNMENT, noCpuSync: true },
    { numTopk, layout: "rank", inputStrides: { rowGap: 48, scalesColumnMajor: true } },
    { numTopk, layout: "expert" },
    { numTopk, layout: "expert", expertAlignment: ALIGNMENT },
    { numTopk, layout: "expert", expertAlignment: 3, zeroPadding: true },
  ];
  if (rowShape(world).numScales === 0) return calls;
  return [
    ...calls,
    { numTopk, layout: "rank", scalesColumnMajor: true },
    { numTopk, layout: "expert", expertAlignment: ALIGNMENT, scalesColumnMajor: true, zeroPadding: true },
    // Rows of scales at no multiple of 16 bytes, at multiples, and columns with room behind them.
    { numTopk, layout: "rank", inputStrides: { scaleGap: 1 } },
    { numTopk, layout: "expert", inputStrides: { rowGap: 16, scaleGap: 16 } },
    { numTopk, layout: "rank", scalesColumnMajor: true, inputStrides: { scalesColumnMajor: true, scaleGap: 3 } },
  ];
}

/** Runs a call that must fail, and gives each rank's code. */
export async function codesOf(call: () => Promise<unknown>): Promise<string[]> {
  try {
    await call();
  } catch (error) {
    if (error instanceof WorldFailure) return error.codes;
    throw error;
  }
  throw new Error("the call succeeded on every rank");
}
