// The outline of a run: lineages with births and deaths, ranks, and modules over time.

import {moduleColor} from "./palette.js";
import {quoted} from "./text.js";

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
    // Number of each feature's module, -1 for none: the same over time.
    this.modules = this.snapshots.map((snapshot, k) =>
      snapshot.layers.map((layer) => moduleNumbers(layer, run.module_numbers[k])),
    );
    this.hasModules = this.snapshots.some((snapshot) => snapshot.layers.some((layer) => layer.modules));
    this.labelGroups = new Map(run.label_colors);
    this.hasOutputNames = Object.entries(run.output_names ?? {}).some(([id, name]) => id !== name);
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

  /** Name of an output, such as a class or a token; "" for other features, and for outputs without a name. */
  outputName(l, id) {
    const name = l === this.layers.length - 1 ? (this.run.output_names?.[id] ?? "") : "";
    // A class that is called by its number has that beside its dot already.
    return name === String(id) ? "" : quoted(name);
  }

  /** The newest label of a lineage, or the name of an output; "" for none. */
  labelOf(l, id) {
    return this.run.labels?.[l]?.[id] || this.outputName(l, id);
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

  /** Colour of a feature's module. */
  moduleColor(k, l, i) {
    return moduleColor(this.modules[k][l][i]);
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

/** The module of each feature of a layer; `numberOf` is for files of version 0.1, which numbered modules anew. */
function moduleNumbers({importance, modules}, numberOf) {
  return Int32Array.from(importance, (_, i) => {
    const module = modules?.[i] ?? -1;
    return module < 0 ? -1 : (numberOf?.[module] ?? module);
  });
}

/** Number of features of each module, over all layers. */
export function moduleSizes(layers) {
  const sizes = new Map();
  for (const modules of layers) {
    for (const module of modules) if (module >= 0) sizes.set(module, (sizes.get(module) ?? 0) + 1);
  }
  return sizes;
}

/** The group of a label, "k=17" of "k=17 a+b 93%": the same rule as in the figures. */
export function labelGroup(label) {
  return label.match(/^\S+=\S+/)?.[0] ?? label.replace(/\s*[0-9]+(\.[0-9]+)?%$/, "");
}
