/**
 * The C ABI of every backend, declared once, as data.
 *
 * In: nothing. Out: `scripts/abi.ts` writes `cuda/abi/deepep.h` from it, `lib/ffi/struct.ts` derives the codecs, and
 * `lib/ffi/open.ts` the symbol table, so a field is written down here and nowhere else.
 *
 * Conventions. A call takes at most three arguments: a 64-bit self (buffer, stream, event, queue, or 0), a struct that
 * begins with its own size, and an error struct. It returns a status code, `DEEPEP_OK` being 0, and on failure fills the
 * error. Device addresses, streams and events are plain `u64`; a missing pointer is 0. A struct whose `size` is not the
 * library's is refused. Every call is thread-safe. Calls marked "enqueues" return at once, and the operations of a buffer
 * run one after another in the order of the calls. On cuda one runs on the caller's `stream` itself when the buffer made that
 * stream and it waits for the operation: no ASYNC_FINISH, no `previous_event`, no capture. Else, and always on cpu, it runs on
 * the communication stream, and events order the two. `comm_stream` stands for all operations so far, wherever they ran, when
 * an event is recorded on it. "Collective" calls must be made by every unmasked rank in the same order.
 */

/** The ABI version that {@linkcode functions} and {@linkcode structs} describe. Checked when a library is loaded. */
export const ABI_VERSION = 1;

/** A scalar that crosses the border. */
export type Scalar = "i32" | "u32" | "i64" | "u64" | "f32" | "f64";
/** A field: a scalar, or bytes in place. */
export type FieldType = Scalar | `u8[${number}]`;
/** A field of a struct: type, direction seen from the caller, documentation. */
export type Field = readonly [type: FieldType, direction: "in" | "out", doc: string];
/** A struct that crosses the border. Fields have C's natural alignment. */
export interface StructSpec {
  readonly doc: string;
  readonly fields: Readonly<Record<string, Field>>;
}
/** An argument: a scalar, `buf` (bytes of the caller), or the name of a struct passed by pointer. */
export type Argument = readonly [name: string, type: Scalar | "buf" | StructName];
/** A function of the library. */
export interface FunctionSpec {
  readonly args: readonly Argument[];
  readonly ret: Scalar;
  readonly doc: string;
}

/** Named values, by prefix. Codes never change their meaning. */
export const constants = {
  /** What a call returns, what a completion carries, and what {@linkcode structs.deepep_error}'s `code` holds. */
  ERROR: {
    OK: [0, "no error"],
    INVALID_ARGUMENT: [1, "an argument's value is wrong; the message names it"],
    UNSUPPORTED: [2, "this backend does not have the call or the option; the message names it"],
    OUT_OF_MEMORY: [3, "memory could not be allocated or mapped, or too many operations have not ended"],
    CAPACITY: [4, "a rank would receive more rows than its buffer holds; no rank sent anything, every rank reports it"],
    TIMEOUT: [5, "`peer` did not reach `phase` of `op` within the deadline"],
    PEER_LOST: [6, "the process of `peer` has ended"],
    ABORTED: [7, "another rank failed in this call and said so; `peer` is the rank it blames"],
    MISMATCH: [8, "ranks disagree about the options, the operation or its arguments"],
    NO_FREE_SLOT: [9, "every slot is held by a result that was not released"],
    CLOSED: [10, "the object was destroyed"],
    SYSTEM: [11, "the operating system or the driver refused; the message has its words"],
    INTERNAL: [12, "a bug of the library"],
    NEEDS_RECOVERY: [13, "an earlier call failed half-way; recover the buffer or mask the peer"],
  },
  /** What produced an error or a status record. */
  OP: {
    NONE: [0, "none"],
    CREATE: [1, "creation, import or connection of a buffer"],
    LAYOUT: [2, "deepep_get_dispatch_layout"],
    DISPATCH: [3, "deepep_dispatch"],
    COMBINE: [4, "deepep_combine"],
    LOW_LATENCY_DISPATCH: [5, "deepep_low_latency_dispatch"],
    LOW_LATENCY_COMBINE: [6, "deepep_low_latency_combine"],
    BARRIER: [7, "deepep_barrier"],
    COPY: [8, "a copy, a fill or an event"],
    EXPERT_OUTPUT: [9, "deepep_expert_output"],
  },
  /** Where in an operation something happened. */
  PHASE: {
    NONE: [0, "none"],
    NOTIFY: [1, "counts are made and published; waits for the peers' counts"],
    SEND: [2, "rows are pushed to their final place"],
    ARRIVE: [3, "waits until every peer has finished pushing"],
    PUBLISH: [4, "expert outputs are put in symmetric memory and announced; waits until earlier readers are gone"],
    REDUCE: [5, "waits for the peers' expert outputs, then pulls and reduces them"],
  },
  /** Backends. */
  BACKEND: {
    CPU: [1, "threads and shared memory"],
    CUDA: [2, "CUDA within one NVLink or PCIe domain"],
    NVSHMEM: [3, "CUDA and NVSHMEM between nodes"],
  },
  /** Bits of `deepep_capabilities.features`. */
  FEATURE: {
    NORMAL: [1, "dispatch and combine"],
    LOW_LATENCY: [2, "low-latency dispatch and combine"],
    PROCESSES: [4, "ranks may be separate processes"],
    GRAPHS: [8, "calls can be captured in a CUDA graph"],
    INTERNODE: [16, "ranks may be on several nodes"],
    HOST_MEMORY: [32, "tensors are host memory: deepep_host_read and deepep_host_write reach them"],
    INJECT: [64, "deepep_inject works"],
  },
  /** Bits of `deepep_buffer_create_args.flags`. */
  BUFFER: {
    MASK_ON_TIMEOUT: [
      1,
      "a peer that times out or dies is masked and the call goes on without it, instead of failing: it ends with DEEPEP_OK, and masked_ranks of deepep_buffer_get_info says so; every rank must give it alike",
    ],
  },
  /** Row layouts of `deepep_dispatch`. */
  LAYOUT: {
    RANK: [0, "a token once per destination rank, rows ordered by (source rank, token)"],
    EXPERT: [
      1,
      "one row per (token, top-k entry) of a local expert, grouped by expert, ordered inside by (source rank, token, k); a group begins at a multiple of expert_alignment",
    ],
  },
  /** Bits of `flags` of the operations. */
  FLAG: {
    CACHED: [
      1,
      "reuse the routing kept in `handle`: topk_idx and is_token_in_rank must be 0, layout and expert_alignment the handle's, num_topk 0 or the handle's",
    ],
    ZERO_PADDING: [2, "expert layout: write zeros into the alignment padding of recv_x and recv_scales"],
    ASYNC_FINISH: [4, "do not make `stream` wait for the operation; order it with `event`"],
    NO_CPU_SYNC: [
      8,
      "the host will not read the counts, so there is no counts_id: rank layout fills recv_topk_idx of unused rows with -1 up to the capacity; needed under graph capture",
    ],
    SCALES_COLUMN_MAJOR: [
      16,
      "received scales are column-major: element (row, s) at row * elem + s * align(max rows, 16 / elem) * elem bytes (per expert in low-latency mode)",
    ],
    RECEIVE_HOOK: [32, "only send; the matching *_receive call waits for the arrival"],
    FP8: [
      64,
      "low latency: x is bf16, 2 * channels = row_bytes, and is cast to e4m3 with one scale per 128 channels, the last block being what is left; channels must be a multiple of 16. amax is the largest magnitude of the block, 1e-4 at least; bf16 * (448 / amax) is rounded to nearest even, at most 448; the scale is amax * (1 / 448), all in f32. NaN and infinity travel as 0x7f, NaN, or as 448, and make the rest of their block useless. Low-latency combine: rows travel so, half the bytes; the same on every rank; the slot's expert-output region then holds cast rows and not the caller's",
    ],
    ROUND_SCALE: [128, "FP8: scales are rounded up to powers of two, and values are multiplied by their inverse"],
    UE8M0: [
      256,
      "FP8, with ROUND_SCALE: scales are the 8 bits of the exponent of that f32, four to an i32, the first in its low byte and 0 where there is no block, instead of f32",
    ],
    LOGFMT: [512, "low-latency combine: 10-bit logarithmic payload; answers UNSUPPORTED where a backend has none"],
  },
  /** Kinds of memory of `deepep_alloc`. */
  MEMORY: {
    DEVICE: [0, "where the kernels work (host memory on the cpu backend)"],
    HOST: [1, "pinned host memory that deepep_host_read and deepep_host_write reach"],
  },
  /** Actions of `deepep_queue_wake`. */
  WAKE: {
    START: [0, "start the notifier thread with `callback`, a C function void (uint32_t kind)"],
    ARM: [1, "call it once, with kind 0, when a completion is queued"],
    STOP: [2, "end the thread; its last call has kind 1"],
    JOIN: [3, "wait for the thread's end"],
  },
  /** Actions of `deepep_inject`. */
  INJECT: {
    DELAY: [0, "sleep delay_us when `op` enters `phase`"],
    EXIT: [1, "end the process at once, as kill -9 would, when `op` enters `phase`"],
    STALL: [
      2,
      "never finish `phase`: the rank goes silent for this operation until the deadline of its own has passed",
    ],
  },
} as const satisfies Record<string, Record<string, readonly [number, string]>>;

/** Fields that every enqueued operation ends with. */
const stream = {
  stream: [
    "u64",
    "in",
    "the caller's stream: the operation begins after what is enqueued there; 0 = none (CUDA's default stream is cudaStreamLegacy, 1)",
  ],
  previous_event: ["u64", "in", "wait for this event instead of `stream`'s present work; 0 = none"],
  event: [
    "u64",
    "in",
    "event to record when the operation has ended; 0 = none: deepep_event_create can make one for a done_id later",
  ],
  done_id: ["u64", "in", "completion to queue when the operation has ended, with its status; 0 = none"],
  flags: ["u32", "in", "DEEPEP_FLAG_* bits; those that no such call has a use for are refused"],
  timeout_ms: [
    "u32",
    "in",
    "deadline of each wait in the operation, milliseconds; 0 = the buffer's. A wait is drawn out once, by half, when the awaited peer itself waits for a third: so that the third is blamed",
  ],
  num_sms: ["i32", "in", "streaming multiprocessors to use; 0 = the plan's choice; ignored by the cpu backend"],
} as const satisfies Record<string, Field>;

/** Where the routing of an operation comes from. */
const routing = {
  num_tokens: ["i32", "in", "tokens on this rank, 0 … max_tokens_per_rank (low latency: its own limit)"],
  num_topk: ["i32", "in", "entries a token in topk_idx, 0 … 32 (0 without topk_idx)"],
  topk_idx_bytes: ["u32", "in", "4 = int32, 8 = int64"],
  topk_idx: [
    "u64",
    "in",
    "int32 or int64 [num_tokens, num_topk]: expert of each entry, -1 = none; anything else outside 0 … num_experts - 1 fails the call on every rank",
  ],
} as const satisfies Record<string, Field>;

/** Rows that an operation carries: bytes, with optional scale elements beside them. */
const payload = {
  x: ["u64", "in", "rows [num_tokens], row_bytes of payload each; aligned to 16 bytes"],
  x_stride: ["u64", "in", "bytes from a row to the next; a multiple of 16"],
  row_bytes: [
    "u32",
    "in",
    "payload bytes a row, with FLAG_FP8 before the cast; a multiple of 16, at most max_row_bytes",
  ],
  num_scales: ["u32", "in", "scale elements a row; 0 = none"],
  scale_elem_bytes: ["u32", "in", "bytes of a scale element: 1, 2, 4, 8 or 16"],
  scales: ["u64", "in", "scale elements [num_tokens, num_scales]; 0 = none"],
  scales_row_stride: ["u64", "in", "bytes from a token's scales to the next token's"],
  scales_elem_stride: ["u64", "in", "bytes from a scale element to the next of the same token"],
} as const satisfies Record<string, Field>;

const size = ["u32", "in", "sizeof this struct"] as const satisfies Field;
const reserved = ["u32", "in", "0"] as const satisfies Field;

/** The options of a buffer that every rank must agree about. Travels in the peer handle too, where it is compared. */
const options = {
  num_ranks: ["u32", "in", "ranks in the group, 1 … DEEPEP_MAX_RANKS"],
  hidden: ["u32", "in", "channels a token, 8 … DEEPEP_MAX_HIDDEN; hidden * 2 must be a multiple of 16"],
  num_experts: [
    "u32",
    "in",
    "experts in all; they need not divide by the ranks: the first num_experts % num_ranks ranks own one more",
  ],
  num_topk: ["u32", "in", "largest number of experts a token, 1 … 32"],
  max_tokens_per_rank: ["u32", "in", "largest num_tokens of normal mode, 0 … 65536"],
  max_low_latency_tokens_per_rank: ["u32", "in", "largest num_tokens of low-latency mode; 0 = no low-latency mode"],
  max_recv_tokens: [
    "u32",
    "in",
    "rows a slot holds in normal mode, padding included; 0 = max_tokens_per_rank * num_ranks, which the rank layout never exceeds; the expert layout can need num_topk times as many, and expert_alignment - 1 more for each expert of a rank",
  ],
  num_slots: ["u32", "in", "results that can be held at once, 1 … 8; 0 = 2"],
  max_row_bytes: ["u32", "in", "largest payload row, a multiple of 16, at most DEEPEP_MAX_ROW_BYTES; 0 = hidden * 2"],
  max_scale_bytes: [
    "u32",
    "in",
    "largest scale row, at most DEEPEP_MAX_ROW_BYTES; 0 = 4 bytes per 128 channels, rounded up",
  ],
} as const satisfies Record<string, Field>;

/** The structs. */
export const structs = {
  deepep_error: {
    doc: "What went wrong: filled by a failing call, and the status record of an operation that failed while running.",
    fields: {
      size,
      code: ["i32", "out", "DEEPEP_ERROR_*"],
      op: ["i32", "out", "DEEPEP_OP_*"],
      phase: ["i32", "out", "DEEPEP_PHASE_*"],
      rank: ["i32", "out", "the rank that reports"],
      peer: ["i32", "out", "the rank that is to blame, or -1"],
      expected: ["i64", "out", "the value waited for, the limit, or 0"],
      seen: ["i64", "out", "the value found instead"],
      waited_ns: ["i64", "out", "how long it was waited, nanoseconds"],
      epoch: ["u64", "out", "the number of the collective call on this buffer, from 1"],
      message: ["u8[448]", "out", "UTF-8, ends with a zero byte: what was being done, with the values"],
    },
  },
  deepep_capabilities: {
    doc: "What a library and a device can do.",
    fields: {
      size,
      abi_version: ["u32", "out", "the library's ABI version"],
      backend: ["i32", "out", "DEEPEP_BACKEND_*"],
      num_devices: ["i32", "out", "devices seen"],
      features: ["u32", "out", "DEEPEP_FEATURE_* bits"],
      max_ranks: ["u32", "out", "largest num_ranks"],
      max_topk: ["u32", "out", "largest num_topk"],
      max_slots: ["u32", "out", "largest num_slots"],
      num_sms: ["i32", "out", "multiprocessors of the device (cores for cpu)"],
      compute_capability: ["i32", "out", "10 * major + minor; 0 for cpu"],
      driver_version: ["i32", "out", "CUDA driver version, 1000 * major + 10 * minor; 0 for cpu"],
      mps: ["i32", "out", "1 when processes share the device through CUDA MPS; 0 for cpu"],
      total_bytes: ["u64", "out", "memory of the device"],
      free_bytes: ["u64", "out", "of which free"],
      name: ["u8[128]", "out", "UTF-8, ends with a zero byte"],
    },
  },
  deepep_peer_access_args: {
    doc: "How two devices of this machine reach each other's memory.",
    fields: {
      size,
      peer: ["i32", "in", "the other device"],
      access: ["i32", "out", "1 when kernels on the device can read and write the peer's memory; 1 for itself"],
      performance_rank: ["i32", "out", "the driver's rank of the link: smaller is faster; 0 for itself"],
    },
  },
  deepep_measure_copy_args: {
    doc: "The device's own ceiling for moving bytes: what every figure of the kernels is held against.",
    fields: {
      size,
      num_sms: ["i32", "in", "multiprocessors the copy kernel uses; 0 = all"],
      bytes: ["u64", "in", "bytes a copy reads, and writes; a multiple of 16"],
      repeats: ["u32", "in", "copies timed in a row, 1 … 1000"],
      reserved,
      kernel_ns: ["i64", "out", "mean time of a copy by kernel, nanoseconds"],
      memcpy_ns: ["i64", "out", "mean time of a copy by the driver"],
    },
  },
  deepep_plan_args: {
    doc: "How an operation would be launched: a pure function of shapes and topology.",
    fields: {
      size,
      op: ["i32", "in", "DEEPEP_OP_DISPATCH or DEEPEP_OP_COMBINE, or those of low latency"],
      row_bytes: ["u32", "in", "payload bytes a row; with `fp8` those of bf16"],
      hops: [
        "u32",
        "in",
        "rows a token becomes at most: ranks or num_topk, whichever is smaller (rank layout), num_topk (expert layout, low latency)",
      ],
      num_sms: ["i32", "in", "multiprocessors asked for; 0 = the default"],
      device_sms: ["i32", "in", "multiprocessors of the device; 0 = the buffer's device"],
      ranks_on_device: ["u32", "in", "ranks that share the device; 0 = the buffer's"],
      compute_capability: ["i32", "in", "10 * major + minor; 0 = the buffer's device"],
      shared_bytes: ["u32", "in", "shared memory a block can have; 0 = the buffer's device"],
      sms: ["i32", "out", "multiprocessors used: one block each"],
      warps: ["u32", "out", "warps a block"],
      stages: ["u32", "out", "pieces of rows a warp has under way"],
      chunk_bytes: ["u32", "out", "bytes of a piece of a row"],
      block_bytes: ["u32", "out", "shared memory a block uses"],
      tma: ["u32", "out", "1 = bulk copies by the tensor memory accelerator, 0 = loads and stores"],
      num_tokens: ["u32", "in", "low latency: tokens of this rank; otherwise 0"],
      num_experts: ["u32", "in", "low-latency dispatch: experts in all; 0 = the buffer's"],
      fp8: ["u32", "in", "low latency: 1 = rows are cast to FP8; otherwise 0"],
    },
  },
  deepep_completion: {
    doc: "An entry of a completion queue. 16 bytes.",
    fields: {
      id: ["u64", "out", "the id that the call was given"],
      status: ["i32", "out", "DEEPEP_OK or DEEPEP_ERROR_*; the record is deepep_get_status's"],
      reserved: ["u32", "out", "0"],
    },
  },
  deepep_queue_create_args: {
    doc: "Arguments of deepep_queue_create.",
    fields: { size, reserved, queue: ["u64", "out", "the queue"] },
  },
  deepep_queue_wake_args: {
    doc: "Arguments of deepep_queue_wake.",
    fields: {
      size,
      action: ["u32", "in", "DEEPEP_WAKE_*"],
      callback: ["u64", "in", "START: address of void (*)(uint32_t kind), called on the notifier thread"],
    },
  },
  deepep_buffer_create_args: {
    doc:
      "Options of a buffer, and the sizes they come to. Where an option is 0 and that means a default, the default is written in its place: clear the struct before you use it for other options.",
    fields: {
      size,
      flags: ["u32", "in", "DEEPEP_BUFFER_* bits"],
      rank: ["u32", "in", "this rank"],
      device: ["i32", "in", "device index; 0 on the cpu backend"],
      ...options,
      timeout_ms: ["u32", "in", "deadline of each wait, milliseconds; 0 = 30000"],
      num_sms: ["i32", "in", "multiprocessors an operation uses unless it says; 0 = the plan's choice"],
      queue: ["u64", "in", "completion queue of the caller; 0 = none, ids must then be 0"],
      buffer: ["u64", "out", "the buffer"],
      symmetric_bytes: ["u64", "out", "symmetric memory of this rank: control + num_slots * slot"],
      control_bytes: ["u64", "out", "flags and count messages"],
      slot_bytes: ["u64", "out", "one slot: recv_x + recv_scales + expert_output + metadata, rounded up"],
      recv_x_bytes: ["u64", "out", "received rows of a slot"],
      recv_scales_bytes: ["u64", "out", "received scales of a slot, and room to turn them into columns"],
      expert_output_bytes: ["u64", "out", "expert outputs of a slot, from which peers pull"],
      metadata_bytes: ["u64", "out", "top-k, source indices and counts of a slot"],
      local_bytes: ["u64", "out", "memory of this rank that peers do not see"],
      handle_bytes: [
        "u64",
        "out",
        "device memory of a handle for max_tokens_per_rank tokens, which deepep_handle_create takes; 0 on the cpu backend",
      ],
    },
  },
  deepep_peer_handle: {
    doc:
      "What a peer needs to map a rank's memory: deepep_buffer_export writes all of it, deepep_buffer_import reads it. Plain bytes: send it by any means.",
    fields: {
      size,
      rank: ["u32", "in", "the rank that exported it"],
      ...options,
      bytes: ["u8[256]", "out", "opaque: deepep_buffer_export writes it and the rest, deepep_buffer_import reads it"],
    },
  },
  deepep_buffer_info: {
    doc: "Facts about a connected buffer.",
    fields: {
      size,
      rank: ["u32", "out", "this rank"],
      num_ranks: ["u32", "out", "ranks"],
      num_local_experts: ["u32", "out", "experts of this rank"],
      first_local_expert: ["u32", "out", "index of the first of them"],
      failed: ["u32", "out", "1 after a failure that needs deepep_buffer_recover or a mask"],
      free_slots: ["u32", "out", "bit s is set when slot s is free"],
      max_recv_tokens: ["u32", "out", "rows a slot holds"],
      masked_ranks: ["u64", "out", "bit r is set when rank r is masked"],
      epoch: ["u64", "out", "collective calls made so far; where calls are `captured`, deepep_buffer_get_stats knows"],
      captured: ["u32", "out", "1 when calls of the buffer have been captured: replays tell the host nothing"],
      num_sms: [
        "i32",
        "out",
        "multiprocessors an operation of normal mode uses unless it says, one of low latency at least; 0 on the cpu backend",
      ],
      ranks_on_device: ["u32", "out", "ranks that share this rank's device, itself included"],
      comm_stream: [
        "u64",
        "out",
        "the communication stream; an event recorded on it stands for every operation so far, wherever it ran",
      ],
    },
  },
  deepep_buffer_stats: {
    doc: "What a connected buffer has counted.",
    fields: {
      size,
      reserved,
      epoch: ["u64", "out", "collective calls made so far, those of replays of its graphs included"],
      wait_ns: [
        "u64",
        "out",
        "host address of i64 [2, num_ranks], valid until the buffer is destroyed: nanoseconds waited for each peer in dispatch and combine; the next call writes it anew, on the cpu backend running operations do",
      ],
      num_dispatches: ["u64", "out", "dispatches that ended, either mode"],
      num_combines: ["u64", "out", "combines that ended, either mode"],
      rows_sent: ["u64", "out", "rows pushed to all ranks, this one included"],
      bytes_sent: ["u64", "out", "their payload and scale bytes"],
      rows_pulled: ["u64", "out", "expert-output rows read"],
      num_failures: ["u64", "out", "operations that failed"],
    },
  },
  deepep_buffer_recover_args: {
    doc: "Arguments of deepep_buffer_recover.",
    fields: {
      size,
      reserved,
      epoch: [
        "u64",
        "in",
        "the largest epoch of all surviving ranks, at most 2^47, and not about a multiple of 2^32 above this rank's: the next call gets a number above it",
      ],
      masked_ranks: ["u64", "in", "bit r: rank r is masked from now on, the same on every survivor"],
    },
  },
  deepep_mask_args: {
    doc: "Arguments of deepep_mask.",
    fields: {
      size,
      rank: ["u32", "in", "the peer, not this rank"],
      masked: [
        "u32",
        "in",
        "1 = leave it out of every wait, send and reduction; 0 = take it in again. Where it has made fewer calls than this rank meanwhile, or more, or one has failed because of it, every rank calls deepep_buffer_recover instead",
      ],
      reserved,
    },
  },
  deepep_slot_release_args: {
    doc: "Arguments of deepep_slot_release.",
    fields: {
      size,
      slot: ["i32", "in", "the slot, as deepep_dispatch gave it"],
      stream: [
        "u64",
        "in",
        "the slot is reused only after what is enqueued there now; 0 = at once. A stream that is captured, of a slot taken in the same capture: later calls of that capture may name the slot; for all others it is held until it is released once more, when the graph is replayed no more",
      ],
    },
  },
  deepep_alloc_args: {
    doc: "Arguments of deepep_alloc and deepep_free.",
    fields: {
      size,
      kind: ["u32", "in", "DEEPEP_MEMORY_*"],
      bytes: ["u64", "in", "bytes, at least 1; memory is aligned to 256"],
      stream: ["u64", "in", "free: only after what is enqueued there now; 0 = at once"],
      address: ["u64", "out", "alloc writes it, free reads it"],
    },
  },
  deepep_copy_args: {
    doc: "Arguments of deepep_copy.",
    fields: {
      size,
      reserved,
      dst: ["u64", "in", "to this address"],
      src: ["u64", "in", "from this address; must not overlap"],
      bytes: ["u64", "in", "so many bytes"],
      stream: ["u64", "in", "in the order of this stream; 0 is refused"],
      done_id: ["u64", "in", "completion to queue when done; 0 = none"],
    },
  },
  deepep_fill_args: {
    doc: "Arguments of deepep_fill.",
    fields: {
      size,
      value: ["u32", "in", "byte value, 0 … 255"],
      dst: ["u64", "in", "from this address"],
      bytes: ["u64", "in", "so many bytes"],
      stream: ["u64", "in", "in the order of this stream; 0 is refused"],
    },
  },
  deepep_stream_create_args: {
    doc: "Arguments of deepep_stream_create.",
    fields: { size, reserved, stream: ["u64", "out", "the stream; on CUDA a cudaStream_t"] },
  },
  deepep_stream_sync_args: {
    doc: "Arguments of deepep_stream_synchronize.",
    fields: { size, timeout_ms: ["u32", "in", "give up with TIMEOUT after so long; 0 = never"] },
  },
  deepep_event_create_args: {
    doc: "Arguments of deepep_event_create.",
    fields: {
      size,
      reserved,
      done_id: [
        "u64",
        "in",
        "mark the end of the buffer's operation with this id, no copy and no replay, as if it had been given the event; done at once where none such is under way, with its status as long as deepep_get_status has the record. 0 = none: done until it is recorded",
      ],
      event: ["u64", "out", "the event"],
    },
  },
  deepep_event_args: {
    doc: "Arguments of deepep_event_record, deepep_event_wait, deepep_event_notify and deepep_event_query.",
    fields: {
      size,
      done: ["u32", "out", "query: 1 when the recorded work has ended"],
      stream: ["u64", "in", "record: after this stream's present work; wait: this stream waits for it"],
      done_id: ["u64", "in", "notify: completion to queue once the recorded work has ended"],
      status: [
        "i32",
        "out",
        "query: how the operation ended that was given the event; DEEPEP_OK for one set by deepep_event_record",
      ],
      reserved,
    },
  },
  deepep_event_elapsed_args: {
    doc: "Arguments of deepep_event_elapsed.",
    fields: {
      size,
      reserved,
      since: ["u64", "in", "an earlier event"],
      elapsed_ns: ["i64", "out", "time from its point to this event's, nanoseconds; the resolution is about 1 µs"],
    },
  },
  deepep_graph_args: {
    doc: "Arguments of deepep_graph_begin, deepep_graph_end and deepep_graph_launch.",
    fields: {
      size,
      reserved,
      stream: [
        "u64",
        "in",
        "begin, end: the stream that is captured, not the communication stream; launch: the stream in whose order the graph runs",
      ],
      graph: ["u64", "out", "end: the graph"],
      done_id: ["u64", "in", "launch: completion to queue when the replay has ended; 0 = none"],
      event: ["u64", "in", "launch: event to record when the replay has ended, with the time; 0 = none"],
    },
  },
  deepep_dispatch_layout_args: {
    doc: "Arguments of deepep_get_dispatch_layout.",
    fields: {
      size,
      reserved,
      ...routing,
      num_tokens_per_rank: ["u64", "in", "i32 [num_ranks]: tokens that go to each rank, written"],
      num_tokens_per_expert: ["u64", "in", "i32 [num_experts]: entries that go to each expert, written"],
      is_token_in_rank: ["u64", "in", "u8 [num_tokens, num_ranks]: 1 when the token goes to the rank, written"],
      ...stream,
      reserved_2: ["u32", "in", "0"],
    },
  },
  deepep_handle_create_args: {
    doc: "Arguments of deepep_handle_create.",
    fields: {
      size,
      reserved,
      num_tokens: ["u32", "in", "largest num_tokens it will hold"],
      num_topk: ["u32", "in", "largest num_topk it will hold"],
      handle: ["u64", "out", "the handle"],
    },
  },
  deepep_dispatch_args: {
    doc: "Arguments of deepep_dispatch.",
    fields: {
      size,
      layout: ["u32", "in", "DEEPEP_LAYOUT_*"],
      handle: ["u64", "in", "handle that keeps the routing, 0 = none; CACHED: that has it"],
      slot: [
        "i32",
        "out",
        "in: a free slot, or -1 (not 0) for any; out: the slot taken, held until deepep_slot_release, also when the dispatch fails later",
      ],
      expert_alignment: [
        "u32",
        "in",
        "1 … 65536: num_recv_tokens_per_expert are rounded up to it; expert layout: groups too",
      ],
      ...routing,
      topk_weights: ["u64", "in", "f32 [num_tokens, num_topk], CACHED or not; 0 = none"],
      is_token_in_rank: ["u64", "in", "without topk_idx: u8 [num_tokens, num_ranks] (rank layout only)"],
      num_tokens_per_expert: [
        "u64",
        "in",
        "without topk_idx, optional: i32 [num_experts], 0 … 65536 * 32 each, only summed into the per-expert counts; beside topk_idx nobody looks at it",
      ],
      ...payload,
      expert_stats: ["u64", "in", "i32 [num_local_experts]: entries received are added to it; 0 = none"],
      counts_id: ["u64", "in", "completion to queue as soon as host_counts is filled; 0 = none"],
      ...stream,
      max_rows: ["u32", "out", "rows that the received tensors can hold"],
      recv_x: ["u64", "out", "[rows, row_bytes]"],
      recv_scales: ["u64", "out", "[rows, num_scales] elements; 0 without scales"],
      recv_scales_row_stride: ["u64", "out", "bytes"],
      recv_scales_elem_stride: ["u64", "out", "bytes"],
      recv_topk_idx: [
        "u64",
        "out",
        "rank layout: same type as topk_idx, [rows, num_topk]: local expert index, -1 where the entry is another rank's",
      ],
      recv_topk_weights: [
        "u64",
        "out",
        "f32: rank layout [rows, num_topk], 0 where the entry is another rank's; expert layout [rows]",
      ],
      recv_src_idx: ["u64", "out", "i32 [rows]: source rank * max_tokens_per_rank + token; -1 in padding"],
      recv_num_rows: [
        "u64",
        "out",
        "device i32 [2]: rank-layout tokens received; rows in use in this layout, padding included",
      ],
      recv_num_tokens_per_expert: ["u64", "out", "device i32 [num_local_experts], rounded up to expert_alignment"],
      recv_num_tokens_per_rank: ["u64", "out", "device i32 [num_ranks]: tokens from each source rank"],
      host_counts: [
        "u64",
        "out",
        "host i32 [2 + num_local_experts + num_ranks]: the three arrays above, valid when counts_id completes",
      ],
    },
  },
  deepep_combine_args: {
    doc: "Arguments of deepep_combine.",
    fields: {
      size,
      hidden: ["u32", "in", "bf16 channels of a row, at most the buffer's; hidden * 2 must be a multiple of 16"],
      handle: ["u64", "in", "handle of the dispatch"],
      slot: [
        "i32",
        "in",
        "slot whose expert-output region is used: the dispatch's, or -1 for any free one during the call, which then needs x where there are rows",
      ],
      num_rows: [
        "u32",
        "in",
        "rows that x and topk_weights have: if the dispatch needs more, padding included, the call fails when it runs and reads none; 0 = you know that they are enough",
      ],
      x: [
        "u64",
        "in",
        "bf16 [rows, hidden] expert outputs in the layout of the dispatch; 0 = already in the slot's region, dense by this call's hidden",
      ],
      x_stride: ["u64", "in", "bytes from a row to the next; a multiple of 16"],
      topk_weights: [
        "u64",
        "in",
        "f32, shaped as recv_topk_weights: brought back and summed, over a token's rows in the rank layout; 0 = none",
      ],
      weights: [
        "u64",
        "in",
        "f32 [num_tokens, num_topk], expert layout only: row k of a token is multiplied by it; 0 = none",
      ],
      bias_0: ["u64", "in", "bf16 [num_tokens, hidden] added before the rows; 0 = none"],
      bias_1: ["u64", "in", "the same, added to bias_0; 0 = none"],
      out: ["u64", "in", "bf16 [num_tokens, hidden], written"],
      out_topk_weights: [
        "u64",
        "in",
        "f32 [num_tokens, num_topk], written when topk_weights is given; 0 where topk_idx was -1",
      ],
      ...stream,
      reserved_2: ["u32", "in", "0"],
    },
  },
  deepep_low_latency_dispatch_args: {
    doc: "Arguments of deepep_low_latency_dispatch.",
    fields: {
      size,
      slot: ["i32", "out", "in: a free slot, or -1 (not 0) for any; out: the slot taken, held as deepep_dispatch's"],
      ...routing,
      ...payload,
      expert_stats: ["u64", "in", "i32 [num_local_experts]: rows received are added to it; 0 = none"],
      wait_stats: [
        "u64",
        "in",
        "i64 [num_ranks]: nanoseconds waited for each peer are added to it, by both halves of a call with RECEIVE_HOOK; 0 = none",
      ],
      ...stream,
      max_rows: ["u32", "out", "rows an expert can hold: num_ranks * max_low_latency_tokens_per_rank"],
      recv_x: ["u64", "out", "[num_local_experts, max_rows, row bytes]: e4m3 with FLAG_FP8, else the payload rows"],
      recv_scales: ["u64", "out", "scale elements; with FLAG_FP8 f32, or i32 of four exponents with FLAG_UE8M0"],
      recv_scales_expert_stride: ["u64", "out", "bytes"],
      recv_scales_row_stride: ["u64", "out", "bytes"],
      recv_scales_elem_stride: ["u64", "out", "bytes"],
      recv_count: [
        "u64",
        "out",
        "i32 [num_local_experts]: rows of each expert, by source rank, then by token; more than max_rows, which only a token that names an expert twice can cause, is CAPACITY on every rank",
      ],
      recv_src_info: [
        "u64",
        "out",
        "i32 [num_local_experts, max_rows]: token index at the source rank; -1 of a lost row",
      ],
      recv_layout_range: [
        "u64",
        "out",
        "i64 [num_local_experts, num_ranks]: begin << 32 | count of each source rank's rows",
      ],
    },
  },
  deepep_low_latency_combine_args: {
    doc: "Arguments of deepep_low_latency_combine.",
    fields: {
      size,
      slot: ["i32", "in", "the slot of the dispatch"],
      ...routing,
      topk_weights: ["u64", "in", "f32 [num_tokens, num_topk]; 0 = all ones"],
      x: [
        "u64",
        "in",
        "bf16 [num_local_experts, max_rows, hidden], hidden being the buffer's whatever was dispatched; 0 = already in the slot's expert-output region",
      ],
      out: ["u64", "in", "bf16 [num_tokens, hidden], written"],
      wait_stats: [
        "u64",
        "in",
        "i64 [num_ranks]: nanoseconds waited for each peer are added to it, by both halves of a call with RECEIVE_HOOK; 0 = none",
      ],
      ...stream,
      reserved: ["u32", "in", "0"],
    },
  },
  deepep_receive_args: {
    doc: "Arguments of deepep_low_latency_dispatch_receive and deepep_low_latency_combine_receive.",
    fields: {
      size,
      slot: ["i32", "in", "the slot of the send half"],
      ...stream,
      reserved: ["u32", "in", "0"],
    },
  },
  deepep_expert_output_args: {
    doc: "Arguments of deepep_expert_output.",
    fields: {
      size,
      slot: ["i32", "in", "a held slot"],
      address: [
        "u64",
        "out",
        "bf16 rows: [max_recv_tokens, hidden], or [num_local_experts, max_rows, hidden] in low-latency mode",
      ],
      bytes: ["u64", "out", "size of the region"],
      ...stream,
      reserved: ["u32", "in", "0"],
    },
  },
  deepep_barrier_args: {
    doc: "Arguments of deepep_barrier.",
    fields: { size, reserved, ...stream, reserved_2: ["u32", "in", "0"] },
  },
  deepep_refuse_args: {
    doc: "Arguments of deepep_refuse.",
    fields: {
      size,
      op: ["i32", "in", "DEEPEP_OP_* of the collective call that this rank cannot make"],
      code: ["i32", "in", "DEEPEP_ERROR_* that says why; the peers are told it"],
      reserved,
    },
  },
  deepep_status_args: {
    doc: "Arguments of deepep_get_status.",
    fields: { size, reserved, id: ["u64", "in", "completion id of the operation; 0 = the latest failure"] },
  },
  deepep_inject_args: {
    doc: "Arguments of deepep_inject.",
    fields: {
      size,
      op: ["i32", "in", "DEEPEP_OP_*"],
      phase: ["i32", "in", "DEEPEP_PHASE_*"],
      action: ["u32", "in", "DEEPEP_INJECT_*"],
      delay_us: ["u32", "in", "DELAY: microseconds"],
      count: ["u32", "in", "how many times; 0 takes the injection back"],
    },
  },
} as const satisfies Record<string, StructSpec>;

/** The name of a struct. */
export type StructName = keyof typeof structs;

/** The functions. Spelled out, since JSR wants types that need no inference of calls. */
export const functions = {
  deepep_abi_version: { args: [], ret: "u32", doc: "The ABI version of the library. Call it first." },
  deepep_get_capabilities: {
    args: [["device", "u64"], ["args", "deepep_capabilities"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "What the library can do on a device. Local, never blocks on peers.",
  },
  deepep_get_peer_access: {
    args: [["device", "u64"], ["args", "deepep_peer_access_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Whether a device reaches another's memory. Local. UNSUPPORTED on the cpu backend.",
  },
  deepep_measure_copy: {
    args: [["device", "u64"], ["args", "deepep_measure_copy_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Times copies on an idle device; allocates twice `bytes` and blocks the calling thread. For measurements, not for an event loop. UNSUPPORTED on the cpu backend.",
  },
  deepep_plan: {
    args: [["buffer", "u64"], ["args", "deepep_plan_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "How an operation would be launched. `buffer` may be 0 when the args give the topology; needs no device then. UNSUPPORTED on the cpu backend.",
  },
  deepep_host_read: {
    args: [["address", "u64"], ["dst", "buf"], ["bytes", "u64"]],
    ret: "i32",
    doc:
      "Copies from memory of the library that the host can read (host_counts, wait_ns, MEMORY_HOST) to the caller's. At once. Nothing is checked: that the memory is there, as long as its buffer is, the caller knows.",
  },
  deepep_host_write: {
    args: [["address", "u64"], ["src", "buf"], ["bytes", "u64"]],
    ret: "i32",
    doc: "Copies from the caller's memory to memory of the library that the host can write. At once, and as unchecked.",
  },
  deepep_queue_create: {
    args: [["zero", "u64"], ["args", "deepep_queue_create_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Makes a completion queue.",
  },
  deepep_queue_drain: {
    args: [["queue", "u64"], ["out", "buf"], ["capacity", "u32"]],
    ret: "i32",
    doc:
      "Takes up to `capacity` deepep_completion entries off the queue; returns how many, or minus a DEEPEP_ERROR_* code when `queue` is none, or `out` is 0 and something is queued. Never blocks; a few nanoseconds when empty.",
  },
  deepep_queue_wake: {
    args: [["queue", "u64"], ["args", "deepep_queue_wake_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Optional wake-up by callback.",
  },
  deepep_queue_destroy: {
    args: [["queue", "u64"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Frees a queue. INVALID_ARGUMENT while a buffer uses it. A notifier that still runs ends without its last call.",
  },
  deepep_buffer_size: {
    args: [["device", "u64"], ["args", "deepep_buffer_create_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Writes the sizes that deepep_buffer_create would allocate, and the defaults it would take for zeros. Allocates nothing.",
  },
  deepep_buffer_create: {
    args: [["device", "u64"], ["args", "deepep_buffer_create_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Makes a rank's buffer: symmetric memory, communication stream, slots. Local. Then export, exchange, import all, connect.",
  },
  deepep_buffer_export: {
    args: [["buffer", "u64"], ["args", "deepep_peer_handle"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Writes the handle that the peers import. Local.",
  },
  deepep_buffer_import: {
    args: [["buffer", "u64"], ["args", "deepep_peer_handle"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Maps a peer's memory. MISMATCH, naming field and values, when its options differ. Local; once per peer. The own handle may be imported or not.",
  },
  deepep_buffer_connect: {
    args: [["buffer", "u64"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Checks that every peer was imported and makes the buffer ready. Local, but no rank may call an operation before all connected.",
  },
  deepep_buffer_get_info: {
    args: [["buffer", "u64"], ["args", "deepep_buffer_info"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Facts. Local.",
  },
  deepep_buffer_get_stats: {
    args: [["buffer", "u64"], ["args", "deepep_buffer_stats"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Counters. Local. The cuda backend looks at the device, some 10 microseconds, unless nothing can have run since the last look. SYSTEM when it does not answer within 100 ms, since copies to the host stand in a queue, or when CUDA has failed.",
  },
  deepep_buffer_recover: {
    args: [["buffer", "u64"], ["args", "deepep_buffer_recover_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "After a failure: forgets it and continues at an epoch agreed by the survivors. Every survivor calls it with the same arguments; INVALID_ARGUMENT while work is enqueued, or when `epoch` is below this rank's; where calls were captured, SYSTEM like deepep_buffer_get_stats.",
  },
  deepep_buffer_destroy: {
    args: [["buffer", "u64"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Waits for the buffer's own streams (bounded by their deadlines), then frees everything. Local: never waits for a peer's destroy.",
  },
  deepep_mask: {
    args: [["buffer", "u64"], ["args", "deepep_mask_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Masks or unmasks a peer, from the next enqueued call on. Local. To mask the peer that a failure blames ends the failure; combines of low latency whose receive half was to come then are given up. The survivors must have made equally many calls: otherwise deepep_buffer_recover, with the mask, gives them one epoch.",
  },
  deepep_slot_release: {
    args: [["buffer", "u64"], ["args", "deepep_slot_release_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Gives a slot back in stream order; halves of low-latency calls that were still to come are given up. Tensors in it must not be read by work enqueued later.",
  },
  deepep_alloc: {
    args: [["buffer", "u64"], ["args", "deepep_alloc_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Allocates memory on the buffer's device. Kernels of other devices reach it where their ranks are in this process and connected to this buffer's.",
  },
  deepep_free: {
    args: [["buffer", "u64"], ["args", "deepep_alloc_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Frees memory of deepep_alloc.",
  },
  deepep_copy: {
    args: [["buffer", "u64"], ["args", "deepep_copy_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Enqueues a copy between addresses of the device or of MEMORY_HOST.",
  },
  deepep_fill: {
    args: [["buffer", "u64"], ["args", "deepep_fill_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Enqueues a fill with a byte value.",
  },
  deepep_stream_create: {
    args: [["buffer", "u64"], ["args", "deepep_stream_create_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Makes a stream on the buffer's device.",
  },
  deepep_stream_synchronize: {
    args: [["stream", "u64"], ["args", "deepep_stream_sync_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Blocks the calling thread until the stream's present work has ended. For C; never called from an event loop.",
  },
  deepep_stream_destroy: {
    args: [["stream", "u64"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Ends a stream after its work.",
  },
  deepep_event_create: {
    args: [["buffer", "u64"], ["args", "deepep_event_create_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Makes an event. With a done_id it need be made for those operations only that something is to wait for, also after they were enqueued.",
  },
  deepep_event_record: {
    args: [["event", "u64"], ["args", "deepep_event_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Records the present work of a stream; on one that is captured, what was captured on it so far, for what else is captured with it. No replay records it.",
  },
  deepep_event_wait: {
    args: [["event", "u64"], ["args", "deepep_event_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Makes a stream wait for what the event has recorded. INVALID_ARGUMENT when that was captured and the stream is not part of the same capture. A captured stream has every replay wait for what was recorded outside of the capture, unless that has ended by now.",
  },
  deepep_event_query: {
    args: [["event", "u64"], ["args", "deepep_event_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Says whether the recorded work has ended, and how.",
  },
  deepep_event_notify: {
    args: [["event", "u64"], ["args", "deepep_event_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Queues a completion, with the operation's status, once the recorded work has ended.",
  },
  deepep_event_destroy: {
    args: [["event", "u64"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Frees an event; pending work keeps what it needs.",
  },
  deepep_event_elapsed: {
    args: [["event", "u64"], ["args", "deepep_event_elapsed_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Time between the recorded points of two events, both of which must have been reached. Events of deepep_event_record and deepep_graph_launch keep the time, unless that was captured; those of operations do not. Never blocks.",
  },
  deepep_graph_begin: {
    args: [["buffer", "u64"], ["args", "deepep_graph_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "From now on operations on `stream` are recorded instead of run. They must be given no completion ids, and dispatches NO_CPU_SYNC; slots that they take are held until released, and every replay fills them anew. UNSUPPORTED without FEATURE_GRAPHS.",
  },
  deepep_graph_end: {
    args: [["buffer", "u64"], ["args", "deepep_graph_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Ends the recording and makes the graph; after a call that failed in it there is none, and the stream is usable again.",
  },
  deepep_graph_launch: {
    args: [["graph", "u64"], ["args", "deepep_graph_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Enqueues a replay, in the order of the buffer's other operations. Every rank replays the same calls in the same order; routing and rows are read from the captured addresses, so they may change between replays.",
  },
  deepep_graph_destroy: {
    args: [["graph", "u64"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Frees a graph, after the replays that were enqueued.",
  },
  deepep_get_dispatch_layout: {
    args: [["buffer", "u64"], ["args", "deepep_dispatch_layout_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Enqueues the counting of a routing. Not collective. Graph-safe.",
  },
  deepep_handle_create: {
    args: [["buffer", "u64"], ["args", "deepep_handle_create_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Makes an empty handle: it keeps where every token of a dispatch went, for combine and for cached dispatch.",
  },
  deepep_handle_destroy: {
    args: [["handle", "u64"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Frees a handle; operations already enqueued keep what they need.",
  },
  deepep_dispatch: {
    args: [["buffer", "u64"], ["args", "deepep_dispatch_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Enqueues a dispatch: counts, then each row straight to its final place on every destination rank. Collective. Graph-safe with NO_CPU_SYNC.",
  },
  deepep_combine: {
    args: [["buffer", "u64"], ["args", "deepep_combine_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Enqueues a combine: out = bias_0 + bias_1 + the token's rows, in f32, rows in ascending rank (rank layout) or top-k order (expert layout), each product and sum rounded to f32, the end to bf16. Collective. Graph-safe.",
  },
  deepep_low_latency_dispatch: {
    args: [["buffer", "u64"], ["args", "deepep_low_latency_dispatch_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Enqueues a low-latency dispatch into the masked expert-major layout. Collective. Graph-safe.",
  },
  deepep_low_latency_dispatch_receive: {
    args: [["buffer", "u64"], ["args", "deepep_receive_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Enqueues the receive half after a dispatch with RECEIVE_HOOK.",
  },
  deepep_low_latency_combine: {
    args: [["buffer", "u64"], ["args", "deepep_low_latency_combine_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Enqueues a low-latency combine: out = sum of weight * row in top-k order, in f32, each product and sum rounded to f32, the end to bf16. Collective. Graph-safe.",
  },
  deepep_low_latency_combine_receive: {
    args: [["buffer", "u64"], ["args", "deepep_receive_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Enqueues the receive half after a combine with RECEIVE_HOOK.",
  },
  deepep_expert_output: {
    args: [["buffer", "u64"], ["args", "deepep_expert_output_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "The expert-output region of a held slot. `stream` waits until every peer has read what was there before.",
  },
  deepep_barrier: {
    args: [["buffer", "u64"], ["args", "deepep_barrier_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "Enqueues a barrier of all unmasked ranks. Collective. Graph-safe.",
  },
  deepep_refuse: {
    args: [["buffer", "u64"], ["args", "deepep_refuse_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Enqueues this rank's refusal of a collective call. A call that was rejected at the border was not made: its peers wait for it. Repair and repeat it, or refuse it: then it counts as made, and fails with ABORTED, naming this rank, on every other. Collective, in the place of the call.",
  },
  deepep_get_status: {
    args: [["buffer", "u64"], ["args", "deepep_status_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc:
      "Writes the record of a failed operation into `error` and returns its code; DEEPEP_OK when there is none. A record names the `op` that failed, the error of a refused call none. The last 64 failures are kept.",
  },
  deepep_inject: {
    args: [["buffer", "u64"], ["args", "deepep_inject_args"], ["error", "deepep_error"]],
    ret: "i32",
    doc: "For tests: makes this rank late, silent or dead in a phase of its next operations.",
  },
} as const satisfies Record<string, FunctionSpec>;

/** Upper bounds that size arrays, in the header as DEEPEP_MAX_*. */
export const limits = {
  RANKS: [64, "ranks in a group: the width of a mask"],
  TOPK: [32, "experts a token"],
  SLOTS: [8, "results held at once"],
  EXPERTS: [4096, "experts in all"],
  TOKENS: [65536, "tokens a rank"],
  HIDDEN: [262144, "channels a token"],
  ROW_BYTES: [1048576, "bytes of a payload row, and of a row of scales"],
  RECV_TOKENS: [2147483647, "rows a slot holds: rows are numbered by int32"],
} as const satisfies Record<string, readonly [number, string]>;
