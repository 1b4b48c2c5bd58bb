// Line charts over training steps, as SVG.

import {h, s} from "./dom.js";
import {integer, number} from "./text.js";
import {MUTED, ink} from "./palette.js";
import {THEME} from "./theme.js";

export const CHART = {left: 58, right: 14, top: 8, bottom: 18};

/**
 * The axis of steps: `x(step)` in pixels, and `back(x)`. A logarithmic axis uses log(step + 1) and so includes 0.
 * `right` is the space at its right, which a second axis of values needs.
 */
export function timeScale(first, last, width, log, right = CHART.right) {
  const to = log ? (step) => Math.log10(Math.max(step, 0) + 1) : (step) => step;
  const [a, b] = [to(first), Math.max(to(last), to(first) + 1e-9)];
  const span = Math.max(1, width - CHART.left - right);
  return {
    right,
    first,
    last,
    log,
    width,
    x: (step) => CHART.left + ((to(step) - a) / (b - a)) * span,
    back: (x) => {
      const value = a + ((x - CHART.left) / span) * (b - a);
      return log ? 10 ** value - 1 : value;
    },
  };
}

/** Whether steps are spaced roughly logarithmically: the same rule as in the figures. */
export function isLogSpaced(steps) {
  const distinct = [...new Set(steps)].sort((a, b) => a - b);
  const gaps = distinct.slice(1).map((step, i) => step - distinct[i]);
  if (gaps.length < 3) return false;
  const mean = (distinct[distinct.length - 1] - distinct[0]) / gaps.length;
  gaps.sort((a, b) => a - b);
  const middle = gaps.length >> 1;
  const median = gaps.length % 2 ? gaps[middle] : (gaps[middle - 1] + gaps[middle]) / 2;
  return median < THEME.steps.log_max_gap_ratio * mean;
}

function timeTicks(scale) {
  if (!scale.log) return niceTicks(scale.first, scale.last, Math.max(2, scale.width / 110));
  const ticks = scale.first <= 0 ? [0] : [];
  for (let power = 1; power <= scale.last; power *= 10) {
    for (const factor of [1, 2, 5]) {
      const step = power * factor;
      const hasSpace = ticks.length === 0 || scale.x(step) - scale.x(ticks[ticks.length - 1]) > 44;
      if (step >= scale.first && step <= scale.last && hasSpace) ticks.push(step);
    }
  }
  return ticks;
}

function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let tick = Math.ceil(low / step); tick * step <= high + 1e-9 * step; tick++) ticks.push(tick * step);
  return ticks;
}

/** The axis of values of `lineChart` with the same `series`, on `height` pixels. */
export function valueScale(series, height, log) {
  const values = [];
  for (const line of series) {
    line.values.forEach((value, i) => {
      const error = line.errors?.[i] ?? 0;
      for (const v of [value, value - error, value + error, line.low?.[i] ?? value, line.high?.[i] ?? value]) {
        if (value !== null && Number.isFinite(v) && (!log || v > 0)) values.push(v);
      }
    });
  }
  let [low, high] = values.length ? [values[0], values[0]] : log ? [1, 10] : [0, 1];
  for (const v of values) [low, high] = [Math.min(low, v), Math.max(high, v)];
  const to = log ? Math.log10 : (value) => value;
  // Start at zero if that takes less than half of the height.
  if (!log && low > 0 && low < 0.5 * high) low = 0;
  if (low === high)
    [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const [a, b] = [to(low), to(high)];
  const span = height - CHART.top - CHART.bottom;
  return {
    low,
    high,
    log,
    y: (value) => CHART.top + ((b - to(Math.max(value, log ? low : -Infinity))) / (b - a)) * span,
  };
}

function valueTicks(scale) {
  if (!scale.log) return niceTicks(scale.low, scale.high, 5);
  const powers = [];
  for (let p = Math.ceil(Math.log10(scale.low)); p <= Math.log10(scale.high); p++) powers.push(10 ** p);
  if (powers.length < 2) return [scale.low, scale.high];
  const every = Math.ceil(powers.length / 4);
  return powers.filter((_, i) => i % every === 0);
}

/** Whether to use a logarithmic axis: for positive values over more than two decades. */
export function wantsLog(series) {
  const values = series.flatMap((line) => line.values).filter((value) => value !== null && Number.isFinite(value));
  const low = Math.min(...values);
  return values.length > 0 && low > 0 && Math.max(...values) > 100 * low;
}

/**
 * A chart of `series`, each `{name, color, steps, values, errors?, dots?, dash?}`; `null` values are gaps. In place of `errors`, a
 * band can be given by `low` and `high`; `width` and `opacity` are those of the line.
 * `marks` are `{step, value, kind: "birth" | "death", text}`. `overlays` are other series with scales of their own, each
 * `{lines, log, color}`; a single one has its axis at the right.
 */
export function lineChart({series, time, height, log, marks = [], overlays = [], label}) {
  const scale = valueScale(series, height, log);
  const bottom = height - CHART.bottom;
  const svg = s("svg", {width: time.width, height, role: "img", "aria-label": label, class: "lib-chart"});
  for (const tick of valueTicks(scale)) {
    const y = scale.y(tick);
    svg.append(
      s("line", {x1: CHART.left, x2: time.width - time.right, y1: y, y2: y, class: "lib-grid"}),
      s(
        "text",
        {x: CHART.left - 6, y, class: "lib-tick", "text-anchor": "end", "dominant-baseline": "central"},
        number(tick),
      ),
    );
  }
  svg.append(s("line", {x1: CHART.left, x2: time.width - time.right, y1: bottom, y2: bottom, class: "lib-axis"}));
  for (const tick of timeTicks(time)) {
    const x = time.x(tick);
    svg.append(
      s("line", {x1: x, x2: x, y1: bottom, y2: bottom + 3, class: "lib-axis"}),
      s("text", {x, y: bottom + 13, class: "lib-tick", "text-anchor": "middle"}, integer(tick)),
    );
  }
  for (const line of series) svg.append(...drawLine(line, time, scale));
  for (const {lines, log: isLog, color} of overlays) {
    const own = valueScale(lines, height, isLog);
    for (const line of lines) svg.append(...drawLine(line, time, own));
    if (overlays.length === 1) svg.append(...rightAxis(own, time, color));
  }
  for (const mark of marks) {
    const [x, y] = [time.x(mark.step), scale.y(mark.value)];
    const shape =
      mark.kind === "birth"
        ? s("circle", {cx: x, cy: y, r: 4.5, fill: "var(--paper)", stroke: ink(mark.color ?? MUTED), "stroke-width": 1.8})
        : s("path", {d: `M${x - 4} ${y - 4}l8 8m0 -8l-8 8`, stroke: ink(mark.color ?? MUTED), "stroke-width": 1.8});
    shape.append(s("title", {}, mark.text));
    svg.append(shape);
  }
  return svg;
}

function rightAxis(scale, time, color) {
  const x = time.width - time.right;
  return valueTicks(scale).flatMap((tick) => [
    s("line", {x1: x, x2: x + 4, y1: scale.y(tick), y2: scale.y(tick), stroke: ink(color), "stroke-width": 2}),
    s(
      "text",
      {x: x + 7, y: scale.y(tick), class: "lib-tick lib-tick-right", "dominant-baseline": "central"},
      number(tick),
    ),
  ]);
}

function drawLine(line, time, scale) {
  const parts = [];
  let part = [];
  line.steps.forEach((step, i) => {
    const value = step < time.first ? null : line.values[i];
    if (value === null || !Number.isFinite(value) || (scale.log && value <= 0)) {
      if (part.length) parts.push(part);
      part = [];
    } else {
      const error = line.errors?.[i] ?? 0;
      const [low, high] = [line.low?.[i] ?? value - error, line.high?.[i] ?? value + error];
      part.push({x: time.x(step), y: scale.y(value), low: scale.y(low), high: scale.y(high)});
    }
  });
  if (part.length) parts.push(part);
  const at = (x, y) => `${x.toFixed(1)} ${y.toFixed(1)}`;
  const elements = [];
  for (const points of parts) {
    if (line.errors || line.low) {
      const outline = [...points.map((p) => at(p.x, p.high)), ...[...points].reverse().map((p) => at(p.x, p.low))];
      elements.push(s("path", {d: `M${outline.join("L")}Z`, fill: ink(line.color), opacity: 0.16, stroke: "none"}));
    }
    const d = `M${points.map((p) => at(p.x, p.y)).join("L")}`;
    const {width = 1.6, opacity, dash} = line;
    if (points.length > 1 && width > 0) {
      const stroke = {stroke: ink(line.color), "stroke-width": width, "stroke-linejoin": "round", "stroke-dasharray": dash};
      elements.push(s("path", {d, fill: "none", opacity, ...stroke}));
    }
    if ((points.length === 1 && width > 0) || (line.dots && points.length < 60)) {
      for (const p of points) elements.push(s("circle", {cx: p.x, cy: p.y, r: 2, fill: ink(line.color)}));
    }
  }
  return elements;
}

/** Color, name and current value of each line. */
export function chartKey(entries) {
  return entries.map(({name, color, value, dash}) =>
    h(
      "span",
      {class: "lib-key"},
      lineSwatch(color, dash),
      name ? `${name} ` : "",
      h("b", {}, value),
    ),
  );
}

/** A piece of a line as it is drawn, for a key. */
export function lineSwatch(color, dash) {
  if (!dash) return h("span", {class: "lib-line-swatch", style: {background: ink(color)}});
  return s(
    "svg",
    {width: 26, height: 6, class: "lib-dash-swatch lib-chart", "aria-hidden": "true"},
    s("line", {x1: 0, x2: 26, y1: 3, y2: 3, stroke: ink(color), "stroke-width": 2.4, "stroke-dasharray": dash}),
  );
}
