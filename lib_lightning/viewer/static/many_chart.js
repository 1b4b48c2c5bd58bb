// The chart of one quantity in many runs: a thin line for each, mean and spread of each group.

import {h, s} from "./dom.js";
import {CHART, isLogSpaced, lineChart, timeScale, valueScale, wantsLog} from "./chart.js";
import {ink} from "./palette.js";
import {integer, number} from "./text.js";
import {statisticsAt, summary, valueAt} from "./run_groups.js";

const HEIGHT = 230;
// Pixels from which a line is pointed at.
const NEAR = 18;

/** The chart. `onclick(run)` is called with the name of the run that is clicked on. */
export class ManyChart {
  constructor(onclick) {
    this.tip = h("div", {class: "lib-tip lib-many-tip", role: "status", "data-role": "many-tip", hidden: true});
    this.element = h("div", {class: "lib-many-chart"});
    this.element.addEventListener("pointermove", (event) => this.#point(event));
    this.element.addEventListener("pointerleave", () => this.#leave());
    this.element.addEventListener("click", () => this.near && onclick(this.near.curve.name));
  }

  /** Draw `groups`, each `{name, color, curves}`; `spread` is "sd" or "range"; `label` says what of. */
  draw(groups, {spread, width, label}) {
    this.groups = groups;
    const curves = groups.flatMap((group) => group.curves);
    const steps = curves.flatMap((curve) => curve.steps).sort((a, b) => a - b);
    const log = isLogSpaced(steps);
    this.time = timeScale(steps[0] ?? 0, steps[steps.length - 1] ?? 1, Math.max(260, width), log);
    const lines = groups.flatMap(({color, curves: own}) =>
      own.map((curve) => ({...curve, color, width: own.length > 1 ? 0.9 : 1.8, opacity: own.length > 1 ? 0.45 : 1})),
    );
    const means = groups.flatMap(({color, curves: own}) => {
      const found = summary(own);
      if (!found.steps.length) return [];
      const low = found.mean.map((mean, i) => (spread === "sd" ? mean - found.sd[i] : found.min[i]));
      const high = found.mean.map((mean, i) => (spread === "sd" ? mean + found.sd[i] : found.max[i]));
      // Where a run of the group has no values yet, or no longer, the line is dashed.
      const whole = found.n.map((n) => n === own.length);
      const part = (keep) => ({steps: found.steps, values: found.mean.map((mean, i) => (keep(i) ? mean : null))});
      const near = (i) => !whole[i] || whole[i - 1] === false || whole[i + 1] === false;
      return [
        {steps: found.steps, values: found.mean, low, high, color, width: 0},
        {...part((i) => whole[i]), color, width: 2.6},
        {...part(near), color, width: 2.6, dash: "5 4"},
      ];
    });
    this.scale = valueScale([...lines, ...means], HEIGHT, wantsLog(lines));
    const svg = lineChart({series: [...lines, ...means], time: this.time, height: HEIGHT, log: wantsLog(lines), label});
    this.overlay = s("g", {class: "lib-many-over", fill: "none"});
    svg.append(this.overlay);
    this.svg = svg;
    this.element.replaceChildren(svg);
    this.#leave();
  }

  #leave() {
    this.near = null;
    this.tip.hidden = true;
    this.overlay?.replaceChildren();
    this.element.classList.remove("lib-many-near");
  }

  /** The line under the pointer, with its value there. */
  #nearest(x, y) {
    const step = this.time.back(x);
    let best = null;
    for (const group of this.groups) {
      for (const curve of group.curves) {
        // At the ends of a curve, the pointer may be a little beyond.
        const at = Math.min(Math.max(step, curve.steps[0]), curve.steps[curve.steps.length - 1]);
        const value = valueAt(curve, at);
        if (value === null || (this.scale.log && value <= 0)) continue;
        const distance = Math.hypot(this.time.x(at) - x, this.scale.y(value) - y);
        if (distance < NEAR && distance < (best?.distance ?? Infinity)) best = {group, curve, step: at, distance};
      }
    }
    return best;
  }

  #point(event) {
    if (!this.groups) return;
    const rim = this.svg.getBoundingClientRect();
    const near = this.#nearest(event.clientX - rim.left, event.clientY - rim.top);
    if (!near) {
      this.#leave();
      return;
    }
    this.near = near;
    const {curve, group} = near;
    // Values are those of the nearest point that the run has.
    const k = curve.steps.reduce((best, step, i) => (Math.abs(step - near.step) < Math.abs(curve.steps[best] - near.step) ? i : best), 0);
    const step = curve.steps[k];
    const points = curve.steps
      .map((at, i) => (this.scale.log && curve.values[i] <= 0 ? null : `${this.time.x(at).toFixed(1)} ${this.scale.y(curve.values[i]).toFixed(1)}`))
      .filter(Boolean);
    this.overlay.replaceChildren(
      s("path", {d: `M${points.join("L")}`, stroke: ink(group.color), "stroke-width": 2.4}),
      s("circle", {cx: this.time.x(step), cy: this.scale.y(curve.values[k]), r: 3.5, fill: ink(group.color)}),
    );
    const found = statisticsAt(group.curves, step);
    this.tip.replaceChildren(
      h("div", {class: "lib-tip-title"}, curve.name),
      h("div", {}, h("b", {}, number(curve.values[k])), ` at step ${integer(step)}`),
      ...(found.n > 1
        ? [h("div", {class: "lib-tip-hint"}, `${group.name}: ${number(found.mean)} ± ${number(found.sd)}, ${found.n} of ${group.curves.length} runs`)]
        : []),
    );
    this.tip.hidden = false;
    this.element.classList.add("lib-many-near");
    const beside = event.clientX + 16 + this.tip.offsetWidth > window.innerWidth;
    this.tip.style.left = `${Math.max(4, beside ? event.clientX - 16 - this.tip.offsetWidth : event.clientX + 16)}px`;
    this.tip.style.top = `${Math.min(event.clientY + 12, window.innerHeight - this.tip.offsetHeight - 4)}px`;
  }
}

export const MARGIN = CHART.left;
