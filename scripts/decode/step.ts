/**
 * A rank's decode step: low-latency dispatch, stand-in experts, low-latency combine, over tensors that stay.
 *
 * In: a buffer and a shape. Out: `run()`, which enqueues a step. On cuda it is a captured graph, experts are kernels of
 * decode.cu that write where peers read, and rows and routing can be drawn, and results checked, inside the graph. On cpu a
 * step is plain calls with identity experts. Called by soak.ts, serve.ts and the tests.
 */
import type { EpBuffer, EpEvent, Graph, LowLatencyResult, Recorder, ScaledRows, Stream, Tensor } from "../../mod.ts";
import { localExperts } from "../../lib/layout.ts";
import type { DecodeShape, StandIn } from "./draw.ts";
import { type DecodeKernels, decodeKernels } from "./kernels.ts";

/** Options of a step. */
export interface DecodeOptions {
  /** On cuda: cast to FP8 in the dispatch, as decode does. Default true. On cpu rows are bf16. */
  readonly fp8?: boolean;
  /** On cuda: draw rows and routing inside the step from this seed, and check the result inside it. */
  readonly seed?: number;
  /** What the experts do. Default on cuda `{ multiply: 3, add: 5 }`; on cpu they are the identity. */
  readonly standIn?: StandIn;
  /** What the check believes the experts do; another thing than they do makes it fail. */
  readonly believed?: StandIn;
  /** Send and receive in two calls each. Default false. */
  readonly recvHook?: boolean;
  /** On cuda: steps that are captured as one graph, each with a slot of its own; 0: plain calls. Default 1. */
  readonly perGraph?: number;
}

/** What the checks inside the steps have found. */
export interface Found {
  /** Steps that were checked. */
  readonly steps: number;
  /** Elements that were wrong. */
  readonly mismatches: number;
  /** The earliest. */
  readonly first: { readonly step: number; readonly token: number } | undefined;
}

type Operations = Pick<Recorder, "lowLatencyDispatch" | "lowLatencyCombine">;

/** One rank's step. */
export class DecodeStep implements Disposable {
  readonly buffer: EpBuffer;
  readonly shape: DecodeShape;
  /** What the experts do. */
  readonly standIn: StandIn;
  /** bf16 `[tokens, hidden]`. */
  readonly x: Tensor<"bf16">;
  /** i32 `[tokens, topk]`. */
  readonly topkIdx: Tensor<"i32">;
  /** f32 `[tokens, topk]`. */
  readonly topkWeights: Tensor<"f32">;
  /** bf16 `[tokens, hidden]`: what came back. */
  readonly out: Tensor<"bf16">;
  readonly #options: DecodeOptions;
  readonly #kernels: DecodeKernels | undefined;
  readonly #record: Tensor<"i64">;
  /** Steps that `run()` makes. */
  readonly perRun: number;
  #graph: Graph<LowLatencyResult[]> | undefined;

  /** @throws {Error} on cuda, when decode.cu cannot be had */
  constructor(buffer: EpBuffer, shape: DecodeShape, options: DecodeOptions = {}) {
    const { tokens, hidden, topk } = shape,
      cuda = buffer.backend !== "cpu",
      perGraph = cuda ? options.perGraph ?? 1 : 0;
    const kernels = cuda ? decodeKernels() : undefined;
    if (typeof kernels === "string") throw new Error(`Cannot make a decode step: ${kernels}`);
    this.buffer = buffer;
    this.shape = shape;
    this.standIn = cuda ? options.standIn ?? { multiply: 3, add: 5 } : { multiply: 1, add: 1 };
    this.x = buffer.tensor("bf16", [tokens, hidden], new Uint16Array(tokens * hidden));
    this.topkIdx = buffer.tensor("i32", [tokens, topk], new Int32Array(tokens * topk).fill(-1));
    this.topkWeights = buffer.tensor("f32", [tokens, topk], new Float32Array(tokens * topk));
    this.out = buffer.tensor("bf16", [tokens, hidden], new Uint16Array(tokens * hidden));
    this.#record = buffer.tensor("i64", [3], BigInt64Array.of(0n, 0n, -1n));
    this.#options = options;
    this.#kernels = kernels;
    this.perRun = Math.max(1, perGraph);
    if (perGraph === 0) return;
    this.#graph = buffer.capture(buffer.stream, (operations) => {
      return Array.from({ length: perGraph }, () => this.#enqueue(operations, operations.stream).recv);
    });
  }

  /** Enqueues `perRun` steps; the event marks their end. Collective. */
  run(): EpEvent {
    if (this.#graph) return this.#graph.launch();
    const { recv, event } = this.#enqueue(this.buffer, this.buffer.stream);
    recv.release();
    return event;
  }

  /** What the checks inside the steps have found so far, when what was enqueued has ended. */
  async found(): Promise<Found> {
    const [steps, mismatches, first] = BigInt64Array.from(await this.#record.read());
    if (mismatches === 0n) return { steps: Number(steps), mismatches: 0, first: undefined };
    const at = { step: Number(first! >> 20n), token: Number(first! & 0xf_ffffn) };
    return { steps: Number(steps), mismatches: Number(mismatches), first: at };
  }

  /** Gives everything back, after what was enqueued. */
  [Symbol.dispose](): void {
    this.#graph?.results.forEach((recv) => recv.release());
    this.#graph?.release();
    for (const tensor of [this.x, this.topkIdx, this.topkWeights, this.out, this.#record]) tensor.release();
  }

  #enqueue(operations: Operations, stream: Stream): { recv: LowLatencyResult; event: EpEvent } {
    const { topkIdx, topkWeights, out } = this, kernels = this.#kernels, { recvHook = false } = this.#options;
    this.#draw(stream);
    const fp8 = kernels !== undefined && (this.#options.fp8 ?? true);
    const recv: LowLatencyResult = operations.lowLatencyDispatch(this.x, { topkIdx, fp8, recvHook });
    recv.hook();
    const y = kernels ? this.#experts(kernels, recv, stream) : recv.x as Tensor<"bf16">;
    const { handle } = recv;
    const event = operations.lowLatencyCombine(y, { topkIdx, topkWeights, handle, out, recvHook }).hook();
    this.#check(stream);
    return { recv, event };
  }

  #draw({ address }: Stream): void {
    const { seed } = this.#options;
    if (seed === undefined) return;
    const fields = { ...this.#addresses, ...this.shape, seed, rank: this.buffer.rank };
    this.#kernels?.run("draw", fields, address);
  }

  /** Expert outputs, where peers read them. */
  #experts(kernels: DecodeKernels, recv: LowLatencyResult, { address }: Stream): Tensor<"bf16"> {
    const { rank, numRanks, numLocalExperts: localCount } = this.buffer, y = recv.handle.expertOutput();
    const { data, scales } = "data" in recv.x ? recv.x as ScaledRows : { data: recv.x, scales: undefined };
    const [expertStride, rowStride, elemStride] = (scales?.strides ?? [0, 0, 0]).map((n) => 4 * n);
    kernels.run("experts", {
      x: data.address,
      scales: scales?.address ?? 0n,
      scaleExpertStride: expertStride!,
      scaleRowStride: rowStride!,
      scaleElemStride: elemStride!,
      count: recv.count.address,
      y: y.address,
      firstExpert: localExperts(this.shape.experts, numRanks, rank).first,
      localExperts: localCount,
      maxRows: recv.srcInfo.shape[1]!,
      hidden: this.shape.hidden,
      ...this.standIn,
    }, address);
    return y;
  }

  #check({ address }: Stream): void {
    if (this.#options.seed === undefined) return;
    const believed = this.#options.believed ?? this.standIn;
    this.#kernels?.run("check", { ...this.#addresses, out: this.out.address, ...this.shape, ...believed }, address);
  }

  get #addresses() {
    const { x, topkIdx, topkWeights } = this;
    const record = this.#record.address;
    return { x: x.address, topkIdx: topkIdx.address, topkWeights: topkWeights.address, record };
  }
}

/** Options of a buffer that holds steps, `perGraph` of them captured as one graph. */
export const decodeBuffer = ({ tokens, hidden, experts, topk }: DecodeShape, perGraph = 1) => ({
  hidden,
  numExperts: experts,
  numTopk: topk,
  maxTokensPerRank: 1,
  maxLowLatencyTokensPerRank: tokens,
  numSlots: Math.max(2, perGraph),
});
