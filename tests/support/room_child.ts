/**
 * A program that dispatches on an emulated device where all blocks of a grid but the first begin later than a call waits, as when
 * other work fills the device. It prints what became of each number of tokens. Run by cuda_failure_test.ts.
 */
import { EpError } from "@deepep/deepep";
import { ranksOf } from "./ranks.ts";

/** One block sends 2 tokens alone; 10 are few, but for several; 64 are counted by all. */
const SIZES = [10, 2, 64, 2];

const outcomes = await ranksOf("cuda")(2, { maxTokensPerRank: 64, timeoutMs: 300 }, async (b) => {
  const all: string[] = [];
  for (const numTokens of SIZES) {
    using x = b.tensor("bf16", [numTokens, 16]);
    using topkIdx = b.tensor("i32", [numTokens, 2], Int32Array.from({ length: 2 * numTokens }, (_, i) => i % 2 * 4));
    try {
      using recv = await b.dispatch(x, { topkIdx });
      all.push(`${numTokens}: ${recv.numRows} rows`);
    } catch (error) {
      if (!(error instanceof EpError)) throw error;
      all.push(`${numTokens}: ${error.code}, ${error.message.replace(/\d+\.\d+ ms/, "T")}, failed: ${b.failed}`);
    }
  }
  return all.join("\n");
});
console.log(outcomes.join("\n"));
