/**
 * A stand-in for the part of `jsr:@std/assert` that the tests use, for machines without the registry.
 *
 * In and out: the names, signatures and meanings of @std/assert, over node:assert. Bun and tsc find it by tsconfig.json's
 * `paths`, Deno by tests/support/import_map.json; plain `deno test` uses the real one, which keeps this one honest.
 */

import { deepStrictEqual } from "node:assert";

// deno-lint-ignore no-explicit-any
type ErrorClass<E extends Error> = abstract new (...args: any[]) => E;

/** What a failing assertion throws. */
export class AssertionError extends Error {
  override readonly name = "AssertionError";
}

function failure(what: string, msg?: string): AssertionError {
  return new AssertionError(msg ? `${what}: ${msg}` : what);
}

function show(value: unknown): string {
  if (typeof value === "bigint") return `${value}n`;
  return typeof value === "string" ? JSON.stringify(value) : String(value);
}

/** Fails always. */
export function fail(msg?: string): never {
  throw failure("Failed assertion", msg);
}

/** `expr` is truthy. */
export function assert(expr: unknown, msg = ""): asserts expr {
  if (!expr) throw new AssertionError(msg);
}

/** `expr` is falsy. */
export function assertFalse(expr: unknown, msg = ""): void {
  if (expr) throw new AssertionError(msg);
}

/** `actual` and `expected` have the same contents. */
export function assertEquals<T>(actual: T, expected: T, msg?: string): void {
  try {
    deepStrictEqual(actual, expected);
  } catch (error) {
    throw failure((error as Error).message, msg);
  }
}

/** `actual` and `expected` have different contents. */
export function assertNotEquals<T>(actual: T, expected: T, msg?: string): void {
  let equal = true;
  try {
    deepStrictEqual(actual, expected);
  } catch {
    equal = false;
  }
  if (equal) throw failure(`Expected something other than ${show(actual)}`, msg);
}

/** `actual` is `expected`. */
export function assertStrictEquals<T>(actual: unknown, expected: T, msg?: string): asserts actual is T {
  if (!Object.is(actual, expected)) throw failure(`Expected ${show(expected)}, got ${show(actual)}`, msg);
}

/** `actual` is neither null nor undefined. */
export function assertExists<T>(actual: T, msg?: string): asserts actual is NonNullable<T> {
  if (actual === null || actual === undefined) throw failure(`Expected a value, got ${show(actual)}`, msg);
}

/** `actual` is an instance of `type`. */
// deno-lint-ignore no-explicit-any
export function assertInstanceOf<T extends abstract new (...args: any[]) => any>(
  actual: unknown,
  type: T,
  msg = "",
): asserts actual is InstanceType<T> {
  if (!(actual instanceof type)) throw failure(`Expected an instance of ${type.name}, got ${show(actual)}`, msg);
}

/** `actual` contains `expected`. */
export function assertStringIncludes(actual: string, expected: string, msg?: string): void {
  if (!actual.includes(expected)) throw failure(`Expected ${show(actual)} to include ${show(expected)}`, msg);
}

/** `actual` matches `expected`. */
export function assertMatch(actual: string, expected: RegExp, msg?: string): void {
  if (!expected.test(actual)) throw failure(`Expected ${show(actual)} to match ${expected}`, msg);
}

/** `actual` is within `tolerance` of `expected`. */
export function assertAlmostEquals(actual: number, expected: number, tolerance = 1e-7, msg?: string): void {
  if (Object.is(actual, expected)) return;
  if (!(Math.abs(expected - actual) <= tolerance)) {
    throw failure(`Expected ${actual} to be within ${tolerance} of ${expected}`, msg);
  }
}

/** `actual` > `expected`. */
export function assertGreater<T>(actual: T, expected: T, msg?: string): void {
  if (!(actual > expected)) throw failure(`Expected ${show(actual)} > ${show(expected)}`, msg);
}

/** `actual` >= `expected`. */
export function assertGreaterOrEqual<T>(actual: T, expected: T, msg?: string): void {
  if (!(actual >= expected)) throw failure(`Expected ${show(actual)} >= ${show(expected)}`, msg);
}

/** `actual` < `expected`. */
export function assertLess<T>(actual: T, expected: T, msg?: string): void {
  if (!(actual < expected)) throw failure(`Expected ${show(actual)} < ${show(expected)}`, msg);
}

/** `actual` <= `expected`. */
export function assertLessOrEqual<T>(actual: T, expected: T, msg?: string): void {
  if (!(actual <= expected)) throw failure(`Expected ${show(actual)} <= ${show(expected)}`, msg);
}

/** `error` is an instance of `type` whose message includes `text`. */
export function assertIsError<E extends Error = Error>(
  error: unknown,
  type?: ErrorClass<E>,
  text?: string | RegExp,
  msg?: string,
): asserts error is E {
  if (!(error instanceof Error)) throw failure(`Expected an Error, got ${show(error)}`, msg);
  if (type && !(error instanceof type)) {
    throw failure(`Expected ${type.name}, got ${error.constructor.name}: ${error.message}`, msg);
  }
  if (text === undefined) return;
  if (!(typeof text === "string" ? error.message.includes(text) : text.test(error.message))) {
    throw failure(`Expected the message to include ${show(text)}, got ${show(error.message)}`, msg);
  }
}

/** `fn` throws; answers what. */
export function assertThrows<E extends Error = Error>(
  fn: () => unknown,
  type?: ErrorClass<E>,
  text?: string,
  msg?: string,
): E {
  try {
    fn();
  } catch (error) {
    assertIsError(error, type, text, msg);
    return error;
  }
  throw failure("Expected the function to throw", msg);
}

/** `fn` answers a promise that rejects; answers what with. */
export async function assertRejects<E extends Error = Error>(
  fn: () => PromiseLike<unknown>,
  type?: ErrorClass<E>,
  text?: string,
  msg?: string,
): Promise<E> {
  let promise: PromiseLike<unknown>;
  try {
    promise = fn();
  } catch (error) {
    throw failure(`The function threw when called: ${show(error)}`, msg);
  }
  try {
    await promise;
  } catch (error) {
    assertIsError(error, type, text, msg);
    return error;
  }
  throw failure("Expected the promise to reject", msg);
}
