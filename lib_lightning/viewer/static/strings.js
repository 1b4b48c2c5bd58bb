// Texts of the view: the current step, and the state without snapshots.

import {h} from "./dom.js";
import {integer} from "./text.js";

/** Instructions for when there are no snapshots yet. */
export function emptyState(live) {
  return [
    h("h2", {}, "No snapshots yet"),
    h("p", {}, "Add ", h("code", {}, "LIBCallback"), " to a trainer whose log directory is below this one:"),
    h("pre", {}, "from lib_lightning import LIBCallback\n\ntrainer = Trainer(callbacks=[LIBCallback()])"),
    h("p", {}, live ? "Snapshots appear here as they are written." : "Then export this page again."),
  ];
}

/** Description of the current step. `shown` are the panels with the index `k` of their snapshots. */
export function stepText(step, index, count, shown) {
  // The epoch is shown for a single run only, since it may differ between runs.
  const only = shown.length === 1 && shown[0].k >= 0 ? shown[0] : null;
  const epoch = only?.panel.history.snapshots[only.k].epoch;
  return [
    `step ${integer(step)}`,
    epoch === undefined || epoch === null ? null : `epoch ${integer(epoch)}`,
    `snapshot ${integer(index + 1)} of ${integer(count)}`,
  ]
    .filter(Boolean)
    .join(" · ");
}
