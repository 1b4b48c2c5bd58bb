// The section on all runs: curves of one quantity with mean and spread over runs, and the features that runs share.

import {h, setOptions} from "./dom.js";
import {integer, number} from "./text.js";
import {ink, runColors} from "./palette.js";
import {defaultGrouping, finite, groupRuns, groupings, lastCommonStep, statisticsAt} from "./run_groups.js";
import {ManyChart} from "./many_chart.js";
import {UniversalTable} from "./universal.js";

const FIRST_METRICS = ["effective_edges/total", "features/total"];

/** The section. `actions.run(name)` shows the graph of a run, `actions.follow(members)` a feature by run. */
export class ManyRuns {
  constructor(source, actions) {
    this.source = source;
    this.curves = null;
    this.chosen = {curve: null, group: null, spread: "sd"};
    this.signature = null;
    const choice = (role, label, set) => {
      const select = h("select", {"data-role": role, "aria-label": label, onchange: () => set(select.value)});
      return select;
    };
    this.curve = choice("many-curve", "what the curves show", (value) => this.#choose({curve: value}));
    this.group = choice("many-group", "group runs by", (value) => this.#choose({group: value}));
    this.spread = choice("many-spread", "spread", (value) => this.#choose({spread: value}));
    setOptions(
      this.spread,
      [
        ["sd", "standard deviation"],
        ["range", "smallest to largest"],
      ],
      "sd",
    );
    this.chart = new ManyChart((name) => actions.run(name));
    this.title = h("h2", {});
    this.rows = h("tbody", {});
    this.head = h("tr", {});
    this.hint = h("p", {class: "lib-many-hint"});
    this.error = h("p", {class: "lib-many-error", role: "alert", hidden: true});
    this.shared = new UniversalTable(actions.follow);
    const labelled = (text, control) => h("label", {class: "lib-control"}, h("span", {class: "lib-name"}, text), control);
    this.element = h(
      "section",
      {class: "lib-many", hidden: true, "aria-label": "all runs", "data-role": "many-runs"},
      h(
        "div",
        {class: "lib-timeline-head"},
        this.title,
        labelled("curve", this.curve),
        labelled("group by", this.group),
        labelled("band", this.spread),
      ),
      this.error,
      this.chart.element,
      h("div", {class: "lib-many-scroll"}, h("table", {class: "lib-many-table"}, h("thead", {}, this.head), this.rows)),
      this.hint,
      this.shared.element,
      this.chart.tip,
    );
  }

  /** Fetch what is shown if any of the runs has changed. `runs` are all runs, with versions. */
  async refresh(runs) {
    this.element.hidden = runs.length < 2;
    const signature = JSON.stringify(runs.map((run) => [run.name, run.version, run.universal]));
    if (this.element.hidden || signature === this.signature) return;
    try {
      this.runs = runs.map((run) => run.name);
      [this.names, this.universal] = await Promise.all([this.source.curveNames(), this.source.sharedFeatures()]);
      await this.#fetch();
      this.signature = signature;
      this.error.hidden = true;
    } catch (error) {
      this.error.textContent = `The curves of all runs cannot be read: ${error.message ?? error}`;
      this.error.hidden = false;
    }
    this.draw();
  }

  /** The curve that is chosen, as `[kind, name]`. */
  get #key() {
    const at = this.curve.value.indexOf(":");
    return [this.curve.value.slice(0, at), this.curve.value.slice(at + 1)];
  }

  async #fetch() {
    const options = ["metric", "scalar"].flatMap((kind) =>
      this.names[kind].map((name) => [`${kind}:${name}`, kind === "metric" ? name : `${name} (logged)`]),
    );
    const first = FIRST_METRICS.find((name) => this.names.metric.includes(name));
    setOptions(this.curve, options, this.chosen.curve ?? (first ? `metric:${first}` : options[0]?.[0]));
    const asked = this.curve.value;
    const found = asked ? await this.source.curves(...this.#key) : [];
    if (asked === this.curve.value) this.curves = found;
  }

  async #choose(change) {
    Object.assign(this.chosen, change);
    if ("curve" in change) {
      this.element.setAttribute("aria-busy", "true");
      try {
        await this.#fetch();
        this.error.hidden = true;
      } catch (error) {
        this.error.textContent = `This curve cannot be read: ${error.message ?? error}`;
        this.error.hidden = false;
      }
      this.element.removeAttribute("aria-busy");
    }
    this.draw();
  }

  draw() {
    if (this.element.hidden || !this.curves) return;
    const ways = groupings(this.runs);
    setOptions(
      this.group,
      ways.map(({id, text}) => [id, text]),
      this.chosen.group ?? defaultGrouping(ways),
    );
    const way = ways.find(({id}) => id === this.group.value) ?? ways[0];
    const groups = groupRuns(this.runs, way.keyOf);
    const colors = runColors(groups.map(({name}) => name));
    const curves = new Map(this.curves.map((curve) => [curve.name, finite(curve)]));
    const drawn = groups
      .map(({name, runs}) => ({
        name,
        color: colors.get(name),
        curves: runs.map((run) => curves.get(run)).filter((curve) => curve?.steps.length),
      }))
      .filter((group) => group.curves.length);
    this.title.textContent = `All ${integer(this.runs.length)} runs`;
    const [, what] = this.#key;
    this.chart.draw(drawn, {
      spread: this.spread.value,
      width: this.element.clientWidth,
      label: `${what} over steps in ${this.runs.length} runs, by group`,
    });
    this.#table(drawn);
    this.shared.draw(this.universal ?? [], groups, this.source.live);
    Object.assign(this.element.dataset, {
      groups: drawn.map(({name, curves: own}) => `${name}=${own.length}`).join(" "),
      ready: "true",
    });
  }

  #table(groups) {
    this.head.replaceChildren(...["group", "runs", "mean", "standard deviation", "smallest", "largest", "at step"].map((text) => h("th", {scope: "col"}, text)));
    this.rows.replaceChildren(
      ...groups.map(({name, color, curves}) => {
        const step = lastCommonStep(curves);
        const at = step === null ? {n: 0} : statisticsAt(curves, step);
        const cell = (value) => h("td", {}, number(value));
        return h(
          "tr",
          {},
          h("th", {scope: "row"}, h("span", {class: "lib-line-swatch", style: {background: ink(color)}}), ` ${name}`),
          h("td", {}, integer(curves.length)),
          cell(at.mean),
          cell(at.sd),
          cell(at.min),
          cell(at.max),
          h("td", {}, step === null ? "–" : integer(step)),
        );
      }),
    );
    const several = groups.some(({curves}) => curves.length > 1);
    const band = this.spread.value === "sd" ? "one standard deviation over runs to either side of the mean" : "the smallest to the largest value of the runs";
    this.hint.textContent = several
      ? `Thin lines are runs, thick ones means of groups; bands reach from ${band}. Dashed: not all runs of the group have values there. ` +
        "Between their points, runs are interpolated. A click on a line shows the graph of the run."
      : "Each group has a single run, so there is no mean. A click on a line shows the graph of the run.";
    if (this.spread.value === "sd") this.hint.textContent = this.hint.textContent.replace("bands reach from one", "bands reach one");
  }
}
