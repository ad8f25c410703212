/**
 * A registry like jsr.io on this machine, with this package as its only one.
 *
 * In: the working tree, by `publish.include` of deno.json. Out: a server to point JSR_URL at, the paths that were asked
 * for, and `tamper`, which changes what the native libraries are served as.
 */

import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync, statSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { root } from "./compile.ts";

/** What deno.json says about the package. */
export const config = JSON.parse(readFileSync(join(root, "deno.json"), "utf8")) as {
  name: string;
  version: string;
  exports: Record<string, string>;
  publish: { include: string[] };
};

/** The files of the package, as paths from its root that begin with `/`. */
export function packageFiles(): string[] {
  const walk = (path: string): string[] =>
    statSync(join(root, path)).isDirectory()
      ? readdirSync(join(root, path)).flatMap((name) => walk(`${path}/${name}`))
      : [`/${path}`];
  return config.publish.include.filter((path) => existsSync(join(root, path))).flatMap(walk);
}

/** A running registry. */
export interface JsrMock extends AsyncDisposable {
  /** For JSR_URL. */
  readonly url: string;
  /** Host and port, for --allow-net. */
  readonly host: string;
  /** Paths asked for so far. */
  readonly requests: string[];
  /** Serve other bytes than the package's as native libraries. */
  tamper: boolean;
}

/** Starts a registry. */
export async function startJsr(): Promise<JsrMock> {
  const files = new Map(packageFiles().map((path) => [path, readFileSync(join(root, path))]));
  const base = `/${config.name}`;
  const manifest = Object.fromEntries([...files].map(([path, bytes]) => [path, {
    size: bytes.length,
    checksum: `sha256-${createHash("sha256").update(bytes).digest("hex")}`,
  }]));
  const documents = new Map([
    [`${base}/meta.json`, { scope: "deepep", name: "deepep", versions: { [config.version]: {} } }],
    [`${base}/${config.version}_meta.json`, { manifest, exports: config.exports }],
  ]);
  const server = createServer((request, response) => {
    const path = new URL(request.url ?? "/", "http://localhost").pathname;
    mock.requests.push(path);
    const document = documents.get(path);
    const file = files.get(path.replace(`${base}/${config.version}`, ""));
    if (document) {
      response.writeHead(200, { "content-type": "application/json" }).end(JSON.stringify(document));
    } else if (file) {
      const type = path.endsWith(".ts") ? "text/typescript" : "application/octet-stream";
      response.writeHead(200, { "content-type": type }).end(mock.tamper && path.endsWith(".so") ? "tampered" : file);
    } else {
      response.writeHead(404).end();
    }
  });
  await new Promise<void>((resolve) => void server.listen(0, "127.0.0.1", resolve));
  const host = `127.0.0.1:${(server.address() as AddressInfo).port}`;
  const mock: JsrMock = {
    url: `http://${host}/`,
    host,
    requests: [],
    tamper: false,
    [Symbol.asyncDispose]: () =>
      new Promise<void>((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      }),
  };
  return mock;
}
