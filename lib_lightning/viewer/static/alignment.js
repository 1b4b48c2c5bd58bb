// How long before or after the steepest change of a scalar the events of each kind come: the same rule, with the same
// numbers, as lib_lightning.alignment.align_events, which explains it.

import {counted, integer} from "./text.js";

const ROUNDING = 1e-9;

/** The kind of an event; those of metrics are told from those of features. */
export function kindOf(event) {
  return event.layer === null || event.layer === undefined ? `metric ${event.kind}` : event.kind;
}

/** Offsets of all kinds of events, from runs `{change, events}`; a run without a steepest change is left out. */
export function alignEvents(runs) {
  const located = runs.filter(({change}) => change && !change.reason);
  const kinds = [...new Set(located.flatMap(({events}) => events.map(kindOf)))].sort();
  return kinds.map((kind) =>
    offsetsOf(
      kind,
      located.map(({change, events}) => ({
        change,
        events: events.filter((event) => kindOf(event) === kind).map((event) => [event.at ?? event.step, event.share ?? 1]),
      })),
    ),
  );
}

function offsetsOf(kind, all) {
  const runs = all.filter(({events}) => events.length);
  const medians = runs.map(({change, events}) => [change, weightedQuantile(events, 0.5)]);
  const own =
    runs.length === 1
      ? runs[0].events.map(([step, weight]) => [step - runs[0].change.step, weight])
      : medians.map(([change, step]) => [step - change.step, 1]);
  const before = medians.filter(([change, step]) => step < change.first).length;
  const after = medians.filter(([change, step]) => step > change.last).length;
  return {
    kind,
    num_events: runs.reduce((sum, {events}) => sum + events.length, 0),
    num_runs: runs.length,
    offset: weightedQuantile(own, 0.5),
    quartiles: [weightedQuantile(own, 0.25), weightedQuantile(own, 0.75)],
    before,
    within: runs.length - before - after,
    after,
  };
}

/** A quantile of `[value, weight]` pairs. */
export function weightedQuantile(values, q) {
  const anyWeight = values.some(([, weight]) => weight > 0);
  const ordered = values.map(([value, weight]) => [value, anyWeight ? weight : 1]).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const total = ordered.reduce((sum, [, weight]) => sum + weight, 0);
  let reached = 0;
  for (const [i, [value, weight]] of ordered.entries()) {
    reached += weight;
    if (reached > q * total + ROUNDING * total || i === ordered.length - 1) return value;
    if (reached >= q * total - ROUNDING * total && weight > 0) {
      const following = ordered.slice(i + 1).find(([, later]) => later > 0);
      return (value + (following ? following[0] : value)) / 2;
    }
  }
  return null;
}

function side(offset) {
  const steps = Math.round(Math.abs(offset));
  if (steps === 0) return "at";
  return `${counted(steps, "step")} ${offset < 0 ? "before" : "after"}`;
}

/** "median 340 steps before (quartiles 500 before to 120 before), n = 23, in 5 runs". */
export function offsetText({offset, quartiles, num_events: events, num_runs: runs}) {
  const short = quartiles.map((one) => {
    const steps = Math.round(Math.abs(one));
    return steps === 0 ? "0" : `${integer(steps)} ${one < 0 ? "before" : "after"}`;
  });
  const spread = runs === 1 && events === 1 ? "" : ` (quartiles ${short[0]} to ${short[1]})`;
  return `median ${side(offset)}${spread}, n = ${integer(events)}${runs > 1 ? `, in ${integer(runs)} runs` : ""}`;
}
