/**
 * What a capture does before anything reaches a GPU: which calls it makes of the library, with which ids, flags and slots,
 * and that it always ends. In: a library that only notes its calls. That replays are right is shown by cuda_graph_test.ts.
 */
import { test } from "node:test";
import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import { EpError } from "@deepep/deepep";
import { dispatch } from "../lib/dispatch.ts";
import { constants } from "../lib/ffi/abi.ts";
import { capture } from "../lib/graph.ts";
import { fakeWorld } from "./support/fake_device.ts";

const { FLAG } = constants;

test("captured operations have no ids, name a free slot, and take their shapes from the capacity", () => {
  const { device, core, x, topkIdx } = fakeWorld();
  const graph = capture(core, core.stream, (operations) => {
    const recv = operations.dispatch(x, { topkIdx });
    return { recv, out: operations.combine(recv.x, recv.handle) };
  });
  const [dispatch] = device.of("deepep_dispatch"), [combine] = device.of("deepep_combine");
  assertEquals([dispatch!.args.done_id, dispatch!.args.counts_id, combine!.args.done_id], [0n, 0n, 0n]);
  assertEquals([dispatch!.args.stream, combine!.args.stream], [core.stream.address, core.stream.address]);
  assert(Number(dispatch!.args.flags) & FLAG.NO_CPU_SYNC[0]);
  assertEquals(dispatch!.args.slot, 1);
  assertEquals(graph.results.recv.x.shape, [8, 16]);
  const names = device.calls.map((call) => call.name).filter((name) => /graph|dispatch$|combine/.test(name));
  assertEquals(names, ["deepep_graph_begin", "deepep_dispatch", "deepep_combine", "deepep_graph_end"]);
});

test("a launch completes with an id, on the captured stream unless told otherwise", async () => {
  const { device, core, x, topkIdx } = fakeWorld();
  const graph = capture(core, core.stream, (operations) => operations.dispatch(x, { topkIdx }));
  await graph.launch();
  const other = core.createStream();
  await graph.launch({ stream: other });
  const launches = device.of("deepep_graph_launch");
  assertEquals(launches.map(({ args }) => args.stream), [core.stream.address, other.address]);
  assert(launches.every(({ args }) => args.done_id !== 0n));
  graph.release();
  graph.release();
  assertEquals(device.of("deepep_graph_destroy").length, 1);
  assertEquals(assertThrows(() => graph.launch(), EpError).code, "closed");
});

test("a graph is not launched over memory that was given back, and keeps the routing it needs", async () => {
  const { device, core, x, topkIdx } = fakeWorld();
  using graph = capture(core, core.stream, (operations) => operations.dispatch(x, { topkIdx }));
  topkIdx.release();
  assertThrows(() => graph.launch(), EpError, "given back by tensor.release()");
  graph.results.release();
  const handles = () => device.of("deepep_dispatch").map(({ args }) => args.handle);
  using y = core.alloc("bf16", [4, 16]), routing = core.alloc("i32", [4, 2]);
  (await dispatch(core, y, { topkIdx: routing, cpuSync: false })).release();
  assertEquals(new Set(handles()).size, 2);
  graph.release();
  (await dispatch(core, y, { topkIdx: routing, cpuSync: false })).release();
  assertEquals(new Set(handles()).size, 2);
  assertEquals(device.of("deepep_handle_destroy").length, 0);
});

test("a slot that is released in a capture goes to its later calls, then stays with the graph", () => {
  const { device, core, x, topkIdx } = fakeWorld();
  const graph = capture(core, core.stream, (operations) => {
    for (let i = 0; i < 3; i++) operations.dispatch(x, { topkIdx }).release();
  });
  assertEquals(device.of("deepep_dispatch").map(({ args }) => args.slot), [1, 1, 1]);
  const releases = () => device.of("deepep_slot_release").map(({ args }) => [args.slot, args.stream]);
  assertEquals(releases(), new Array(3).fill([1, core.stream.address]));
  graph.launch();
  assertThrows(() => (core.wantSlot("look"), core.holdSlot(0, "look"), core.wantSlot("look")), EpError, "graph #");
  graph.release();
  assertEquals(releases().length, 4);
});

test("a capture that fails ends, releases what it made, and tells no peer", () => {
  const { device, core, x, topkIdx } = fakeWorld();
  const failing: [RegExp, (() => unknown)][] = [
    [/my own/, () => {
      throw new Error("my own");
    }],
    [/deepep_combine is refused/, () => device.refuse = "deepep_combine"],
  ];
  const handles: unknown[] = [];
  for (const [message, fail] of failing) {
    device.calls.length = 0;
    const error = assertThrows(() =>
      capture(core, core.stream, (operations) => {
        const recv = operations.dispatch(x, { topkIdx });
        fail();
        operations.combine(recv.x, recv.handle);
      })
    );
    assert(message.test(error.message), error.message);
    device.refuse = "";
    const count = (name: string) => device.of(name).length;
    assertEquals([count("deepep_graph_begin"), count("deepep_graph_end"), count("deepep_graph_destroy")], [1, 1, 1]);
    assertEquals([count("deepep_slot_release"), count("deepep_refuse")], [1, 0]);
    assertEquals(new Set(device.of("deepep_dispatch").map(({ args }) => args.handle)).size, 1);
    handles.push(device.of("deepep_dispatch")[0]!.args.handle);
    assertEquals(core.captured, undefined);
  }
  assertEquals(handles[1], handles[0]); // that of the first was given back
  device.refuse = "deepep_graph_end";
  assertThrows(
    () => capture(core, core.stream, (operations) => operations.dispatch(x, { topkIdx })),
    EpError,
    "refused",
  );
  assertEquals([core.captured, core.graphs.size], [undefined, 0]);
});

test("what a replay could not repeat is refused", async () => {
  const { core, x, topkIdx } = fakeWorld();
  const refused = (record: Parameters<typeof capture>[2], message: string) =>
    assertThrows(() => capture(core, core.stream, record), Error, message);
  refused(
    (operations) => operations.dispatch(x, { topkIdx, cpuSync: true } as never),
    "dispatch with cpuSync in a capture",
  );
  refused(() => x.write(new Uint16Array(64)), "write a tensor in a capture");
  refused(() => capture(core, core.stream, () => 0), "capture a graph in a capture");
  refused(() => Promise.resolve(), "the function is asynchronous");
  refused((operations) => {
    const recv = operations.dispatch(x, { topkIdx });
    recv.handle.keep();
    recv.release();
    operations.combine(recv.x, recv.handle);
  }, "given back");
  refused(
    (operations) => [operations.dispatch(x, { topkIdx }), operations.dispatch(x, { topkIdx })],
    "no slot was free",
  );
  let late: (() => unknown) | undefined;
  using graph = capture(core, core.stream, (operations) => {
    late = () => operations.dispatch(x, { topkIdx });
    return operations.barrier();
  });
  assertThrows(() => late!(), EpError, "the capture has ended");
  await assertRejects(async () => await graph.results, EpError, "await what graph.launch() returns");
});

test("memory that is given back in a capture goes in the order of its stream, for which nothing outside can wait", () => {
  const { device, core, x } = fakeWorld();
  core.barrier({ asyncFinish: true });
  const address = x.address;
  using _graph = capture(core, core.stream, (operations) => {
    x.release();
    return operations.barrier();
  });
  assertEquals(device.of("deepep_free").map(({ args }) => [args.address, args.stream]), [[
    address,
    core.stream.address,
  ]]);
  assertEquals(device.of("deepep_event_wait").length, 0);
});

test("closing a buffer destroys its graphs first", async () => {
  const { device, core } = fakeWorld();
  capture(core, core.stream, (operations) => void operations.barrier());
  await core.close();
  const ends = device.calls.map((call) => call.name).filter((name) => /destroy/.test(name));
  assertEquals(ends, ["deepep_graph_destroy", "deepep_buffer_destroy"]);
});
