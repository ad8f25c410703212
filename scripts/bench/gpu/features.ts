/**
 * What a backend can do, as the bench asks it.
 *
 * In: a buffer. Out: yes or no. Called by the phases.
 */
import type { EpBuffer } from "../../../mod.ts";
import { constants } from "../../../lib/ffi/abi.ts";

/** Whether calls can be captured as graphs. */
export const hasGraphsOf = (buffer: EpBuffer): boolean =>
  (buffer.capabilities.features & constants.FEATURE.GRAPHS[0]) !== 0;
