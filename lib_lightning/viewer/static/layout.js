// How high each feature lies. Heights go from 0 (top) to 1; a lineage keeps its own for as long as it is shown.

import {trackSizes} from "./history.js";

// A short column keeps the spacing of a column of twelve, around the middle, instead of spreading to the rims.
const ROOMY = 11;
const GAP = 0.7;

/**
 * Heights by lineage: `frames[k][l] = {shown: feature indices, heights, places}`. Who gets which place depends on the past
 * alone, so that a run that is still being written does not jump; how many places there are, on the fullest snapshot.
 */
export function keptHeights(history, limit) {
  const columns = history.layers.map((_, l) => new Column(history, l, limit));
  return history.snapshots.map((_, k) => {
    const shown = columns.map((column) => column.begin(k));
    const anchors = new Anchors(history, k, shown);
    for (const column of columns) column.forEachPlaced((i, height) => anchors.add(column.l, i, height));
    for (const column of columns) column.place(anchors);
    return columns.map((column) => column.frame());
  });
}

/** Where the members of each module lie so far, so that newcomers can join them. */
class Anchors {
  constructor(history, k, shown) {
    this.tracks = history.tracks[k];
    this.sums = new Map();
    this.first = new Map();
    if (k > 0) return;
    // At the start the modules lie below each other, the largest on top; what is in none lies at the bottom.
    const sizes = trackSizes(shown.map((column, l) => column.map((i) => this.tracks[l][i])));
    const order = [...sizes].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
    const total = shown.reduce((sum, column) => sum + column.length, 0);
    let above = 0;
    for (const [track, size] of order) {
      this.first.set(track, (above + size / 2) / total);
      above += size;
    }
  }

  add(l, i, height) {
    const track = this.tracks[l][i];
    if (track < 0) return;
    const [sum, count] = this.sums.get(track) ?? [0, 0];
    this.sums.set(track, [sum + height, count + 1]);
  }

  /** Height at which a feature's module is; null for none, or for a module that begins here. */
  of(l, i) {
    const track = this.tracks[l][i];
    if (this.first.has(track)) return this.first.get(track);
    const found = this.sums.get(track);
    return found ? found[0] / found[1] : null;
  }
}

/** One node layer's places, some of them taken by lineages. */
class Column {
  constructor(history, l, limit) {
    this.history = history;
    this.l = l;
    this.limit = limit;
    const sizes = history.snapshots.map((snapshot) => snapshot.layers[l].importance.length);
    this.fixed = history.layers[l].kind === "neuron" || !history.followed(0, l);
    // Neurons keep the height of their index among all, shown or not.
    const neurons = history.layers[l].kind === "neuron";
    this.places = Math.max(1, neurons ? Math.max(...sizes) : Math.min(limit, Math.max(...sizes)));
    this.holders = new Array(this.places).fill(null);
    this.home = new Map();
  }

  begin(k) {
    this.k = k;
    const order = this.history.order[k][this.l];
    this.shown = order.length <= this.limit ? order : order.slice(0, this.limit);
    this.ids = this.shown.map((i) => this.history.lineage(k, this.l, i));
    const there = new Set(this.ids);
    this.holders = this.holders.map((id) => (id !== null && there.has(id) ? id : null));
    return this.shown;
  }

  forEachPlaced(visit) {
    const featureOf = new Map(this.ids.map((id, rank) => [id, this.shown[rank]]));
    this.holders.forEach((id, place) => {
      if (id !== null) visit(featureOf.get(id), this.#height(place));
    });
  }

  /** Give a place to all that have none, the most important first. */
  place(anchors) {
    const placed = new Set(this.holders);
    this.ids.forEach((id, rank) => {
      if (placed.has(id)) return;
      const own = Math.min(this.shown[rank], this.places - 1);
      const place = this.#free(this.fixed ? own : this.#wish(id, rank, anchors));
      this.holders[place] = id;
      this.home.set(id, place);
      anchors.add(this.l, this.shown[rank], this.#height(place));
    });
  }

  #wish(id, rank, anchors) {
    if (this.home.has(id)) return this.home.get(id);
    const parent = this.history.parents[this.l].get(id);
    if (this.home.has(parent)) return this.home.get(parent);
    const anchor = anchors.of(this.l, this.shown[rank]);
    if (anchor !== null) return this.#placeAt(anchor);
    if (!this.history.hasModules) return rank;
    // A module that begins here gets the widest gap; what is in no module lies at the bottom.
    return anchors.tracks[this.l][this.shown[rank]] < 0 ? this.places - 1 : this.#widestGap();
  }

  #free(wish) {
    for (let far = 0; far < this.places; far++) {
      for (const place of [wish + far, wish - far]) if (this.holders[place] === null) return place;
    }
    throw new Error("no free place in a column: more features than places");
  }

  #widestGap() {
    let [start, best, middle] = [0, 0, 0];
    for (let place = 0; place <= this.places; place++) {
      if (place < this.places && this.holders[place] === null) continue;
      if (place - start > best) [best, middle] = [place - start, (start + place - 1) >> 1];
      start = place + 1;
    }
    return middle;
  }

  #placeAt(height) {
    const span = spanOf(this.places);
    const place = span > 0 ? ((height - 0.5) / span + 0.5) * (this.places - 1) : 0;
    return Math.min(this.places - 1, Math.max(0, Math.round(place)));
  }

  #height(place) {
    return this.places > 1 ? 0.5 + spanOf(this.places) * (place / (this.places - 1) - 0.5) : 0.5;
  }

  frame() {
    const place = new Map(this.holders.map((id, at) => [id, at]));
    return {shown: this.shown, heights: this.ids.map((id) => this.#height(place.get(id))), places: this.places};
  }
}

function spanOf(places) {
  return Math.min(1, Math.max(places - 1, 0) / ROOMY);
}

/** Heights by the modules of one snapshot: each lies at one height in all columns, as in the figures. */
export function moduleHeights(history, k, limit) {
  const shown = history.order[k].map((order, l) => {
    const column = order.slice(0, limit);
    return history.layers[l].kind === "neuron" ? column.sort((a, b) => a - b) : column;
  });
  const tracks = shown.map((column, l) => column.map((i) => history.tracks[k][l][i]));
  const sizes = trackSizes(tracks);
  const bands = [...sizes]
    .sort((a, b) => b[1] - a[1] || a[0] - b[0])
    .map(([track]) => track)
    .concat(-1);
  const most = bands.map((band) => Math.max(...tracks.map((column) => column.filter((t) => t === band).length)));
  const total = most.reduce((sum, n) => sum + (n ? n + GAP : 0), -GAP);
  const scale = Math.max(total - 1, ROOMY);
  return shown.map((column, l) => {
    const heights = new Array(column.length);
    let above = (scale - total + 1) / 2;
    bands.forEach((band, b) => {
      const members = column.map((_, n) => n).filter((n) => tracks[l][n] === band);
      members.forEach((n, place) => {
        heights[n] = (above + (most[b] - members.length) / 2 + place) / scale;
      });
      above += most[b] ? most[b] + GAP : 0;
    });
    return {shown: column, heights, places: Math.max(1, Math.round(scale + 1))};
  });
}
