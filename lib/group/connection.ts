/**
 * One socket between rank 0 and another rank: frames in, frames out, one end.
 *
 * In: a socket, what to send. Out: `onFrame` for each frame, `onEnd` once when the other side is gone, saying how.
 * Frames wait in a queue and are sealed as the socket takes them, so a slow peer costs references, not copies.
 */
import { Buffer } from "node:buffer";
import type { Socket } from "node:net";
import { clearTimeout, setTimeout } from "node:timers";
import { type Frame, FrameReader, FrameType, FrameWriter, type SessionKeys, WireError } from "./wire.ts";

/** How long a good-bye may take before the socket is cut, milliseconds. */
const GOODBYE_MS = 2000;
/** How an {@linkcode End} begins when this side ended the connection, because the other one broke the protocol. */
export const CUT_OFF = "was cut off: ";
/** Frames up to this size are written in one piece. */
const ONE_PIECE_BYTES = 1 << 16;

/** How a peer went. */
export interface End {
  /** It said good-bye. */
  orderly: boolean;
  /** As in "has left the group": to follow a name. */
  how: string;
}

/** A connection. Set `onFrame` and `onEnd` before the event loop turns. */
export class Connection {
  /** Called for each frame. What it throws ends the connection. */
  onFrame: (frame: Frame) => void = () => {};
  /** Called once, unless this side ended the connection. */
  onEnd: (end: End) => void = () => {};
  /** The other side's address, for people. */
  readonly address: string;
  readonly #socket: Socket;
  readonly #writer: FrameWriter;
  readonly #reader: FrameReader;
  readonly #queue: { type: FrameType; chunks: readonly Uint8Array[] }[] = [];
  readonly #closed: Promise<void>;
  #blocked = false;
  #ending = false;
  #over = false;

  /** `host` is true on rank 0. */
  constructor(socket: Socket, host: boolean) {
    this.#socket = socket;
    this.#writer = new FrameWriter(host);
    this.#reader = new FrameReader(!host);
    this.address = `${socket.remoteAddress}:${socket.remotePort}`;
    socket.setNoDelay(true);
    socket.setKeepAlive(true, 10_000);
    socket.on("data", (bytes) => this.#receive(bytes as Uint8Array));
    socket.on("drain", () => {
      this.#blocked = false;
      this.#pump();
    });
    socket.on("error", (error: NodeJS.ErrnoException) => this.#lose(`has ended (${error.code ?? error.message})`));
    socket.on("end", () => this.#lose("has ended (its connection closed)"));
    this.#closed = new Promise((resolve) => {
      socket.on("close", () => {
        this.#lose("has ended (its connection closed)");
        resolve();
      });
    });
  }

  /** Both directions are sealed from now on. */
  seal(keys: SessionKeys): void {
    this.#writer.seal(keys);
    this.#reader.unseal(keys);
  }

  /** Queues a frame. The chunks must not change afterwards. Nothing happens on a connection that is over. */
  send(type: FrameType, chunks: readonly Uint8Array[] = []): void {
    if (this.#over || this.#ending) return;
    this.#queue.push({ type, chunks });
    this.#pump();
  }

  /** Sends what is queued and a last frame, then waits for the other side to close too, for two seconds at most. */
  async end(type: FrameType = FrameType.goodbye, chunks: readonly Uint8Array[] = []): Promise<void> {
    this.send(type, chunks);
    this.#ending = true;
    this.#pump();
    const timer = setTimeout(() => this.#socket.destroy(), GOODBYE_MS);
    if (this.#over) this.#socket.destroy();
    await this.#closed;
    clearTimeout(timer);
  }

  /** Cuts the connection. `onEnd` is not called. */
  destroy(): void {
    this.#over = true;
    this.#socket.destroy();
  }

  /** The socket no longer keeps the process alive. */
  unref(): void {
    this.#socket.unref();
  }

  #pump(): void {
    while (!this.#blocked && !this.#over && this.#queue.length > 0) {
      const { type, chunks } = this.#queue.shift()!;
      const pieces = this.#writer.frame(type, chunks);
      const bytes = pieces.reduce((sum, piece) => sum + piece.length, 0);
      for (const piece of bytes <= ONE_PIECE_BYTES ? [Buffer.concat(pieces)] : pieces) {
        if (!this.#socket.write(piece)) this.#blocked = true;
      }
    }
    if (this.#ending && this.#queue.length === 0 && !this.#socket.writableEnded) this.#socket.end();
  }

  #receive(bytes: Uint8Array): void {
    if (this.#over || this.#ending) return; // what is still under way no longer matters
    try {
      this.#reader.push(bytes);
      for (let frame; !this.#over && !this.#ending && (frame = this.#reader.next());) {
        if (frame.type === FrameType.goodbye) this.#lose("has left the group", true);
        else this.onFrame(frame);
      }
    } catch (error) {
      if (!(error instanceof WireError)) throw error;
      this.#lose(`${CUT_OFF}${error.message}`);
      this.#socket.destroy();
    }
  }

  #lose(how: string, orderly = false): void {
    if (this.#over) return;
    this.#over = true;
    this.#queue.length = 0;
    if (!this.#ending) this.onEnd({ orderly, how });
  }
}
