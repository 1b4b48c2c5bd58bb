// Where a curve changes most steeply: the same rule, with the same numbers, as lib_lightning.alignment.steepest_change,
// which explains it.

const PART = 1 / 4;
const WINDOWS = [1 / 20, 1 / 10, 1 / 5];
const MIN_POINTS = 5;
const CLEAR = 3.0,
  TOLD_APART = 2.0,
  SLOWER = 1.1;
const MEDIAN = 1.2533,
  NINETY = 1.6449,
  ROUNDING = 1e-9;

/**
 * The steepest change of a curve: `{step, first, last, direction, before, after, reason}`, where `reason` says why there
 * is none. `direction` is "rise", "fall" or "either"; values may be null.
 */
export function steepestChange(steps, values, {direction = "either", log = false} = {}) {
  const points = new Map(steps.map((step, i) => [step, values[i]]));
  const kept = [...points].filter(([, y]) => Number.isFinite(y)).sort((a, b) => a[0] - b[0]);
  if (kept.length < MIN_POINTS) return none(`has ${kept.length} points; ${MIN_POINTS} are needed`);
  const y = kept.map(([, value]) => value);
  const x = kept.map(([step]) => (log ? Math.log10(Math.max(step, 0) + 1) : step));
  const size = y.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);
  let found = null;
  for (const width of WINDOWS) {
    found = steepest(x, smoothed(x, y, width), size, direction);
    if (!found.reason) break;
  }
  if (found.reason) return found;
  const back = log ? (at) => 10 ** at - 1 : (at) => at;
  return {...found, step: back(found.step), first: back(found.first), last: back(found.last)};
}

/** As the end of a sentence about the curve. */
export function changeText(change, integer) {
  if (change.reason) return change.reason;
  const verb = change.direction === "rise" ? "rises" : "falls";
  return `${verb} most steeply at step ${integer(change.step)} (${integer(change.first)} to ${integer(change.last)})`;
}

function none(reason) {
  return {step: null, first: null, last: null, direction: "", before: null, after: null, reason};
}

function smoothed(x, y, width) {
  const n = x.length;
  const half = (width / 2) * (x[n - 1] - x[0]);
  const reach = [];
  const smooth = [];
  for (let i = 0, low = 0, high = 0; i < n; i++) {
    while (x[low] < x[i] - half) low += 1;
    while (high < n - 1 && x[high + 1] <= x[i] + half) high += 1;
    const wanted = x[i] + half > x[n - 1] ? i - low : Math.min(i - low, high - i);
    const r = Math.min(Math.max(wanted, 2), i, (n - 1) >> 1);
    const begin = Math.min(i - r, n - 1 - 2 * r);
    reach.push(r);
    smooth.push(y.slice(begin, begin + 2 * r + 1).sort((a, b) => a - b)[r]);
  }
  const extrapolated = smooth[1] + ((smooth[1] - smooth[2]) * (x[1] - x[0])) / (x[2] - x[1]);
  smooth[0] = [y[0], smooth[1], extrapolated].sort((a, b) => a - b)[1];
  const residuals = y.map((value, i) => Math.abs(value - smooth[i])).sort((a, b) => a - b);
  const at = 0.9 * (n - 1);
  const below = Math.floor(at);
  const above = residuals[Math.min(below + 1, n - 1)];
  const noise = (residuals[below] + (above - residuals[below]) * (at - below)) / NINETY;
  return {smooth, error: reach.map((r) => (MEDIAN * noise) / Math.sqrt(2 * Math.max(r, 1) + 1))};
}

function steepest(x, {smooth, error}, size, direction) {
  let [low, high] = [smooth[0], smooth[0]];
  for (const value of smooth) [low, high] = [Math.min(low, value), Math.max(high, value)];
  if (high - low <= ROUNDING * size) return none("does not change");
  const part = PART * (high - low);
  let chosen = null;
  for (const [name, sign] of [
    ["fall", -1],
    ["rise", 1],
  ]) {
    if (direction !== "either" && direction !== name) continue;
    const found = stretches(
      x,
      smooth.map((value) => sign * value),
      part,
    );
    const shortest = found.reduce((least, [begin, end]) => Math.min(least, end - begin), Infinity);
    if (shortest < (chosen?.shortest ?? Infinity)) chosen = {shortest, name, found};
  }
  if (!chosen) return none(`does not ${direction} by a quarter of its range`);
  const {shortest, name, found} = chosen;
  const best = found.findIndex(([begin, end]) => end - begin === shortest);
  const uncertain = Math.hypot(interpolated(found[best][0], x, error), interpolated(found[best][1], x, error));
  if (part < CLEAR * uncertain) return none("has no change that stands out of its noise");
  const slower = 1 / (1 - Math.min(0.9, (TOLD_APART * uncertain) / part));
  const close = found.map(([begin, end]) => end - begin <= Math.max(SLOWER, slower) * shortest);
  const [first, last] = hull(found.filter((_, k) => close[k]));
  const [begin, end] = together(found, close, best);
  return {
    step: (begin + end) / 2,
    first,
    last,
    direction: name,
    before: interpolated(first, x, smooth),
    after: interpolated(last, x, smooth),
    reason: "",
  };
}

/** Begin and end of the stretches that cannot be told apart and overlap, or are neighbours. */
function together(found, close, best) {
  let [low, high, previous] = [0, 0, -1];
  for (const [i, [begin, end]] of found.entries()) {
    if (!close[i]) continue;
    if (previous < 0 || (begin > high && i !== previous + 1)) {
      if (previous >= best) break;
      [low, high] = [begin, end];
    }
    [high, previous] = [Math.max(high, end), i];
  }
  return [low, high];
}

function hull(pairs) {
  return pairs.reduce(([low, high], [begin, end]) => [Math.min(low, begin), Math.max(high, end)], [Infinity, -Infinity]);
}

function stretches(x, y, part) {
  const n = x.length;
  const found = [];
  for (let i = 0; i < n; i++) {
    const level = y[i] + part;
    let j = i + 1;
    while (j < n && y[j] < level) j += 1;
    found.push([x[i], j < n ? crossing(x, y, j - 1, level) : Infinity]);
  }
  for (let j = 0; j < n; j++) {
    const level = y[j] - part;
    let i = j - 1;
    while (i >= 0 && y[i] > level) i -= 1;
    if (i >= 0) found.push([crossing(x, y, i, level), x[j]]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}

function crossing(x, y, i, level) {
  const rise = y[i + 1] - y[i];
  return rise === 0 ? x[i] : x[i] + ((x[i + 1] - x[i]) * (level - y[i])) / rise;
}

function interpolated(at, x, y) {
  let i = 0;
  while (i < x.length - 2 && x[i + 1] <= at) i += 1;
  if (at <= x[0]) return y[0];
  if (at >= x[x.length - 1]) return y[y.length - 1];
  return y[i] + ((y[i + 1] - y[i]) / (x[i + 1] - x[i])) * (at - x[i]);
}
