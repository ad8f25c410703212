/**
 * What a suite runs over, and the one way to leave one out.
 *
 * In: a name and, where the suite cannot run, why not. Out: its tests; or one skipped test whose name says what is missing,
 * since a skipped `describe` shows nowhere under Bun. Called by the files of cases.
 */
import process from "node:process";
import { describe, test } from "node:test";
import type { DriverBackend } from "./drivers.ts";

/** What a suite of buffer tests runs over. */
export interface BackendSubject {
  /** Begins the names of the tests. */
  readonly name: string;
  readonly backend: DriverBackend;
  /** Why nothing can run here. */
  readonly skip?: string | false;
  /** Why low-latency mode cannot run here. */
  readonly skipLowLatency?: string | false;
}

/** Tests under one name, or one skipped test that says why. */
export function suite(name: string, skip: string | false | undefined, body: () => void): void {
  if (skip) test(`${name} (skipped: ${skip})`, { skip }, () => {});
  else describe(name, body);
}

/** How often to replay a graph: DEEPEP_TEST_REPLAYS at most, where it is set. */
export function replayCount(usual: number): number {
  return Math.min(usual, Number(process.env["DEEPEP_TEST_REPLAYS"] || usual));
}

/** How many random worlds or programs to draw: DEEPEP_TEST_RANDOM when it is set. */
export function randomCount(usual: number): number {
  const text = process.env["DEEPEP_TEST_RANDOM"];
  return text === undefined || text === "" ? usual : Number(text);
}
