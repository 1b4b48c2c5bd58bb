// Logged scalars over training: each chosen one in a chart of its own, or over the chart of the metric.

import {h, setOptions} from "./dom.js";
import {lineSwatch, wantsLog} from "./chart.js";
import {number} from "./text.js";
import {MUTED, SERIES} from "./palette.js";
import {Track, indexAt} from "./track.js";

// How lines of different scalars over the metric look.
const DASHES = ["7 3", "2 3", "11 3 2 3", "4 4", "1 2", "14 4"];
const FIRST = [/val.*loss|loss.*val|test.*loss|loss.*test/, /train.*loss|loss.*train/, /loss/, /./];

/** Names of the scalars of runs. */
export function scalarNames(runs) {
  return [...new Set(runs.flatMap((run) => Object.keys(run.history.run.scalars ?? {})))].sort();
}

/** A scalar of each run that has it; baselines have those of their run, which are drawn once. */
function linesOf(runs, name) {
  const lines = runs
    .filter((run) => run.history.run.scalars?.[name])
    .map((run) => ({name: run.title, color: run.color, ...run.history.run.scalars[name]}));
  const same = (a, b) => String(a.values) === String(b.values) && String(a.steps) === String(b.steps);
  return lines.filter((line, i) => lines.findIndex((other) => same(other, line)) === i);
}

/** The charts of the chosen scalars, `state.scalars`: each `{name, over}`. `goAt(plot)` makes a chart respond to clicks. */
export class ScalarTracks {
  constructor(state, actions, goAt) {
    this.state = state;
    this.actions = actions;
    this.goAt = goAt;
    this.slots = [];
    this.overlays = [];
    this.element = h("div", {class: "lib-scalars"});
    this.overlaid = h("div", {class: "lib-overlaid", "data-role": "overlaid", hidden: true});
    this.select = h("select", {
      "data-role": "add-scalar",
      "aria-label": "add a curve",
      onchange: () => {
        this.#set([...this.chosen, {name: this.select.value, over: false}]);
        this.select.value = "";
      },
    });
    this.adder = h("label", {class: "lib-control"}, h("span", {class: "lib-name"}, "add a curve"), this.select);
  }

  #set(scalars) {
    this.actions.set({scalars});
  }

  #change(name, change) {
    this.#set(this.chosen.map((one) => (one.name === name ? {...one, ...change} : one)));
  }

  #remove(name) {
    this.#set(this.chosen.filter((one) => one.name !== name));
  }

  /** Take what runs have logged; by default one loss is chosen. */
  update(runs) {
    this.runs = runs;
    this.names = scalarNames(runs);
    const first = FIRST.map((kind) => this.names.find((name) => kind.test(name))).find(Boolean);
    this.chosen = this.state.scalars ?? (first === undefined ? [] : [{name: first, over: false}]);
    const left = this.names.filter((name) => !this.chosen.some((one) => one.name === name));
    setOptions(this.select, [["", "choose a scalar"], ...left.map((name) => [name, name])], "");
    this.adder.hidden = left.length === 0;
    const several = runs.length > 1;
    const free = SERIES.filter((color) => !runs.some((run) => run.color === color));
    this.overlays = this.chosen
      .filter((one) => one.over && this.names.includes(one.name))
      .map(({name}, i) => {
        const color = several ? MUTED : free[i % free.length];
        const dash = DASHES[i % DASHES.length];
        const lines = linesOf(runs, name).map((line) => ({...line, color: several ? line.color : color, dash}));
        return {name, lines, color, dash, log: wantsLog(lines)};
      });
  }

  /** Draw the charts of those that are not over the metric, and the key of those that are. */
  draw(time) {
    const own = this.chosen.filter((one) => !one.over);
    while (this.slots.length > own.length) this.slots.pop().track.element.remove();
    own.forEach(({name}, i) => {
      if (i === this.slots.length) this.#addSlot();
      const {select, track} = this.slots[i];
      this.slots[i].name = name;
      const others = this.chosen.filter((one) => one.name !== name).map((one) => one.name);
      const known = this.names.includes(name) ? this.names : [name, ...this.names];
      setOptions(
        select,
        known.filter((other) => !others.includes(other)).map((other) => [other, other]),
        name,
      );
      track.draw(linesOf(this.runs, name), time, `${name} over steps`);
    });
    this.overlaid.hidden = this.overlays.length === 0;
    this.overlaid.replaceChildren(...this.overlays.map((overlay) => this.#key(overlay)));
  }

  #addSlot() {
    const slot = {name: ""};
    slot.select = h("select", {
      "data-role": "scalar",
      "aria-label": "scalar",
      onchange: () => this.#change(slot.name, {name: slot.select.value}),
    });
    slot.track = new Track(
      "scalar",
      slot.select,
      button("over the metric", "overlay", "draw it over the chart of the metric", () =>
        this.#change(slot.name, {over: true}),
      ),
      button("remove", "remove-scalar", "remove this curve", () => this.#remove(slot.name)),
    );
    this.goAt(slot.track.plot);
    this.element.append(slot.track.element);
    this.slots.push(slot);
  }

  #key(overlay) {
    overlay.text = h("span", {class: "lib-overlay-values"});
    const values = overlay.lines.flatMap((line) => line.values).filter((value) => Number.isFinite(value));
    const [low, high] = [values.reduce((a, b) => Math.min(a, b), Infinity), values.reduce((a, b) => Math.max(a, b), -Infinity)];
    const range = this.overlays.length > 1 ? ` drawn from ${number(low)} to ${number(high)}` : ", axis at the right";
    return h(
      "div",
      {class: "lib-overlay-key"},
      lineSwatch(overlay.color, overlay.dash),
      h("span", {}, overlay.name),
      overlay.text,
      h("span", {class: "lib-name"}, `${overlay.log ? "logarithmic" : "linear"}${range}`),
      button("own chart", "own-chart", "draw it in a chart of its own", () => this.#change(overlay.name, {over: false})),
      button("remove", "remove-scalar", "remove this curve", () => this.#remove(overlay.name)),
    );
  }

  /** Show the values at a step. */
  showValues(step) {
    for (const {track} of this.slots) track.showValues(step);
    for (const {lines, text} of this.overlays) {
      const shown = lines.map((line) => {
        const i = indexAt(line, step);
        const value = h("b", {}, i < 0 ? "–" : number(line.values[i]));
        return lines.length > 1 ? [lineSwatch(line.color), value] : [value];
      });
      text.replaceChildren(...shown.flat());
    }
  }
}

function button(text, role, title, onclick) {
  return h("button", {type: "button", class: "lib-small", "data-role": role, title, onclick}, text);
}
