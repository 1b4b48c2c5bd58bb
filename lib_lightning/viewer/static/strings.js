// What the view says in its head, and where there is nothing to see.

import {h} from "./dom.js";
import {integer} from "./text.js";

/** What to do when there is nothing to see yet. */
export function emptyState(live) {
  return [
    h("h2", {}, "No snapshots yet"),
    h("p", {}, "Add ", h("code", {}, "LIBCallback"), " to a trainer whose log directory is below this one:"),
    h("pre", {}, "from lib_lightning import LIBCallback\n\ntrainer = Trainer(callbacks=[LIBCallback()])"),
    h("p", {}, live ? "Snapshots appear here as they are written." : "Then make this page again."),
  ];
}

/** The step that is shown, one of `count`; `shown` are panels with the index `k` of their snapshots. */
export function stepText(step, index, count, shown) {
  // Several runs have epochs of their own.
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
