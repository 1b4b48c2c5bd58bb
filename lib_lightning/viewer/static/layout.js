// Vertical positions of features. Heights go from 0 (top) to 1; a lineage keeps its height while it is shown.

import {moduleSizes} from "./history.js";
import {THEME} from "./theme.js";

// Columns with few dots are centred instead of being spread over the height; gaps between modules, in intervals.
const {min_intervals: MIN_INTERVALS, module_gap: MODULE_GAP} = THEME.column;

/**
 * Heights by lineage: `frames[k][l] = {shown: feature indices, heights, slots}`. The slot of a lineage depends only on
 * earlier snapshots, so that positions do not change while a run is being written, except when the number of slots
 * grows with the largest snapshot. `reserved` has the slots of features that another run shares (see shared.js).
 */
export function heightsByLineage(history, limit, reserved = null) {
  const columns = history.layers.map((_, l) => new Column(history, l, limit, reserved?.[l]));
  return history.snapshots.map((_, k) => {
    const shown = columns.map((column) => column.begin(k));
    const anchors = new Anchors(history, k, shown);
    for (const column of columns) column.forEachAssigned((i, height) => anchors.add(column.l, i, height));
    for (const column of columns) column.assignSlots(anchors);
    return columns.map((column) => column.frame());
  });
}

/** Mean height of each module's features that have a slot, to place new ones near them. */
class Anchors {
  constructor(history, k, shown) {
    this.modules = history.modules[k];
    this.sums = new Map();
    this.first = new Map();
    if (k > 0) return;
    // At the start, modules are ordered by size from the top, and features in no module are at the bottom.
    const sizes = moduleSizes(shown.map((column, l) => column.map((i) => this.modules[l][i])));
    const order = [...sizes].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
    const total = shown.reduce((sum, column) => sum + column.length, 0);
    let above = 0;
    for (const [module, size] of order) {
      this.first.set(module, (above + size / 2) / total);
      above += size;
    }
  }

  add(l, i, height) {
    const module = this.modules[l][i];
    if (module < 0) return;
    const [sum, count] = this.sums.get(module) ?? [0, 0];
    this.sums.set(module, [sum + height, count + 1]);
  }

  /** Height of a feature's module; null if it is in none, or if the module is new. */
  of(l, i) {
    const module = this.modules[l][i];
    if (this.first.has(module)) return this.first.get(module);
    const found = this.sums.get(module);
    return found ? found[0] / found[1] : null;
  }
}

/** The slots of one node layer, and the lineages that occupy them. */
class Column {
  constructor(history, l, limit, reserved) {
    this.history = history;
    this.l = l;
    this.limit = limit;
    const sizes = history.snapshots.map((snapshot) => snapshot.layers[l].importance.length);
    this.fixed = history.layers[l].kind === "neuron" || !history.isTracked(0, l);
    // Neurons are ordered by their index among all neurons, shown or not.
    const neurons = history.layers[l].kind === "neuron";
    const most = Math.max(1, neurons ? Math.max(...sizes) : Math.min(limit, Math.max(...sizes)));
    this.reserved = reserved ?? {slotOf: () => null, first: 0, slots: most};
    this.slots = this.reserved.slots;
    this.occupants = new Array(this.slots).fill(null);
    this.lastSlot = new Map();
  }

  begin(k) {
    this.k = k;
    const order = this.history.order[k][this.l];
    this.shown = order.length <= this.limit ? order : order.slice(0, this.limit);
    this.ids = this.shown.map((i) => this.history.lineage(k, this.l, i));
    const present = new Set(this.ids);
    this.occupants = this.occupants.map((id) => (id !== null && present.has(id) ? id : null));
    return this.shown;
  }

  forEachAssigned(visit) {
    const featureOf = new Map(this.ids.map((id, rank) => [id, this.shown[rank]]));
    this.occupants.forEach((id, slot) => {
      if (id !== null) visit(featureOf.get(id), this.#height(slot));
    });
  }

  /** Assign a slot to each lineage without one, in order of importance. */
  assignSlots(anchors) {
    const placed = new Set(this.occupants);
    this.ids.forEach((id, rank) => {
      if (placed.has(id)) return;
      const index = Math.min(this.shown[rank], this.slots - 1);
      const own = this.reserved.slotOf(this.k, id);
      const slot = own ?? this.#nearestFree(this.fixed ? index : this.#target(id, rank, anchors));
      this.occupants[slot] = id;
      this.lastSlot.set(id, slot);
      anchors.add(this.l, this.shown[rank], this.#height(slot));
    });
  }

  #target(id, rank, anchors) {
    if (this.lastSlot.has(id)) return this.lastSlot.get(id);
    const parent = this.history.parents[this.l].get(id);
    if (this.lastSlot.has(parent)) return this.lastSlot.get(parent);
    const anchor = anchors.of(this.l, this.shown[rank]);
    if (anchor !== null) return this.#slotAt(anchor);
    if (!this.history.hasModules) return rank;
    // A new module gets the widest gap; features in no module are at the bottom.
    return anchors.modules[this.l][this.shown[rank]] < 0 ? this.slots - 1 : this.#widestGap();
  }

  #nearestFree(target) {
    for (let distance = 0; distance < this.slots; distance++) {
      for (const slot of [target + distance, target - distance]) {
        if (slot >= this.reserved.first && this.occupants[slot] === null) return slot;
      }
    }
    throw new Error("no free slot in a column: more features than slots");
  }

  #widestGap() {
    const {first} = this.reserved;
    let [start, best, middle] = [first, 0, first];
    for (let slot = first; slot <= this.slots; slot++) {
      if (slot < this.slots && this.occupants[slot] === null) continue;
      if (slot - start > best) [best, middle] = [slot - start, (start + slot - 1) >> 1];
      start = slot + 1;
    }
    return middle;
  }

  #slotAt(height) {
    const span = spanOf(this.slots);
    const slot = span > 0 ? ((height - 0.5) / span + 0.5) * (this.slots - 1) : 0;
    return Math.min(this.slots - 1, Math.max(0, Math.round(slot)));
  }

  #height(slot) {
    return this.slots > 1 ? 0.5 + spanOf(this.slots) * (slot / (this.slots - 1) - 0.5) : 0.5;
  }

  frame() {
    const slot = new Map(this.occupants.map((id, at) => [id, at]));
    return {shown: this.shown, heights: this.ids.map((id) => this.#height(slot.get(id))), slots: this.slots};
  }
}

function spanOf(slots) {
  return Math.min(1, Math.max(slots - 1, 0) / MIN_INTERVALS);
}

/** Heights by the modules of one snapshot: a module has the same height in all columns, as in the figures. */
export function heightsByModule(history, k, limit) {
  const shown = history.order[k].map((order, l) => {
    const column = order.slice(0, limit);
    return history.layers[l].kind === "neuron" ? column.sort((a, b) => a - b) : column;
  });
  const modules = shown.map((column, l) => column.map((i) => history.modules[k][l][i]));
  const sizes = moduleSizes(modules);
  const bands = [...sizes]
    .sort((a, b) => b[1] - a[1] || a[0] - b[0])
    .map(([module]) => module)
    .concat(-1);
  const most = bands.map((band) => Math.max(...modules.map((column) => column.filter((m) => m === band).length)));
  const total = most.reduce((sum, n) => sum + (n ? n + MODULE_GAP : 0), -MODULE_GAP);
  const scale = Math.max(total - 1, MIN_INTERVALS);
  return shown.map((column, l) => {
    const heights = new Array(column.length);
    let above = (scale - total + 1) / 2;
    bands.forEach((band, b) => {
      const members = column.map((_, n) => n).filter((n) => modules[l][n] === band);
      members.forEach((n, slot) => {
        heights[n] = (above + (most[b] - members.length) / 2 + slot) / scale;
      });
      above += most[b] ? most[b] + MODULE_GAP : 0;
    });
    return {shown: column, heights, slots: Math.max(1, Math.round(scale + 1))};
  });
}
