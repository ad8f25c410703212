/**
 * Experts over rows that are routed to them: gather the rows of an expert, one feed-forward, hand the outputs on. In: f32
 * rows and their routing. Out: a call of `visit` for each expert that has rows. Called by the rank layout's mode for a
 * rank's experts, and by the dense check for all of them.
 */
import { feedForward, type Layer } from "./layer.ts";
import type { Progress } from "./progress.ts";

/** Rows and where they go. */
export interface RoutedRows {
  /** f32 [rows, hidden]. */
  readonly x: Float32Array;
  /** i32 [rows, numTopk]: an index into the experts, -1 for none. */
  readonly topkIdx: Int32Array;
  readonly numTopk: number;
  /** The experts: index 0 is expert `first` of the layer. */
  readonly experts: { readonly first: number; readonly count: number };
}

/**
 * Calls `visit(entries, outputs)` for each expert, ascending: `entries` are positions in `topkIdx`, `outputs` is
 * f32 [entries, hidden].
 */
export async function throughExperts(
  layer: Layer,
  routed: RoutedRows,
  options: { progress: Progress; visit: (entries: readonly number[], outputs: Float32Array) => void },
): Promise<void> {
  const { x, topkIdx, numTopk, experts } = routed, { hidden } = layer;
  const entriesOf: number[][] = Array.from({ length: experts.count }, () => []);
  topkIdx.forEach((expert, entry) => entriesOf[expert]?.push(entry)); // -1 is no index
  for (const [local, entries] of entriesOf.entries()) {
    if (entries.length > 0) {
      const rows = new Float32Array(entries.length * hidden);
      entries.forEach((entry, i) => {
        const row = Math.floor(entry / numTopk);
        rows.set(x.subarray(row * hidden, (row + 1) * hidden), i * hidden);
      });
      options.visit(entries, feedForward(layer.expert(experts.first + local), rows, hidden));
    }
    await options.progress.step();
  }
}
