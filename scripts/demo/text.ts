/**
 * A text file as tokens. In: a path. Out: its words and signs, each with the id that hashing gives it in a fixed
 * vocabulary. Called by `scripts/demo.ts`; every rank reads the same file and takes its own part.
 */
import { readFileSync } from "node:fs";
import { UsageError } from "./options.ts";

/** Ids that a token can have. */
export const VOCABULARY = 32768;

/** A tokenized text. */
export interface Text {
  readonly path: string;
  /** The tokens as written. */
  readonly words: readonly string[];
  /** i32 [words]: their ids, 0 … VOCABULARY - 1. */
  readonly ids: Int32Array;
}

/** Reads and tokenizes a file. @throws {UsageError} when it cannot be read or has no token */
export function readText(path: string): Text {
  let content: string;
  try {
    content = readFileSync(path, "utf8");
  } catch (error) {
    throw new UsageError(`--text: cannot read ${path}: ${(error as Error).message}`);
  }
  const words = tokenize(content);
  if (words.length === 0) throw new UsageError(`--text: ${path} has no words`);
  return { path, words, ids: Int32Array.from(words, tokenId) };
}

/** Words, numbers and single signs; white space only separates. */
export function tokenize(text: string): string[] {
  return text.match(/[\p{L}\p{M}\p{N}_]+|[^\s\p{L}\p{M}\p{N}_]/gu) ?? [];
}

/** FNV-1a of the UTF-16 code units, folded to the vocabulary. */
function tokenId(word: string): number {
  let hash = 0x811c9dc5;
  for (let i = 0; i < word.length; i++) hash = Math.imul(hash ^ word.charCodeAt(i), 0x01000193);
  return ((hash >>> 15) ^ hash) & (VOCABULARY - 1);
}

/** The tokens of rank `rank`: `count` from `first`. The text is cut to what fits and divided evenly. */
export function shareOf(
  rank: number,
  options: { ranks: number; tokens: number; length: number },
): { first: number; count: number } {
  const total = Math.min(options.length, options.ranks * options.tokens);
  const first = Math.floor(total * rank / options.ranks);
  return { first, count: Math.floor(total * (rank + 1) / options.ranks) - first };
}
