/**
 * The runtime's own HTTP server: one function answers requests.
 *
 * In: a port, the function. Out: a server on 127.0.0.1. Called by serve.ts. Node's server, which both runtimes have too, is made of
 * more JavaScript, and all of it runs on the event loop whose delay is what matters here.
 */

/** A server that listens. */
export interface HttpServer {
  readonly url: string;
  /** Takes no more requests, and ends those that are not answered; idle connections do not hold it up. */
  stop(): Promise<void>;
}

/** Answers a request. */
export type Answer = (request: Request) => Promise<Response>;

// The part of each runtime's API in use.
interface BunServe {
  serve(options: { port: number; hostname: string; idleTimeout: number; fetch: Answer }): {
    readonly port: number;
    stop(closeActiveConnections: boolean): Promise<void>;
  };
}
interface DenoServe {
  serve(options: { port: number; hostname: string; signal: AbortSignal; onListen(): void }, answer: Answer): {
    readonly addr: { readonly port: number };
    readonly finished: Promise<void>;
  };
}

const hostname = "127.0.0.1";

/** Listens. @throws {Error} when the port is taken */
export function listen(port: number, answer: Answer): HttpServer {
  const { Bun, Deno } = globalThis as unknown as { Bun?: BunServe; Deno?: DenoServe };
  if (Bun) {
    const server = Bun.serve({ port, hostname, idleTimeout: 255, fetch: answer });
    return { url: `http://${hostname}:${server.port}`, stop: () => server.stop(true) };
  }
  const ends = new AbortController();
  const server = Deno!.serve({ port, hostname, signal: ends.signal, onListen() {} }, answer);
  return {
    url: `http://${hostname}:${server.addr.port}`,
    stop() {
      ends.abort();
      return server.finished;
    },
  };
}

/** A request that is longer than it may be. */
export class TooLong extends Error {}

/** The bytes of a request. @throws {TooLong} when they are more than `most`; what is beyond is not read */
export async function bodyOf(request: Request, most: number): Promise<Uint8Array<ArrayBuffer>> {
  const tooLong = () => new TooLong(`a request has at most ${most} bytes`),
    told = request.headers.get("content-length");
  if (Number(told) > most) throw tooLong();
  if (told !== null || request.body === null) return new Uint8Array(await request.arrayBuffer());
  const chunks: Uint8Array[] = [];
  let length = 0;
  for await (const chunk of request.body as unknown as AsyncIterable<Uint8Array>) {
    length += chunk.length;
    if (length > most) throw tooLong();
    chunks.push(chunk);
  }
  const body = new Uint8Array(length);
  let at = 0;
  for (const chunk of chunks) {
    body.set(chunk, at);
    at += chunk.length;
  }
  return body;
}
