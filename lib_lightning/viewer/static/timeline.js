// Charts over training below the graph: metrics, scalars, the followed lineage and events, on the same time axis.

import {h, setOptions} from "./dom.js";
import {CHART, chartKey, lineChart, isLogSpaced, timeScale, wantsLog} from "./chart.js";
import {integer, number, ordinal, withError} from "./text.js";
import {MUTED, VERMILION} from "./palette.js";
import {EventTrack} from "./events.js";

const HEIGHT = 118;
const FIRST_METRICS = ["effective_edges/total", "features/total"];

/** The charts. `actions.go(step)` moves to a step, `actions.follow(lineage)` follows a lineage. */
export class Timeline {
  constructor(state, actions) {
    this.actions = actions;
    this.state = state;
    this.metric = h("select", {
      "data-role": "metric",
      "aria-label": "metric",
      onchange: () => actions.set({metric: this.metric.value}),
    });
    this.scalar = h("select", {
      "data-role": "scalar",
      "aria-label": "scalar",
      onchange: () => actions.set({scalar: this.scalar.value}),
    });
    this.xscale = h("select", {
      "data-role": "xscale",
      "aria-label": "time axis",
      onchange: () => actions.set({xscale: this.xscale.value}),
    });
    setOptions(
      this.xscale,
      [
        ["auto", "automatic"],
        ["linear", "linear"],
        ["log", "logarithmic"],
      ],
      state.xscale,
    );
    this.tracks = {
      metric: new Track("metric", this.metric),
      scalar: new Track("scalar", this.scalar),
      lineage: new Track("lineage", h("strong", {class: "lib-followed-name"})),
    };
    this.unfollow = h(
      "button",
      {type: "button", class: "lib-small", onclick: () => actions.follow(null), title: "stop following this feature (Escape)"},
      "stop following",
    );
    this.tracks.lineage.head.append(this.unfollow);
    this.events = new EventTrack(actions);
    this.cursor = h("div", {class: "lib-cursor", "aria-hidden": "true"});
    this.column = h(
      "div",
      {class: "lib-tracks"},
      this.cursor,
      Object.values(this.tracks).map((track) => track.element),
      this.events.element,
    );
    this.element = h(
      "div",
      {class: "lib-timeline"},
      h(
        "div",
        {class: "lib-timeline-head"},
        h("h2", {}, "Over training"),
        h("label", {class: "lib-control"}, h("span", {class: "lib-name"}, "time axis"), this.xscale),
      ),
      h("div", {class: "lib-timeline-body"}, this.column, this.events.aside),
    );
    for (const {plot} of Object.values(this.tracks)) {
      plot.addEventListener("click", (event) => {
        actions.go(this.time.back(event.clientX - plot.getBoundingClientRect().left), true);
      });
    }
  }

  /** Redraw everything, after changes of the data, the choices or the width. */
  draw(runs) {
    this.runs = runs;
    const steps = runs.flatMap((run) => run.history.steps);
    const scalarSteps = runs.flatMap((run) =>
      Object.values(run.history.run.scalars ?? {}).flatMap((line) => line.steps),
    );
    const all = [...steps, ...scalarSteps].sort((a, b) => a - b);
    const log =
      this.state.xscale === "log" ||
      (this.state.xscale === "auto" && isLogSpaced(steps));
    // On a logarithmic axis, steps before the first snapshot would take most of the width.
    this.time = timeScale(
      (log ? Math.min(...steps) : all[0]) ?? 0,
      all[all.length - 1] ?? 1,
      Math.max(320, this.column.clientWidth),
      log,
    );
    this.#drawMetric();
    this.#drawScalar();
    this.#drawLineage();
    this.events.draw(runs, this.time);
    this.moveTo(this.state.step);
  }

  #drawMetric() {
    const names = [
      ...new Set(
        this.runs.flatMap((run) => run.history.snapshots.flatMap((snapshot) => Object.keys(snapshot.metrics ?? {}))),
      ),
    ].sort();
    const first = FIRST_METRICS.find((name) => names.includes(name)) ?? names[0];
    setOptions(
      this.metric,
      names.map((name) => [name, name]),
      this.state.metric ?? first,
    );
    const lines = this.runs
      .map(({name, color, history}) => {
        const found = history.snapshots.map((snapshot) => snapshot.metrics?.[this.metric.value] ?? null);
        const errors = found.some((metric) => metric?.error) ? found.map((metric) => metric?.error ?? 0) : undefined;
        return {
          name,
          color,
          steps: history.steps,
          values: found.map((metric) => metric?.value ?? null),
          errors,
          dots: true,
        };
      })
      .filter((line) => line.values.some((value) => value !== null));
    this.tracks.metric.draw(lines, this.time, `${this.metric.value} over steps`);
  }

  #drawScalar() {
    const names = [...new Set(this.runs.flatMap((run) => Object.keys(run.history.run.scalars ?? {})))].sort();
    const first = [/val.*loss|loss.*val/, /train.*loss|loss.*train/, /loss/, /./]
      .map((kind) => names.find((name) => kind.test(name)))
      .find(Boolean);
    setOptions(
      this.scalar,
      names.map((name) => [name, name]),
      this.state.scalar ?? first,
    );
    const lines = this.runs
      .filter((run) => run.history.run.scalars?.[this.scalar.value])
      .map(({name, color, history}) => ({name, color, ...history.run.scalars[this.scalar.value]}));
    // Baselines share the log directory of their run: draw identical scalars once.
    const distinct = lines.filter(
      (line, i) => lines.findIndex((other) => String(other.values) === String(line.values)) === i,
    );
    this.tracks.scalar.draw(distinct, this.time, `${this.scalar.value} over steps`);
  }

  #drawLineage() {
    const {follow} = this.state;
    const run = follow && this.runs.find((other) => other.name === follow.run);
    this.tracks.lineage.element.hidden = !run;
    if (!run) return;
    const {history} = run;
    const {l, id} = follow;
    const values = history.curve(l, id);
    const name = `${history.layers[l].name}/${id}`;
    this.tracks.lineage.head.querySelector("strong").textContent = `importance of ${name}`;
    const [born, last] = [history.first[l].get(id), history.last[l].get(id)];
    const marks = [];
    if (born > 0)
      marks.push({
        step: history.steps[born],
        value: values[born],
        kind: "birth",
        text: history.birth(l, id),
        color: VERMILION,
      });
    if (last < history.steps.length - 1) {
      marks.push({
        step: history.steps[last],
        value: values[last],
        kind: "death",
        color: VERMILION,
        text: `last seen at step ${integer(history.steps[last])}`,
      });
    }
    this.tracks.lineage.draw(
      [{name: "", color: VERMILION, steps: history.steps, values, dots: true}],
      this.time,
      `importance of ${name} over steps`,
      {log: true, marks: marks.filter((mark) => mark.value > 0)},
    );
  }

  /** Describe the followed lineage at snapshot k; `drawn` is whether its dot is in the picture. */
  describeFollowed(history, k, snapshot, drawn) {
    const {l, id} = this.state.follow;
    const i = history.featureOf(k, l, id);
    const label = history.run.labels?.[l]?.[id];
    const parts = [label, history.isTracked(k, l) ? history.birth(l, id) : "not tracked over training"];
    if (i < 0) {
      parts.push(
        k < history.first[l].get(id)
          ? "not yet present at this step"
          : k > history.last[l].get(id)
            ? `no longer present, last seen at step ${integer(history.steps[history.last[l].get(id)])}`
            : "not present at this step",
      );
    } else {
      const layer = snapshot.layers[l];
      parts.push(
        `importance ${withError(layer.importance[i], layer.error?.[i])}`,
        `${ordinal(history.rank(k, l, i))} of ${integer(layer.importance.length)}${drawn ? "" : ", not among the features shown"}`,
      );
    }
    this.tracks.lineage.setText(h("span", {"data-role": "follow-text"}, parts.filter(Boolean).join(" · ")));
  }

  /** Move the cursor, and show the values at a step. */
  moveTo(step) {
    if (!this.time) return;
    const x = Math.min(this.time.width - CHART.right, Math.max(CHART.left, this.time.x(step ?? 0)));
    this.cursor.style.transform = `translateX(${x}px)`;
    this.tracks.metric.showValues(step, true);
    this.tracks.scalar.showValues(step);
    this.events.moveTo(step);
  }
}

/** A chart with a title and the current values above it. */
class Track {
  constructor(role, title) {
    this.key = h("span", {class: "lib-track-key"});
    this.head = h("div", {class: "lib-track-head"}, title, this.key);
    this.plot = h("div", {class: "lib-plot"});
    this.element = h("div", {class: "lib-track", "data-track": role}, this.head, this.plot);
    this.lines = [];
  }

  draw(lines, time, label, {log = wantsLog(lines), marks = []} = {}) {
    this.lines = lines;
    this.element.hidden = lines.length === 0;
    this.plot.replaceChildren(lineChart({series: lines, time, height: HEIGHT, log, marks, label}));
  }

  setText(content) {
    this.key.replaceChildren(content);
  }

  /** Show the last value of each line at or before a step; with `dated`, and when it was measured if that was earlier. */
  showValues(step, dated = false) {
    this.key.replaceChildren(
      ...chartKey(
        this.lines.map((line) => {
          let i = line.steps.length - 1;
          while (i >= 0 && (line.steps[i] > step || line.values[i] === null)) i -= 1;
          const known = i < 0 ? "–" : line.errors ? withError(line.values[i], line.errors[i]) : number(line.values[i]);
          const isEarlier = dated && i >= 0 && line.steps[i + 1] <= step;
          const value = isEarlier ? `${known} at step ${integer(line.steps[i])}` : known;
          return {name: this.lines.length > 1 ? line.name : "", color: line.color ?? MUTED, value};
        }),
      ),
    );
  }
}
