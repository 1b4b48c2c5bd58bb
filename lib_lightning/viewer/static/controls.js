// The controls above the graph. They are stateless: they report changes and display the state of the view.

import {h, setOptions} from "./dom.js";
import {number} from "./text.js";
import {ink} from "./palette.js";
import {FeatureSearch} from "./feature_search.js";
import {runPicker} from "./run_picker.js";

const SPEEDS = [1, 2, 4, 8, 16, 30];
const LIMITS = [10, 20, 40, 80, 160];
// Smallest threshold: log10 of the strength relative to the section's strongest edge.
const MIN_THRESHOLD_LOG10 = -4;

function labelled(text, control, ...more) {
  return h("label", {class: "lib-control"}, h("span", {class: "lib-name"}, text), control, ...more);
}

function choice(role, options, chosen, onchange, title) {
  const select = h("select", {"data-role": role, title, onchange: () => onchange(select.value)});
  setOptions(select, options, chosen);
  return select;
}

/** The controls. User input calls methods of `actions`: `step(index)`, `set({threshold})`, ... */
export class Controls {
  constructor(state, actions) {
    this.play = h(
      "button",
      {
        type: "button",
        class: "lib-play",
        "data-role": "play",
        "aria-label": "play",
        title: "play or pause (space bar)",
        onclick: () => actions.play(),
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
      title: "← and → move by one snapshot, with shift by ten; Home and End move to the first and last",
      oninput: () => actions.step(Number(this.slider.value)),
    });
    this.text = h("output", {class: "lib-step", "aria-live": "polite", "data-role": "step-text"});
    this.speed = choice(
      "speed",
      SPEEDS.map((n) => [String(n), `${n} / s`]),
      String(state.speed),
      (value) => actions.set({speed: Number(value)}),
      "snapshots per second",
    );
    this.threshold = h("input", {
      type: "range",
      min: MIN_THRESHOLD_LOG10,
      max: 0,
      step: 0.05,
      "data-role": "threshold",
      value: Math.log10(state.threshold),
      oninput: () => actions.set({threshold: 10 ** Number(this.threshold.value)}),
    });
    this.thresholdText = h("span", {class: "lib-value"});
    this.features = choice(
      "features",
      [...LIMITS.map((n) => [String(n), String(n)]), ["all", "all"]],
      String(state.limit),
      (value) => actions.set({limit: value === "all" ? Infinity : Number(value)}),
      "maximum number of features shown per node layer, by importance",
    );
    this.color = choice(
      "color",
      [
        ["module", "module"],
        ["label", "label"],
        ["age", "age"],
      ],
      state.color,
      (value) => actions.set({color: value}),
      "what the colours of dots mean; the colours are explained below the graph",
    );
    this.signs = h("input", {
      type: "checkbox",
      "data-role": "signs",
      title: "colour lines by what a feature does to the next one: drive it the way it goes, or hold against it",
      onchange: () => actions.set({signs: this.signs.checked}),
    });
    this.heights = choice(
      "heights",
      [
        ["lineage", "fixed for each feature"],
        ["module", "by module"],
      ],
      state.heights,
      (value) => actions.set({heights: value}),
      "vertical positions of features: the same in all snapshots, or grouped by the modules of this snapshot",
    );
    // Offered where the runs shown have been compared.
    this.choices = [this.color, this.heights].map((select) => [...select.options].map(({value, text}) => [value, text]));
    this.search = new FeatureSearch(actions.find);
    this.save = h(
      "button",
      {type: "button", class: "lib-small", "data-role": "save-picture", title: "download the graphs as they are shown, as a PNG file", onclick: () => actions.save()},
      "save picture",
    );
    this.runs = h("fieldset", {class: "lib-runs", "aria-label": "runs"});
    this.actions = actions;
    this.header = h(
      "header",
      {class: "lib-header"},
      h("h1", {class: "lib-title"}, "Interaction graph over training"),
      this.runs,
      this.save,
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
      {class: "lib-bar", role: "group", "aria-label": "drawing options"},
      labelled("edges above", this.threshold, this.thresholdText),
      labelled("features per layer", this.features),
      labelled("colour", this.color),
      labelled("positions", this.heights),
      labelled("signs", this.signs),
      labelled("feature", this.search.element),
    );
  }

  /** Show the number of snapshots and the current one. */
  showStep(index, count, text) {
    this.slider.max = Math.max(0, count - 1);
    this.slider.value = index;
    this.slider.disabled = count === 0;
    this.slider.setAttribute("aria-valuetext", text);
    if (this.text.textContent !== text) this.text.textContent = text;
  }

  /** Show whether the film is playing. */
  showPlaying(playing) {
    this.play.textContent = playing ? "❚❚" : "▶";
    this.play.setAttribute("aria-label", playing ? "pause" : "play");
    this.play.setAttribute("aria-pressed", String(playing));
    // While playing, a screen reader would read up to thirty steps per second.
    this.text.setAttribute("aria-live", playing ? "off" : "polite");
  }

  /** Show the threshold as text. */
  showThreshold(threshold) {
    this.thresholdText.textContent = `${number(100 * threshold)}% of the strongest`;
    this.threshold.setAttribute("aria-valuetext", this.thresholdText.textContent);
  }

  /** Offer colours and positions of shared features, or not, and show which are chosen. */
  showShared(offered, {color, heights}) {
    const more = [["shared", "shared"], ["shared", "shared features level"]];
    [color, heights].forEach((chosen, n) => {
      const select = [this.color, this.heights][n];
      setOptions(select, [...(offered ? [more[n]] : []), ...this.choices[n]], chosen);
    });
  }

  /** Show a checkbox for each run. Existing ones are kept, so that they keep the focus. */
  showRuns({available, chosen, colors}) {
    const names = available.map((run) => `${run.name} ${run.title} ${run.page ?? ""}`).join("\n");
    if (names !== this.runNames) {
      this.runNames = names;
      const labels = available.map((run) =>
        h(
          "label",
          {class: "lib-run"},
          h("input", {
            type: "checkbox",
            "data-role": "run",
            value: run.name,
            onchange: (event) => this.actions.run(run.name, event.target.checked),
          }),
          h("span", {class: "lib-line-swatch", style: {background: ink(colors.get(run.name))}}),
          run.title,
          run.page && h("a", {href: run.page, target: "_blank", "data-role": "comparison"}, "comparison"),
        ),
      );
      this.runs.replaceChildren(...runPicker(labels));
    }
    for (const box of this.runs.querySelectorAll("input[type='checkbox']")) box.checked = chosen.includes(box.value);
  }

  /** Set the features that the search field finds. */
  showSuggestions(features) {
    this.search.setKnown(features);
  }
}
