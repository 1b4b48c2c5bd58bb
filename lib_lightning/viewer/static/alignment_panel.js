// Events against the steepest change of a scalar: marks along the time axis, and how long before or after it they come.

import {h, s, setOptions} from "./dom.js";
import {CHART} from "./chart.js";
import {integer} from "./text.js";
import {eventColor, ink} from "./palette.js";
import {alignEvents, offsetText} from "./alignment.js";
import {changeText, steepestChange} from "./steepest.js";
import {scalarNames} from "./scalar_tracks.js";

// Values of the options: metrics of graphs may be called as scalars are.
const METRIC = "metric:";

/** The choice of a scalar, its steepest change in each run shown, and the offsets of events from it. */
export class AlignmentPanel {
  constructor(actions) {
    this.found = new WeakMap();
    this.select = h("select", {
      "data-role": "aligned",
      "aria-label": "scalar to align events with",
      onchange: () => actions.set({aligned: this.select.value}),
    });
    this.marks = s("svg", {class: "lib-chart lib-steepest", "aria-hidden": "true", "data-role": "steepest"});
    this.changes = h("ul", {class: "lib-changes", "data-role": "changes"});
    this.offsets = h("ul", {class: "lib-offsets", "data-role": "offsets"});
    this.element = h(
      "div",
      {class: "lib-aligned"},
      h("h3", {}, "Events before and after the steepest change of"),
      this.select,
      this.changes,
      this.offsets,
    );
  }

  /** Draw the marks and the list; `aligned` is the chosen option, null for the first of the scalars in charts. */
  draw(runs, time, aligned, charts) {
    const names = scalarNames(runs);
    const metrics = [
      ...new Set(runs.flatMap((run) => run.history.snapshots.flatMap((one) => Object.keys(one.metrics ?? {})))),
    ].sort();
    const options = [
      ["", "nothing"],
      ...names.map((name) => [name, name]),
      ...metrics.map((name) => [METRIC + name, name]),
    ];
    const first = charts.find(({name}) => names.includes(name))?.name ?? "";
    const chosen = options.some(([value]) => value === (aligned ?? first)) ? (aligned ?? first) : "";
    setOptions(this.select, options, chosen);
    const found = chosen === "" ? [] : runs.map((run) => ({...run, change: this.#changeOf(run, chosen, time.log)}));
    this.#drawMarks(found, time);
    const name = chosen.startsWith(METRIC) ? chosen.slice(METRIC.length) : chosen;
    this.changes.replaceChildren(
      ...found.map((run) =>
        h(
          "li",
          {},
          h("span", {class: "lib-line-swatch", style: {background: ink(run.color)}}),
          h("span", {}, `${runs.length > 1 ? `${run.title}: ` : ""}${name} ${changeText(run.change, integer)}`),
        ),
      ),
    );
    const offsets = alignEvents(
      found.map(({change, history: {run}}) => ({change, events: [...(run.events ?? []), ...(run.lifetimes ?? [])]})),
    );
    this.offsets.replaceChildren(
      ...offsets.map((one) =>
        h(
          "li",
          {"data-kind": one.kind},
          h("span", {class: "lib-swatch", style: {background: ink(eventColor(one.kind.replace("metric ", "")))}}),
          h("span", {}, h("b", {}, one.kind), ` ${offsetText(one)}`),
        ),
      ),
    );
  }

  /** The steepest change of a scalar in a run, kept as long as the run's data are the same. */
  #changeOf({history}, chosen, log) {
    if (!this.found.has(history)) this.found.set(history, new Map());
    const known = this.found.get(history);
    const key = `${log} ${chosen}`;
    if (!known.has(key)) {
      const line = chosen.startsWith(METRIC)
        ? metricLine(history, chosen.slice(METRIC.length))
        : (history.run.scalars?.[chosen] ?? null);
      known.set(key, line ? steepestChange(line.steps, line.values, {log}) : {reason: "was not logged"});
    }
    return known.get(key);
  }

  #drawMarks(runs, time) {
    const inside = (step) => Math.min(time.width - time.right, Math.max(CHART.left, time.x(step)));
    this.marks.setAttribute("width", time.width);
    this.marks.replaceChildren(
      ...runs
        .filter(({change}) => !change.reason)
        .flatMap(({name, color, change}) => {
          const [x, from, to] = [change.step, change.first, change.last].map(inside);
          const width = Math.max(1, to - from);
          return [
            s("rect", {x: from, y: 0, width, height: "100%", fill: ink(color), opacity: 0.12, "data-run": name}),
            s("line", {
              x1: x,
              x2: x,
              y1: 0,
              y2: "100%",
              stroke: ink(color),
              "stroke-width": 1.4,
              "stroke-dasharray": "5 3",
              "data-step": change.step,
            }),
          ];
        }),
    );
  }
}

function metricLine(history, name) {
  const values = history.snapshots.map((snapshot) => snapshot.metrics?.[name]?.value ?? null);
  return {steps: history.steps, values};
}
