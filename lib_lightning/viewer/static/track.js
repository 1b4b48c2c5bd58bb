// One chart over training, with its title and the values at a step.

import {h} from "./dom.js";
import {chartKey, lineChart, wantsLog} from "./chart.js";
import {integer, number, withError} from "./text.js";
import {MUTED} from "./palette.js";

const HEIGHT = 118;

/** The last known value of a line at or before a step, as its index, -1 for none. */
export function indexAt(line, step) {
  let i = line.steps.length - 1;
  while (i >= 0 && (line.steps[i] > step || line.values[i] === null)) i -= 1;
  return i;
}

/** A chart with a title and the current values above it. */
export class Track {
  constructor(role, title, ...after) {
    this.key = h("span", {class: "lib-track-key"});
    this.head = h("div", {class: "lib-track-head"}, title, this.key, after);
    this.plot = h("div", {class: "lib-plot"});
    this.element = h("div", {class: "lib-track", "data-track": role}, this.head, this.plot);
    this.lines = [];
  }

  draw(lines, time, label, {log = wantsLog(lines), marks = [], overlays = []} = {}) {
    this.lines = lines;
    this.element.hidden = lines.length === 0;
    this.plot.replaceChildren(lineChart({series: lines, time, height: HEIGHT, log, marks, overlays, label}));
  }

  setText(content) {
    this.key.replaceChildren(content);
  }

  /** Show the last value of each line at or before a step; with `dated`, and when it was measured if that was earlier. */
  showValues(step, dated = false) {
    this.key.replaceChildren(
      ...chartKey(
        this.lines.map((line) => {
          const i = indexAt(line, step);
          const known = i < 0 ? "–" : line.errors ? withError(line.values[i], line.errors[i]) : number(line.values[i]);
          const isEarlier = dated && i >= 0 && line.steps[i + 1] <= step;
          const value = isEarlier ? `${known} at step ${integer(line.steps[i])}` : known;
          return {name: this.lines.length > 1 ? line.name : "", color: line.color ?? MUTED, value};
        }),
      ),
    );
  }
}
