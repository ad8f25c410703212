/**
 * A progress line for long phases. In: steps as they are done. Out: one line on standard error that overwrites itself, only
 * on a terminal and only when a phase takes long; and a turn for the event loop between steps. Called by whoever loops
 * over experts. All ranks of a process share one.
 */
import process from "node:process";
import { setImmediate } from "node:timers/promises";

const QUIET_MS = 400, REDRAW_MS = 80, TURN_MS = 15, BAR_CELLS = 24;

/** Says how far the present phase is. */
export class Progress {
  readonly #shown: boolean;
  #label = "";
  #total = 0;
  #done = 0;
  #begin = 0;
  #drawn = 0;
  #turn = performance.now();

  constructor(shown: boolean) {
    this.#shown = shown;
  }

  /** Begins a phase of `total` steps. Several ranks may say so; the last one counts, the steps of all are added. */
  begin(label: string, total: number): void {
    if (this.#label === label) {
      this.#total += total;
      return;
    }
    this.end();
    this.#label = label;
    this.#total = total;
    this.#done = 0;
    this.#begin = performance.now();
  }

  /** A step is done. Gives other ranks, and completions, a turn now and then. */
  async step(): Promise<void> {
    this.#done++;
    const now = performance.now();
    if (this.#shown && now - this.#begin > QUIET_MS && now - this.#drawn > REDRAW_MS) this.#draw(now);
    if (now - this.#turn < TURN_MS) return;
    await setImmediate();
    this.#turn = performance.now();
  }

  /** Ends the phase and takes its line away. */
  end(): void {
    if (this.#drawn > 0) process.stderr.write("\r\x1b[2K");
    this.#drawn = 0;
    this.#label = "";
  }

  #draw(now: number): void {
    this.#drawn = now;
    const share = Math.min(1, this.#done / this.#total), full = Math.round(share * BAR_CELLS);
    const bar = "━".repeat(full) + "·".repeat(BAR_CELLS - full);
    const left = (now - this.#begin) / 1000 * (1 / share - 1);
    process.stderr.write(
      `\r\x1b[2K  ${this.#label} ${bar} ${Math.floor(share * 100)} %, ${left < 1 ? "< 1" : Math.ceil(left)} s left`,
    );
  }
}
