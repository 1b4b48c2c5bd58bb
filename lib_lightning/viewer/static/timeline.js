// Charts over training below the graph: metrics, scalars, the followed lineage and events, on the same time axis.

import {h, setOptions} from "./dom.js";
import {CHART, isLogSpaced, timeScale} from "./chart.js";
import {integer, ordinal, withError} from "./text.js";
import {VERMILION} from "./palette.js";
import {Track} from "./track.js";
import {ScalarTracks} from "./scalar_tracks.js";
import {EventTrack} from "./events.js";

// Space at the right for a second axis of values.
const RIGHT_AXIS = 58;
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
      lineage: new Track("lineage", h("strong", {class: "lib-followed-name"})),
    };
    this.unfollow = h(
      "button",
      {type: "button", class: "lib-small", onclick: () => actions.follow(null), title: "stop following this feature (Escape)"},
      "stop following",
    );
    this.tracks.lineage.head.append(this.unfollow);
    const goAt = (plot) =>
      plot.addEventListener("click", (event) => {
        actions.go(this.time.back(event.clientX - plot.getBoundingClientRect().left), true);
      });
    this.scalars = new ScalarTracks(state, actions, goAt);
    this.tracks.metric.head.after(this.scalars.overlaid);
    this.events = new EventTrack(actions);
    this.cursor = h("div", {class: "lib-cursor", "aria-hidden": "true"});
    this.column = h(
      "div",
      {class: "lib-tracks"},
      this.events.aligned.marks,
      this.cursor,
      this.tracks.metric.element,
      this.scalars.element,
      this.tracks.lineage.element,
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
        this.scalars.adder,
      ),
      h("div", {class: "lib-timeline-body"}, this.column, this.events.aside),
    );
    for (const {plot} of Object.values(this.tracks)) goAt(plot);
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
    this.scalars.update(runs);
    this.time = timeScale(
      (log ? Math.min(...steps) : all[0]) ?? 0,
      all[all.length - 1] ?? 1,
      Math.max(260, this.column.clientWidth),
      log,
      this.scalars.overlays.length === 1 ? RIGHT_AXIS : CHART.right,
    );
    this.#drawMetric();
    this.scalars.draw(this.time);
    this.#drawLineage();
    this.events.draw(runs, this.time, this.state.follow);
    this.events.aligned.draw(runs, this.time, this.state.aligned, this.scalars.chosen);
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
      .map(({title, color, history}) => {
        const found = history.snapshots.map((snapshot) => snapshot.metrics?.[this.metric.value] ?? null);
        const errors = found.some((metric) => metric?.error) ? found.map((metric) => metric?.error ?? 0) : undefined;
        return {
          name: title,
          color,
          steps: history.steps,
          values: found.map((metric) => metric?.value ?? null),
          errors,
          dots: true,
        };
      })
      .filter((line) => line.values.some((value) => value !== null));
    const {overlays} = this.scalars;
    const over = overlays.length ? `, with ${overlays.map(({name}) => name).join(" and ")}` : "";
    this.tracks.metric.draw(lines, this.time, `${this.metric.value} over steps${over}`, {overlays});
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
    const x = Math.min(this.time.width - this.time.right, Math.max(CHART.left, this.time.x(step ?? 0)));
    this.cursor.style.transform = `translateX(${x}px)`;
    this.tracks.metric.showValues(step, true);
    this.scalars.showValues(step);
    this.events.moveTo(step);
  }
}
