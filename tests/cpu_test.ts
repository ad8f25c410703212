/**
 * The CPU backend, all ranks in one thread: every case of the suite against the reference, bit for bit.
 * `DEEPEP_LIBRARY_CPU` chooses another build of the library, as the gate does with the one it rebuilds.
 */
import {
  runCombineCases,
  runDispatchCases,
  runLowLatencyCases,
  runLowLatencySizes,
  runMostTokens,
  runSizes,
} from "./support/cases.ts";
import { localWorlds } from "./support/drivers.ts";

const subject = { name: "cpu", newWorld: localWorlds("cpu"), numRandom: 24 };
runDispatchCases(subject);
runCombineCases(subject);
runLowLatencyCases(subject);
runLowLatencySizes(subject);
runMostTokens(subject);
runSizes(subject);
