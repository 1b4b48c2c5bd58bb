// The outline of a run: lineages with births and deaths, ranks, and modules over time.

import {MODULE_COLORS, OTHER_MODULES, NO_MODULE} from "./palette.js";

/** The history of one run; `layers` and `snapshots` as in `run()` of a data source. */
export class History {
  constructor(run) {
    this.run = run;
    this.layers = run.layers;
    this.snapshots = run.snapshots;
    this.steps = run.snapshots.map((snapshot) => snapshot.step);
    this.order = this.snapshots.map((snapshot) => snapshot.layers.map((layer) => byImportance(layer.importance)));
    this.first = this.layers.map(() => new Map());
    this.last = this.layers.map(() => new Map());
    this.parents = this.layers.map(() => new Map());
    this.snapshots.forEach((snapshot, k) => snapshot.layers.forEach((layer, l) => this.#register(layer, l, k)));
    this.tracks = moduleTracks(this);
    this.colors = trackColors(this.tracks);
    this.hasModules = this.snapshots.some((snapshot) => snapshot.layers.some((layer) => layer.modules));
    this.labelGroups = labelColors(run.labels);
    this.indices = new Map();
  }

  #register(layer, l, k) {
    for (let i = 0; i < layer.importance.length; i++) {
      const id = layer.ids ? layer.ids[i] : i;
      if (!this.first[l].has(id)) {
        this.first[l].set(id, k);
        const parent = layer.parents?.[i];
        if (parent !== null && parent !== undefined && parent >= 0) this.parents[l].set(id, parent);
      }
      this.last[l].set(id, k);
    }
  }

  /** Lineage id of feature i, or its index if features have no lineages. */
  lineage(k, l, i) {
    const ids = this.snapshots[k].layers[l].ids;
    return ids ? ids[i] : i;
  }

  /** Whether the features of a layer have lineages. */
  isTracked(k, l) {
    return this.snapshots[k].layers[l].ids !== null && this.snapshots[k].layers[l].ids !== undefined;
  }

  /** Index of a lineage's feature in snapshot k, -1 if absent. */
  featureOf(k, l, id) {
    const layer = this.snapshots[k].layers[l];
    if (!layer.ids) return id < layer.importance.length ? id : -1;
    const key = k * this.layers.length + l;
    let indices = this.indices.get(key);
    if (!indices) this.indices.set(key, (indices = new Map(layer.ids.map((other, i) => [other, i]))));
    return indices.get(id) ?? -1;
  }

  /** Rank by importance, starting at 1. */
  rank(k, l, i) {
    return this.order[k][l].indexOf(i) + 1;
  }

  /** Index of the last snapshot at or before a step, -1 if there is none. */
  at(step) {
    let k = this.steps.length - 1;
    while (k >= 0 && this.steps[k] > step) k -= 1;
    return k;
  }

  /** Importance of a lineage in each snapshot, null where absent. */
  curve(l, id) {
    return this.snapshots.map((snapshot, k) => {
      const i = this.featureOf(k, l, id);
      return i < 0 ? null : snapshot.layers[l].importance[i];
    });
  }

  /** Colour of a feature's module, the same in all snapshots in which the module is recognised. */
  moduleColor(k, l, i) {
    const track = this.tracks[k][l][i];
    return track < 0 ? NO_MODULE : (this.colors[k].get(track) ?? OTHER_MODULES);
  }

  /** Text about the first snapshot of a lineage. */
  birth(l, id) {
    const k = this.first[l].get(id);
    if (k === undefined) return "";
    if (k === 0) return "present from the start";
    const parent = this.parents[l].get(id);
    // Parents are given in the first snapshot of a lineage. Without one, a thinned film may have skipped that snapshot.
    const late = this.run.every > 1 && parent === undefined ? " at the latest" : "";
    const from = parent === undefined ? "" : `, split from ${this.layers[l].name}/${parent}`;
    return `since step ${this.steps[k].toLocaleString("en-US")}${late}${from}`;
  }
}

function byImportance(importance) {
  const order = Array.from(importance, (_, i) => i);
  // Most bases are already sorted, except for single neurons.
  let sorted = true;
  for (let i = 1; i < importance.length && sorted; i++) sorted = importance[i] <= importance[i - 1];
  return sorted ? order : order.sort((a, b) => importance[b] - importance[a] || a - b);
}

/** A track of each feature's module, which is the same over time, -1 for no module. */
function moduleTracks(history) {
  const lastTrack = history.layers.map(() => new Map());
  let next = 0;
  return history.snapshots.map((snapshot, k) => {
    const votes = new Map();
    forEachMember(history, k, (l, i, module) => {
      const layer = snapshot.layers[l];
      const track = lastTrack[l].get(history.lineage(k, l, i));
      if (!votes.has(module)) votes.set(module, new Map());
      // Important features have more weight in recognising a module than the many small ones.
      const weight = Math.sqrt(Math.max(layer.importance[i], 0) / (layer.importance[history.order[k][l][0]] || 1));
      if (track !== undefined) votes.get(module).set(track, (votes.get(module).get(track) ?? 0) + weight);
    });
    const pairs = [...votes].flatMap(([module, of]) => [...of].map(([track, weight]) => ({module, track, weight})));
    pairs.sort((a, b) => b.weight - a.weight || a.track - b.track || a.module - b.module);
    const trackOf = new Map();
    const assigned = new Set();
    for (const {module, track} of pairs) {
      if (trackOf.has(module) || assigned.has(track)) continue;
      trackOf.set(module, track);
      assigned.add(track);
    }
    for (const module of [...votes.keys()].sort((a, b) => a - b)) {
      if (!trackOf.has(module)) trackOf.set(module, next++);
    }
    const tracks = snapshot.layers.map((layer) => new Int32Array(layer.importance.length).fill(-1));
    forEachMember(history, k, (l, i, module) => {
      tracks[l][i] = trackOf.get(module);
      lastTrack[l].set(history.lineage(k, l, i), tracks[l][i]);
    });
    return tracks;
  });
}

function forEachMember(history, k, visit) {
  history.snapshots[k].layers.forEach((layer, l) => {
    layer.modules?.forEach((module, i) => {
      if (module !== null && module >= 0) visit(l, i, module);
    });
  });
}

/** Colours of the largest modules in each snapshot. A module keeps its colour until it disappears. */
function trackColors(tracks) {
  const holders = new Map();
  const seen = new Map();
  return tracks.map((layers, k) => {
    const sizes = trackSizes(layers);
    for (const track of sizes.keys()) seen.set(track, k);
    const largest = [...sizes].filter(([, size]) => size > 1).sort((a, b) => b[1] - a[1] || a[0] - b[0]);
    for (const [track] of largest.slice(0, MODULE_COLORS.length)) {
      if ([...holders.values()].includes(track)) continue;
      const free = MODULE_COLORS.filter((color) => !sizes.has(holders.get(color)));
      // First colours that were never used, then that of the module that disappeared longest ago.
      free.sort((a, b) => (seen.get(holders.get(a)) ?? -1) - (seen.get(holders.get(b)) ?? -1));
      if (free.length) holders.set(free[0], track);
    }
    return new Map([...holders].filter(([, track]) => sizes.has(track)).map(([color, track]) => [track, color]));
  });
}

/** Number of features of each module, over all layers. */
export function trackSizes(layers) {
  const sizes = new Map();
  for (const tracks of layers) {
    for (const track of tracks) if (track >= 0) sizes.set(track, (sizes.get(track) ?? 0) + 1);
  }
  return sizes;
}

/** The group of a label: its first word ("k=17" of "k=17 a+b 93%"). */
export function labelGroup(label) {
  return label ? label.split(/\s/)[0] : "";
}

function labelColors(labels) {
  const counts = new Map();
  for (const layer of labels ?? []) {
    for (const label of Object.values(layer)) {
      const group = labelGroup(label);
      if (group) counts.set(group, (counts.get(group) ?? 0) + 1);
    }
  }
  const common = [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1)).map(([group]) => group);
  return new Map(common.map((group, i) => [group, MODULE_COLORS[i] ?? OTHER_MODULES]));
}
