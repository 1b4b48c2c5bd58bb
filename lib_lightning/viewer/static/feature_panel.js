// The page of one feature beside the graph: loaded when a feature is chosen, and again for each step.

import {h} from "./dom.js";
import {integer, number} from "./text.js";
import {NoteField} from "./notes.js";
import {
  comparisonPart,
  curvesPart,
  examplesPart,
  histogramPart,
  interactionsPart,
  numbersPart,
  outputsPart,
} from "./feature_sections.js";

// While a slider is dragged or the film plays, only steps that are shown for as long as this are loaded.
const WAIT_MS = 120;
const MAX_PAGES = 60;
// As in the style sheet, in pixels.
const TWO_COLUMNS = 760,
  COLUMN_GAP = 34;

/** The panel. `actions.close()` closes it, `actions.go(id)` goes to another feature, such as "resid_post/17". */
export class FeaturePanel {
  constructor(source, actions) {
    this.source = source;
    this.actions = actions;
    this.pages = new Map();
    this.title = h("h2", {class: "lib-feature-name", id: "lib-feature-name", tabindex: -1});
    this.label = h("p", {class: "lib-feature-label", "data-part": "label"});
    this.closing = h(
      "button",
      {type: "button", class: "lib-close", "data-role": "close-feature", "aria-label": "close this feature (Escape)", title: "close (Escape)", onclick: () => actions.close()},
      "×",
    );
    this.notice = h("p", {class: "lib-feature-notice", role: "status", hidden: true});
    this.parts = h("div", {class: "lib-feature-parts"});
    this.note = new NoteField(source);
    this.numbers = h("div");
    this.element = h(
      "aside",
      {class: "lib-feature", "data-role": "feature", role: "region", "aria-labelledby": "lib-feature-name", tabindex: -1, hidden: true},
      h("div", {class: "lib-feature-head"}, this.title, this.closing),
      this.label,
      this.notice,
      this.numbers,
      this.note.element,
      h("div", {class: "lib-feature-body"}, this.parts),
    );
  }

  get isOpen() {
    return !this.element.hidden;
  }

  close() {
    clearTimeout(this.timer);
    this.wanted = null;
    this.element.hidden = true;
  }

  /** Move the focus to the panel. */
  focus() {
    this.title.focus({preventScroll: false});
  }

  /** Show lineage `id` of layer `l` at snapshot `k` of a run, or at the snapshot nearest to it that has the lineage. */
  show({run, version, history, l, id}, k) {
    const name = `${history.layers[l].name}/${id}`;
    const isNew = this.wanted?.name !== name || this.wanted?.run !== run;
    const found = nearestWith(history, k, l, id);
    const key = [run, version, name, found].join("\n");
    if (this.wanted?.key === key && !isNew) return;
    this.wanted = {key, name, run};
    this.element.hidden = false;
    this.element.dataset.feature = name;
    this.title.textContent = name;
    if (isNew) {
      for (const part of [this.label, this.parts, this.numbers]) part.replaceChildren();
      this.element.scrollTop = 0;
      this.notify("Loading…");
    }
    this.element.setAttribute("aria-busy", "true");
    clearTimeout(this.timer);
    const load = () => this.#load({run, version, history, l, id, name}, found, k, key);
    if (isNew) load();
    else this.timer = setTimeout(load, WAIT_MS);
  }

  async #load(feature, found, k, key) {
    const {history, l, id} = feature;
    const first = history.first[l].get(id);
    const between = history.snapshots.map((_, j) => j).filter((j) => j > first && j < found && history.featureOf(j, l, id) >= 0);
    const middle = between[between.length >> 1];
    const now = await this.#page(feature, found).catch((error) => ({error}));
    if (this.wanted?.key !== key) return;
    this.element.setAttribute("aria-busy", "false");
    if (now.error) {
      for (const part of [this.label, this.parts, this.numbers]) part.replaceChildren();
      this.note.element.hidden = true;
      this.notify(`${now.error.message ?? now.error}`);
      return;
    }
    const birth = history.isTracked(0, l) ? history.birth(l, id) : "not tracked: at other steps, another feature may have this number";
    const [wanted, step] = [history.steps[found], history.steps[k]];
    const notice =
      wanted !== step
        ? `This feature is not present at step ${integer(step)}; this is how it was at step ${integer(wanted)}.`
        : now.step !== wanted
          ? `The page of this feature at step ${integer(wanted)} is not in this file; this is step ${integer(now.step)}.`
          : "";
    if (!this.draw(feature.run, now, birth, notice)) return;
    // The page at this step does not wait for the others.
    const others = [
      ["first seen", first],
      ["half-way", middle],
    ].filter(([, j]) => j !== undefined && j < found);
    const pages = await Promise.all(
      others.map(async ([title, j]) => {
        const step = history.steps[j];
        const page = await this.#page(feature, j).catch((error) => ({error}));
        if (page.error) return {title, step, missing: String(page.error.message ?? page.error)};
        return page.step === step ? {title, step, page} : {title: `near ${title}`, step: page.step, page};
      }),
    );
    if (this.wanted?.key !== key) return;
    this.compare(now, pages);
    this.element.dataset.loaded = key;
  }

  /** Draw a page. Returns whether that was possible. */
  draw(run, page, birth, notice = "") {
    const whole = this.element.clientWidth - 40;
    const width = Math.max(260, Math.min(whole >= TWO_COLUMNS ? (whole - COLUMN_GAP) / 2 : whole, 620));
    this.comparison = h("div");
    this.element.hidden = false;
    this.title.textContent = page.id;
    this.notify(notice);
    try {
      this.label.replaceChildren(...labelOf(page));
      this.numbers.replaceChildren(numbersPart(page, {birth}));
      const parts = [
        examplesPart(page, "This snapshot has no examples of this feature: it was written without them, or by an older version."),
        this.comparison,
        histogramPart(page, width),
        interactionsPart(page, this.actions.go),
        outputsPart(page),
        curvesPart(page, width),
      ];
      this.parts.replaceChildren(...parts.filter(Boolean));
    } catch (error) {
      this.notify(`This feature cannot be shown. ${error.message ?? error}`);
      return false;
    }
    this.note.element.hidden = false;
    this.note.show(run, page.id, page);
    this.element.dataset.step = page.step;
    return true;
  }

  /** Compare the examples with those of earlier steps, `pages` are `{title, step, page}` or `{title, step, missing}`. */
  compare(now, pages) {
    const distinct = pages.filter(({step}, i) => step !== now.step && pages.findIndex((other) => other.step === step) === i);
    const compared = comparisonPart([...distinct, {title: "now", step: now.step, page: now}]);
    this.comparison.replaceChildren(...(compared ? [compared] : []));
  }

  /** A sentence above the page, "" for none. */
  notify(text) {
    this.notice.hidden = !text;
    this.notice.textContent = text;
  }

  /** The page of a feature at snapshot j. Failures are not kept. */
  #page({run, version, history, l, id, name}, j) {
    const key = [run, version, name, j].join("\n");
    if (!this.pages.has(key)) {
      const page = this.source.feature(run, history.steps[j], l, id, history.layers[l].name);
      page.catch(() => this.pages.delete(key));
      this.pages.set(key, page);
      while (this.pages.size > MAX_PAGES) this.pages.delete(this.pages.keys().next().value);
    }
    return this.pages.get(key);
  }
}

/** The snapshot k, or else the one nearest to it that has the lineage: the last before it, or the first. */
function nearestWith(history, k, l, id) {
  for (let j = k; j >= 0; j--) if (history.featureOf(j, l, id) >= 0) return j;
  return history.first[l].get(id);
}

/** The label, and how well it predicts the feature. */
function labelOf(page) {
  if (!page.label) return [h("span", {class: "lib-none"}, "This feature has no label.")];
  const score = page.label_score;
  return [
    h("b", {}, page.label),
    score === null
      ? ""
      : h("span", {class: "lib-none", title: "area under the ROC curve, on samples that were not used to find the label: 0.5 is chance, 1 perfect"}, ` predicts its activity: AUROC ${number(score)}`),
  ];
}
