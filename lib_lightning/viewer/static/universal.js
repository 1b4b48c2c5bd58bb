// The features that many runs have, as `lib-lightning universal` has found them.

import {h} from "./dom.js";
import {ink} from "./palette.js";
import {integer, number, percent} from "./text.js";
import {THEME} from "./theme.js";

// Features that are listed at first.
const LISTED = 15;

/** The part of the section on shared features. `follow({run: id, ...})` follows a feature in all runs that have it. */
export class UniversalTable {
  constructor(follow) {
    this.follow = follow;
    this.limit = LISTED;
    this.layer = null;
    this.element = h("div", {class: "lib-shared", "data-role": "shared-features"});
  }

  draw(files, groups, live) {
    this.args = [files, groups, live];
    this.element.replaceChildren(
      h("h3", {}, "Features that runs have in common"),
      ...(files.length
        ? files.flatMap((file) => this.#file(file, groups))
        : [
            h(
              "p",
              {class: "lib-many-hint"},
              "Not known yet: ",
              h("code", {}, "lib-lightning universal LOGS"),
              `, with the folder that contains the runs, finds out${live ? "" : "; then export this page again"}.`,
            ),
          ]),
    );
  }

  #file(file, groups) {
    const n = file.runs.length;
    const steps = [...new Set(file.steps)];
    const outdated = file.runs.some((run, i) => run && file.newest[i] !== null && file.newest[i] !== file.steps[i]);
    const at = steps.length === 1 ? `at step ${integer(steps[0])}` : "at their last steps";
    const rows = file.layers.flatMap((layer) => layer.features.map((feature) => ({layer, feature, count: feature.members.filter(Boolean).length})));
    const shown = rows
      .filter(({layer}) => !this.layer || layer.layer === this.layer)
      .sort((a, b) => b.count - a.count || b.feature.importance - a.feature.importance);
    return [
      h(
        "p",
        {class: "lib-many-hint"},
        `${n} runs, each compared with each other ${at}, with a false discovery rate of ${percent(file.level ?? 0)}. ` +
          "Bars: by the number of runs that have them, how many of a run's features, and what share of the importance. " +
          "A click on a layer lists its features only.",
        outdated ? " Some runs have other snapshots by now than those compared here." : "",
      ),
      h("div", {class: "lib-many-scroll lib-shared-layers"}, this.#bars(file, n)),
      h(
        "div",
        {class: "lib-many-scroll"},
        h(
          "table",
          {class: "lib-many-table"},
          h("thead", {}, h("tr", {}, ["node layer", "label", "runs", ...this.#shares(groups, file).map(({name}) => name), "importance", "similarity", ""].map((text) => h("th", {scope: "col"}, text)))),
          h("tbody", {}, shown.slice(0, this.limit).map((row) => this.#row(row, file, groups))),
        ),
      ),
      shown.length > this.limit
        ? h("button", {type: "button", class: "lib-small", "data-role": "more-shared", onclick: () => this.#change({limit: Infinity})}, `show all ${integer(shown.length)}`)
        : "",
    ];
  }

  /** Groups that have some but not all of the runs of a file. */
  #shares(groups, file) {
    return groups
      .map(({name, runs}) => ({name, runs: file.runs.map((run, i) => (runs.includes(run) ? i : -1)).filter((i) => i >= 0)}))
      .filter(({runs}) => runs.length && runs.length < file.runs.length);
  }

  #row({layer, feature, count}, file, groups) {
    const members = Object.fromEntries(file.runs.flatMap((run, i) => (run && feature.members[i] ? [[run, feature.members[i]]] : [])));
    const known = Object.keys(members).length > 0;
    const name = feature.label || feature.members[feature.central] || feature.members.find(Boolean);
    return h(
      "tr",
      {},
      h("td", {}, layer.layer),
      h(
        "td",
        {class: "lib-shared-label"},
        known ? h("button", {type: "button", class: "lib-link", "data-role": "shared-feature", title: "follow this feature in the runs that have it", onclick: () => this.follow(members)}, h("b", {}, name)) : name,
      ),
      h("td", {}, `${count} of ${file.runs.length}`),
      this.#shares(groups, file).map(({runs}) => h("td", {}, `${runs.filter((i) => feature.members[i]).length} of ${runs.length}`)),
      h("td", {}, percent(feature.importance)),
      h("td", {}, number(feature.similarity)),
      h(
        "td",
        {},
        h(
          "details",
          {},
          h("summary", {}, "in each run"),
          h(
            "ul",
            {class: "lib-shared-members"},
            file.names.map((run, i) =>
              h("li", {}, `${run}: `, feature.members[i] ? [h("b", {}, feature.members[i]), feature.labels[i] ? ` ${feature.labels[i]}` : ""] : "–"),
            ),
          ),
        ),
      ),
    );
  }

  /** For each node layer, bars by the number of runs: how many features so many runs have, and how important these are. */
  #bars(file, n) {
    const most = Math.max(1e-9, ...file.layers.flatMap((layer) => layer.counts));
    const numbers = Array.from({length: n}, (_, k) => n - k);
    const bars = (values, largest, say) =>
      h(
        "td",
        {class: "lib-shared-bars"},
        h(
          "div",
          {},
          numbers.map((k) =>
            h("span", {
              title: `in ${k === 1 ? "one run only" : `${k} runs`}: ${say(values[k - 1])}`,
              class: "lib-bar-fill",
              style: {
                height: `${Math.max(1, Math.round((30 * values[k - 1]) / largest))}px`,
                background: ink(k === n ? THEME.colors.blue : k === 1 ? THEME.no_module : THEME.colors.sky),
              },
            }),
          ),
        ),
      );
    const axis = h("div", {class: "lib-shared-axis"}, h("span", {}, `in all ${n}`), h("span", {}, "in one"));
    const head = (text, more) => h("th", {scope: "col"}, text, more ? axis.cloneNode(true) : "");
    return h(
      "table",
      {class: "lib-many-table"},
      h("thead", {}, h("tr", {}, head("node layer"), head("features of a run", true), head(`in all ${n}`), head("their importance", true), head(`in all ${n}`))),
      h(
        "tbody",
        {},
        file.layers.map((layer) =>
          h(
            "tr",
            {},
            h(
              "th",
              {scope: "row"},
              h(
                "button",
                {
                  type: "button",
                  class: "lib-link",
                  "data-role": "shared-layer",
                  "aria-pressed": String(this.layer === layer.layer),
                  onclick: () => this.#change({layer: this.layer === layer.layer ? null : layer.layer}),
                },
                h("b", {}, layer.layer),
              ),
              layer.identical
                ? h("div", {class: "lib-note", title: "These features are those of the data, or of weights that the runs share: that all have them says nothing about training."}, "the same in all by construction")
                : "",
            ),
            bars(layer.counts, most, (value) => `${number(value)} features of a run`),
            h("td", {}, `${number(layer.counts[n - 1])} of ${number(layer.counts.reduce((sum, value) => sum + value, 0))}`),
            bars(layer.importance, 1, (value) => `${percent(value)} of the importance`),
            h("td", {}, percent(layer.importance[n - 1])),
          ),
        ),
      ),
    );
  }

  #change(change) {
    Object.assign(this, {limit: LISTED}, change);
    this.draw(...this.args);
  }
}
