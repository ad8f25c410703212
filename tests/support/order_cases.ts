/**
 * Order on the device: events that hold other streams up, operations that begin after an event, slots that are used again
 * in stream order, foreign streams, and the time between events. In: a backend. Out: tests.
 *
 * World: 2 ranks, 8 experts; every token goes to experts 0 and 4, one on each rank, so both receive all tokens. Rows are
 * filled with one number; what is late is made so by a delay in some phase.
 */
import { test } from "node:test";
import { assert, assertEquals, assertThrows } from "@std/assert";
import { bf16FromF32, EpBuffer, EpError, Group, type OperationOptions, Stream } from "@deepep/deepep";
import { constants } from "../../lib/ffi/abi.ts";
import { struct } from "../../lib/ffi/struct.ts";
import { inject, ranksOf, tiny } from "./ranks.ts";
import { type BackendSubject, suite } from "./suite.ts";

const eventStruct = struct("deepep_event_args");
const NUM_TOKENS = 4, HIDDEN = 16, NUM_RANKS = 2;
const bits = (value: number) => bf16FromF32(Float32Array.of(value))[0]!;
const filled = (value: number) => bf16FromF32(new Float32Array(NUM_TOKENS * HIDDEN).fill(value));
const rows = (b: EpBuffer, value: number) => b.tensor("bf16", [NUM_TOKENS, HIDDEN], filled(value));
const both = (b: EpBuffer) =>
  b.tensor("i32", [NUM_TOKENS, 2], Int32Array.from({ length: 2 * NUM_TOKENS }, (_, i) => i % 2 * 4));

/** The first element of every row. */
const heads = (x: Uint16Array): number[] => [...x].filter((_, i) => i % HIDDEN === 0);
/** What both ranks receive: rank 0's tokens, then rank 1's. */
const received = (first: number, second: number): number[] => [
  ...new Array(NUM_TOKENS).fill(bits(first)),
  ...new Array(NUM_TOKENS).fill(bits(second)),
];

/** A dispatch and combine with identity experts on any stream, checked. */
export async function layer(b: EpBuffer, options: OperationOptions = {}, value = b.rank + 1): Promise<void> {
  const at = options.stream && { stream: options.stream };
  using x = rows(b, 0), topkIdx = both(b);
  await b.record(); // the tensors are ready for any stream
  x.write(filled(value), at);
  using recv = await b.dispatch(x, { topkIdx, ...options });
  using out = await b.combine(recv.x, recv.handle, options);
  const ranks = b.numRanks === 1 ? 1 : 2;
  assertEquals(heads(await out.x.read(at)), new Array(NUM_TOKENS).fill(bits(ranks * value)));
}

/** Registers the cases. */
export function runOrderCases({ name, backend, skip }: BackendSubject): void {
  const ranks = ranksOf(backend);
  suite(`${name}: order`, skip, () => {
    test("another stream waits for an operation by its event", async () => {
      await ranks(NUM_RANKS, {}, async (b) => {
        using x = rows(b, b.rank + 1), topkIdx = both(b), copy = b.tensor("bf16", [NUM_RANKS * NUM_TOKENS, HIDDEN]);
        const other = b.createStream();
        for (let round = 0; round < 8; round++) {
          if (b.rank === round % 2) inject(b, "DISPATCH", round % 4 < 2 ? "SEND" : "NOTIFY", "DELAY", 20_000);
          x.write(filled(10 * round + b.rank));
          using recv = await b.dispatch(x, { topkIdx, cpuSync: false, asyncFinish: true });
          recv.event.wait(other);
          b.copy(copy, recv.x.slice(0, NUM_RANKS * NUM_TOKENS), { stream: other });
          assertEquals(heads(await copy.read({ stream: other })), received(10 * round, 10 * round + 1));
        }
        await b.destroyStream(other);
      });
    });

    test("each call reads what the one before has written", async () => {
      const hidden = 4096, numLayers = 60;
      const all = (exponent: number) => new Uint16Array(NUM_TOKENS * hidden).fill(bits(2 ** exponent));
      await ranks(NUM_RANKS, { hidden }, async (b) => {
        const at = [b.tensor("bf16", [NUM_TOKENS, hidden], all(0)), b.tensor("bf16", [NUM_TOKENS, hidden])] as const;
        using topkIdx = both(b);
        for (let layer = 0; layer < numLayers; layer++) {
          using recv = await b.dispatch(at[layer % 2]!, { topkIdx, cpuSync: false });
          using _ = await b.combine(recv.x, recv.handle, { out: at[(layer + 1) % 2]! }); // the sum of two equal rows
        }
        assertEquals(await at[0].read(), all(numLayers));
        at.forEach((tensor) => tensor.release());
      });
    });

    test("what has ended is counted, and asking twice changes nothing", async () => {
      await ranks(NUM_RANKS, {}, async (b) => {
        using x = rows(b, 1), topkIdx = both(b);
        const counted = () => {
          const { dispatchWaitNs, combineWaitNs, ...counts } = b.stats();
          assertEquals([dispatchWaitNs.length, combineWaitNs.length], [NUM_RANKS, NUM_RANKS]);
          assertEquals([dispatchWaitNs[b.rank], combineWaitNs[b.rank]], [0n, 0n]);
          return Object.values(counts);
        };
        assertEquals(counted(), [0, 0, 0, 0, 0, 0]);
        for (let i = 1; i <= 2; i++) {
          using recv = await b.dispatch(x, { topkIdx });
          await recv.event;
          const sent = i * NUM_RANKS * NUM_TOKENS, before = (i - 1) * NUM_RANKS * NUM_TOKENS;
          for (const _ of "12") assertEquals(counted(), [i, i - 1, 0, sent, 2 * HIDDEN * sent, before]);
          using out = await b.combine(recv.x, recv.handle);
          await out.event;
          for (const _ of "12") assertEquals(counted(), [i, i, 0, sent, 2 * HIDDEN * sent, sent]);
        }
      });
    });

    test("an event that is asked for late marks the end of its own operation", async () => {
      const turn = Promise.withResolvers<void>();
      await ranks(NUM_RANKS, {}, async (b) => {
        const first = b.barrier({ asyncFinish: true });
        if (b.rank === 1) await turn.promise;
        const second = b.barrier({ asyncFinish: true });
        if (b.rank === 0) {
          const other = b.createStream();
          first.wait(other);
          await b.record(other);
          assertEquals([first.done, second.done], [true, false]); // rank 1 has not even called
          second.wait(other);
          const both = b.record(other);
          turn.resolve();
          await both;
          assertEquals(second.done, true);
          await b.destroyStream(other);
        }
        await second;
        first.wait(b.stream); // over since long
        await b.record();
      });
    });

    test("a stream that waits for two operations waits for the later one, in whichever order it was told", async () => {
      const turns = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
      await ranks(NUM_RANKS, {}, async (b) => {
        if (b.rank === 1) await turns[0]!.promise;
        const first = b.barrier({ asyncFinish: true });
        if (b.rank === 1) await turns[1]!.promise;
        const second = b.barrier({ asyncFinish: true });
        if (b.rank === 0) {
          const others = [[first, second], [second, first], [second], [first]].map((events) => {
            const other = b.createStream();
            for (const event of events) event.wait(other);
            return { other, point: b.record(other) };
          });
          turns[0]!.resolve();
          await first;
          await others[3]!.point;
          assertEquals(others.map(({ point }) => point.done), [false, false, false, true]); // rank 1 has called once
          turns[1]!.resolve();
          for (const { other, point } of others) {
            await point;
            await b.destroyStream(other);
          }
        }
        await second;
      });
    });

    test("a wait for a buffer that was closed stands for none of a later buffer's", async () => {
      const world = () =>
        Promise.all(
          Group.local(NUM_RANKS).map((group) => EpBuffer.create(group, { ...tiny, backend, timeoutMs: 20_000 })),
        );
      const closed = (all: readonly EpBuffer[]) => Promise.all(all.map((b) => b.close()));
      const call = (b: EpBuffer) => b.barrier({ asyncFinish: true });
      for (let round = 0; round < 8; round++) {
        const [front, silent] = await world(), first = await world(), other = front!.createStream();
        for (let i = 0; i < 20; i++) await Promise.all(first.map((b) => b.barrier())); // its operations have high numbers
        const held = call(front!);
        held.wait(other); // the stream stands until `silent` calls
        const early = first.map(call);
        early[0]!.wait(other);
        await Promise.all(early);
        await closed(first);
        const later = await world(); // which may get the memory of the one before
        const late = call(later[0]!);
        late.wait(other);
        await silent!.barrier();
        await held;
        const point = front!.record(other);
        assertEquals([point.done, late.done], [false, false]); // its peer has not called
        await later[1]!.barrier();
        await point;
        await front!.destroyStream(other);
        await closed([front!, silent!, ...later]);
      }
    });

    test("a native event of an operation tells how it ended, made before or after", async () => {
      await ranks(1, {}, async (b) => {
        const query = (event: bigint) => {
          eventStruct.pack({});
          b.core.device.call("deepep_event_query", event, eventStruct, "event");
          return [eventStruct.get("done"), eventStruct.get("status")];
        };
        const endOf = (id: number) => b.core.endOf(id);
        const { INVALID_ARGUMENT, OK } = constants.ERROR;
        using x = rows(b, 1), bad = b.tensor("i32", [NUM_TOKENS, 2], new Int32Array(2 * NUM_TOKENS).fill(99));
        using good = b.tensor("i32", [NUM_TOKENS, 2], new Int32Array(2 * NUM_TOKENS));
        for (
          const [topkIdx, code] of [[bad, INVALID_ARGUMENT[0]], [good, OK[0]], [bad, INVALID_ARGUMENT[0]]] as const
        ) {
          inject(b, "DISPATCH", "NOTIFY", "DELAY", 2000);
          const id = b.core.device.nextId() + 1; // the next but one, which the call takes
          b.core.device.forget(id - 1);
          using recv = await b.dispatch(x, { topkIdx, cpuSync: false });
          const early = endOf(id);
          const outcome = await recv.event.then(() => "ended", (error) => (error as EpError).code);
          assertEquals(outcome, code === 0 ? "ended" : "invalidArgument");
          assertEquals([query(early), query(endOf(id))], [[1, code], [1, code]]);
        }
        assertEquals(query(endOf(0)), [1, 0]);
      });
    });

    test("an operation begins after previousEvent, not after its stream's work", async () => {
      await ranks(NUM_RANKS, {}, async (b) => {
        using x = rows(b, 0), topkIdx = both(b);
        const source = b.createStream();
        for (let round = 1; round < 6; round++) {
          inject(b, "BARRIER", "NOTIFY", "DELAY", 10_000);
          b.barrier({ asyncFinish: true }).wait(source);
          x.write(filled(round + 100 * b.rank), { stream: source });
          using recv = await b.dispatch(x, { topkIdx, previousEvent: b.record(source) });
          assertEquals(heads(await recv.x.read()), received(round, round + 100));
        }
        await b.destroyStream(source);
      });
    });

    test("a slot is used again only after the stream it was released on", async () => {
      await ranks(NUM_RANKS, { numSlots: 1 }, async (b) => {
        using topkIdx = both(b);
        const reader = b.createStream();
        for (let round = 1; round < 6; round++) {
          using x = rows(b, round), next = rows(b, 50);
          using kept = b.tensor("bf16", [NUM_RANKS * NUM_TOKENS, HIDDEN]);
          const first = await b.dispatch(x, { topkIdx });
          inject(b, "BARRIER", "NOTIFY", "DELAY", 5000);
          b.barrier().wait(reader);
          for (let i = 0; i < 50; i++) b.copy(kept, first.x, { stream: reader });
          first.release({ stream: reader });
          using second = await b.dispatch(next, { topkIdx, cpuSync: false });
          assertEquals(heads(await kept.read({ stream: reader })), received(round, round));
          await second.event;
        }
        await b.destroyStream(reader);
      });
    });

    test("a foreign stream's address does as well as a stream", async () => {
      await ranks(NUM_RANKS, {}, async (b) => {
        const own = b.createStream(), foreign = Stream.from(own.address);
        for (let round = 1; round < 4; round++) await layer(b, { stream: foreign }, round);
        await b.destroyStream(own);
      });
    });

    test("time between events", async () => {
      const turns = Array.from({ length: 3 }, () => Promise.withResolvers<void>());
      await ranks(NUM_RANKS, {}, async (b) => {
        for (const turn of turns) {
          if (b.rank === 1) await turn.promise;
          const before = b.record();
          inject(b, "BARRIER", "NOTIFY", "DELAY", 20_000);
          b.barrier();
          const after = b.record();
          if (b.rank === 0) assertThrows(() => after.elapsedSince(before), EpError); // rank 1 has not even called
          turn.resolve();
          await after;
          const elapsed = after.elapsedSince(before);
          assert(elapsed > 19 && elapsed < 5000, `${elapsed} ms`);
          assertEquals(before.elapsedSince(before), 0);
          const operation = b.barrier();
          await operation;
          assertThrows(() => operation.elapsedSince(before), EpError, "keeps no time");
          assertThrows(() => after.elapsedSince(operation), EpError, "keeps no time");
          const end = b.record();
          await end;
          assert(end.elapsedSince(before) >= elapsed);
        }
        assertThrows(() => b.record().elapsedSince({} as never), TypeError, "earlier is no event");
      });
    });
  });
}

/** Default streams of CUDA, which need no creation: one rank, since ranks of a process need a stream each. */
export async function onDefaultStreams(b: EpBuffer): Promise<void> {
  for (const address of [1n, 2n]) await layer(b, { stream: Stream.from(address) });
}
