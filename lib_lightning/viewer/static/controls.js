// The controls above the graph. They hold no state of their own: they tell what was chosen and show what is.

import {h, setOptions} from "./dom.js";
import {number} from "./text.js";

const SPEEDS = [1, 2, 4, 8, 16, 30];
const LIMITS = [10, 20, 40, 80, 160];
// Log10 of the share of a section's strongest edge.
const LEAST_THRESHOLD = -4;

function labelled(text, control, ...more) {
  return h("label", {class: "lib-control"}, h("span", {class: "lib-name"}, text), control, ...more);
}

function choice(role, options, chosen, onchange, title) {
  const select = h("select", {"data-role": role, title, onchange: () => onchange(select.value)});
  setOptions(select, options, chosen);
  return select;
}

/** The controls; `act` is called with what changes: `act.step(index)`, `act.set({threshold})`, ... */
export class Controls {
  constructor(state, act) {
    this.play = h(
      "button",
      {
        type: "button",
        class: "lib-play",
        "data-role": "play",
        "aria-label": "play",
        title: "play or pause (space)",
        onclick: () => act.play(),
      },
      "▶",
    );
    this.slider = h("input", {
      type: "range",
      min: 0,
      max: 0,
      step: 1,
      value: 0,
      "data-role": "step",
      "aria-label": "snapshot",
      title: "← → one snapshot, with shift ten; Home, End",
      oninput: () => act.step(Number(this.slider.value)),
    });
    this.text = h("output", {class: "lib-step", "aria-live": "polite", "data-role": "step-text"});
    this.speed = choice(
      "speed",
      SPEEDS.map((n) => [String(n), `${n} / s`]),
      String(state.speed),
      (value) => act.set({speed: Number(value)}),
      "snapshots a second",
    );
    this.threshold = h("input", {
      type: "range",
      min: LEAST_THRESHOLD,
      max: 0,
      step: 0.05,
      "data-role": "threshold",
      value: Math.log10(state.threshold),
      oninput: () => act.set({threshold: 10 ** Number(this.threshold.value)}),
    });
    this.thresholdText = h("span", {class: "lib-value"});
    this.features = choice(
      "features",
      [...LIMITS.map((n) => [String(n), String(n)]), ["all", "all"]],
      String(state.limit),
      (value) => act.set({limit: value === "all" ? Infinity : Number(value)}),
      "the most important ones of each node layer",
    );
    this.color = choice(
      "color",
      [
        ["module", "module"],
        ["label", "label"],
        ["age", "age (new features)"],
      ],
      state.color,
      (value) => act.set({color: value}),
    );
    this.heights = choice(
      "heights",
      [
        ["lineage", "kept by each feature"],
        ["module", "by module at this step"],
      ],
      state.heights,
      (value) => act.set({heights: value}),
      "where features lie in their column",
    );
    this.known = h("datalist", {id: "lib-known-features"});
    this.find = h("input", {
      type: "search",
      "data-role": "find",
      list: "lib-known-features",
      placeholder: "layer/17 or a label",
      size: 18,
      "aria-label": "find and follow a feature",
      onchange: () => this.find.value.trim() && act.find(this.find.value.trim()),
    });
    this.runs = h("fieldset", {class: "lib-runs", "aria-label": "runs"});
    this.act = act;
    this.header = h(
      "header",
      {class: "lib-header"},
      h("div", {class: "lib-title"}, "Interaction graph over training"),
      this.runs,
    );
    this.film = h(
      "div",
      {class: "lib-bar lib-film", role: "group", "aria-label": "film"},
      this.play,
      this.slider,
      this.text,
      labelled("speed", this.speed),
    );
    this.options = h(
      "div",
      {class: "lib-bar", role: "group", "aria-label": "what is drawn"},
      labelled("edges from", this.threshold, this.thresholdText),
      labelled("features a layer", this.features),
      labelled("colour", this.color),
      labelled("heights", this.heights),
      labelled("follow", this.find),
      this.known,
    );
  }

  /** Show the steps there are and the one that is shown. */
  showStep(index, count, text) {
    this.slider.max = Math.max(0, count - 1);
    this.slider.value = index;
    this.slider.disabled = count === 0;
    this.slider.setAttribute("aria-valuetext", text);
    if (this.text.textContent !== text) this.text.textContent = text;
  }

  /** Show whether the film runs. */
  showPlaying(playing) {
    this.play.textContent = playing ? "❚❚" : "▶";
    this.play.setAttribute("aria-label", playing ? "pause" : "play");
    this.play.setAttribute("aria-pressed", String(playing));
    // While it plays, thirty steps a second would be read aloud.
    this.text.setAttribute("aria-live", playing ? "off" : "polite");
  }

  /** Show the threshold in words. */
  showThreshold(threshold) {
    this.thresholdText.textContent = `${number(100 * threshold)}% of the strongest`;
    this.threshold.setAttribute("aria-valuetext", this.thresholdText.textContent);
  }

  /** A checkbox for each run; those that are there stay, so that focus is kept. */
  showRuns({full, chosen, colors}) {
    const names = full.map((run) => run.name).join("\n");
    if (names !== this.runNames) {
      this.runNames = names;
      this.runs.replaceChildren(
        ...full.map((run) =>
          h(
            "label",
            {class: "lib-run"},
            h("input", {
              type: "checkbox",
              "data-role": "run",
              value: run.name,
              onchange: (event) => this.act.run(run.name, event.target.checked),
            }),
            h("span", {class: "lib-line-swatch", style: {background: colors.get(run.name)}}),
            run.name,
          ),
        ),
      );
    }
    for (const box of this.runs.querySelectorAll("input")) box.checked = chosen.includes(box.value);
  }

  /** Features that can be typed in: those with a label, and the most important ones. */
  showKnown(features) {
    this.known.replaceChildren(...features.map(([value, label]) => h("option", {value, label: label || value})));
  }
}
