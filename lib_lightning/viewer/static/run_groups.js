// Groups of runs by parts of their paths, and the mean and spread of their curves.

// Names of folders that only number the runs of one setting: "seed3", "version_0", "17".
const REPETITION = /^(seeds?|s|version|v|runs?|rep|replica|trial|fold|init|rng|random)?[-_= ]*\d+$/i;
// Steps at which means are drawn, at most.
const MAX_STEPS = 400;

/** Folders of a run above its own, which is the last part of its name and says what kind of basis it has. */
function foldersOf(name) {
  return name.split("/").slice(0, -1);
}

function lastPart(name) {
  return name.slice(name.lastIndexOf("/") + 1);
}

const ORDINALS = ["1st", "2nd", "3rd"];

/**
 * Ways to group runs, `{id, text, keyOf}`: "all runs together", by each folder that differs, and by such a folder without
 * the number at its end. Ways that leave every run alone, or that group like another one, are left out.
 */
export function groupings(names) {
  const candidates = [{id: "all", text: "all runs together", keyOf: () => ""}];
  const depth = Math.max(0, ...names.map((name) => foldersOf(name).length));
  for (let i = 0; i < depth; i++) {
    const place = `${ORDINALS[i] ?? `${i + 1}th`} folder`;
    const part = (name) => foldersOf(name)[i] ?? "";
    candidates.push({id: `folder${i}`, text: place, keyOf: part, repeats: names.every((name) => REPETITION.test(part(name)))});
    const stem = (name) => part(name).replace(/[-_= ]*\d+$/, "");
    candidates.push({id: `stem${i}`, text: `${place} without its number`, keyOf: stem});
  }
  for (let i = 0; i < depth; i++) {
    const rest = (name) => foldersOf(name).filter((_, k) => k !== i).join("/");
    candidates.push({id: `rest${i}`, text: `all folders but the ${ORDINALS[i] ?? `${i + 1}th`}`, keyOf: rest});
  }
  const seen = new Set();
  return candidates
    .filter(({id, keyOf}) => {
      const numbered = new Map();
      const partition = names.map((name) => {
        const key = groupKey(name, keyOf);
        if (!numbered.has(key)) numbered.set(key, numbered.size);
        return numbered.get(key);
      });
      const text = partition.join(" ");
      const useful = id === "all" || numbered.size < names.length;
      if (!useful || seen.has(text)) return false;
      seen.add(text);
      return true;
    })
    .map((one) => ({...one, text: describe(one, names)}));
}

/** A grouping with examples of its groups. */
function describe({id, text, keyOf}, names) {
  if (id === "all") return text;
  const keys = [...new Set(names.map(keyOf))].filter(Boolean);
  const some = keys.slice(0, 3).join(", ");
  return `${text}: ${some}${keys.length > 3 ? ", …" : ""}`;
}

/** The first folder that differs and does not merely number runs, or else all runs together. */
export function defaultGrouping(ways) {
  return (ways.find(({id, repeats}) => id !== "all" && !repeats && !id.startsWith("rest")) ?? ways[0]).id;
}

function groupKey(name, keyOf) {
  return `${keyOf(name)}\n${lastPart(name)}`;
}

/** Groups `{name, runs}` of the names of runs. Bases are never mixed: the last part of a path always groups. */
export function groupRuns(names, keyOf) {
  const several = new Set(names.map(lastPart)).size > 1;
  const groups = new Map();
  for (const name of names) {
    const key = groupKey(name, keyOf);
    if (!groups.has(key)) {
      const parts = [keyOf(name), several || !keyOf(name) ? lastPart(name) : ""].filter(Boolean);
      groups.set(key, {name: parts.join(" · "), runs: []});
    }
    groups.get(key).runs.push(name);
  }
  return [...groups.values()];
}

/** The value of a curve at a step, linear between its points; null outside of them. */
export function valueAt({steps, values}, step) {
  let low = 0;
  let high = steps.length - 1;
  if (high < 0 || step < steps[0] || step > steps[high]) return null;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle;
  }
  if (steps[high] === step) return values[high];
  if (steps[low] === step || high === low) return values[low];
  return values[low] + ((values[high] - values[low]) * (step - steps[low])) / (steps[high] - steps[low]);
}

/** A curve without points that are no numbers. */
export function finite({steps, values, ...rest}) {
  const kept = steps.map((_, i) => i).filter((i) => values[i] !== null && Number.isFinite(values[i]));
  return {...rest, steps: kept.map((i) => steps[i]), values: kept.map((i) => values[i])};
}

/** Number of runs that have values at a step, with mean, standard deviation over runs, smallest and largest value. */
export function statisticsAt(curves, step) {
  const found = curves.map((curve) => valueAt(curve, step)).filter((value) => value !== null);
  const n = found.length;
  if (!n) return {n};
  const mean = found.reduce((sum, value) => sum + value, 0) / n;
  const squares = found.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  return {n, mean, sd: n > 1 ? Math.sqrt(squares / (n - 1)) : null, min: Math.min(...found), max: Math.max(...found)};
}

/**
 * Mean and spread of curves over the steps of all of them: `{steps, n, mean, sd, min, max}`, arrays of equal lengths.
 * Steps with values of less than two runs are left out.
 */
export function summary(curves) {
  const all = [...new Set(curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
  const every = Math.max(1, Math.ceil(all.length / MAX_STEPS));
  const steps = all.filter((_, i) => i % every === 0 || i === all.length - 1);
  const found = {steps: [], n: [], mean: [], sd: [], min: [], max: []};
  for (const step of steps) {
    const at = statisticsAt(curves, step);
    if (at.n < 2) continue;
    found.steps.push(step);
    for (const key of ["n", "mean", "sd", "min", "max"]) found[key].push(at[key]);
  }
  return found;
}

/** The last step at which all curves have values, null if there is none. */
export function lastCommonStep(curves) {
  if (!curves.length || curves.some(({steps}) => !steps.length)) return null;
  const first = Math.max(...curves.map(({steps}) => steps[0]));
  const last = Math.min(...curves.map(({steps}) => steps[steps.length - 1]));
  return last >= first ? last : null;
}
