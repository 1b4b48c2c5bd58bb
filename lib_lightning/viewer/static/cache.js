// Snapshots of one run, fetched when needed or shortly before, and not all kept.

// A film of 200 large snapshots would be hundreds of megabytes as objects.
const KEPT = 32;

/** A bounded cache over `source.snapshot`. */
export class SnapshotCache {
  constructor(source, name) {
    this.source = source;
    this.name = name;
    this.pending = new Map();
    this.ready = new Map();
    this.turn = 0;
  }

  /** The snapshot if it is here. */
  peek(step) {
    return this.ready.get(step) ?? null;
  }

  /** The snapshot, fetched if need be. A failure is not kept: the next call tries again. */
  get(step) {
    const here = this.ready.get(step);
    if (here) {
      this.#keep(step, here);
      return Promise.resolve(here);
    }
    if (!this.pending.has(step)) {
      const fetched = this.source
        .snapshot(this.name, step)
        .then((snapshot) => {
          this.#keep(step, snapshot);
          return snapshot;
        })
        .finally(() => this.pending.delete(step));
      this.pending.set(step, fetched);
    }
    return this.pending.get(step);
  }

  /** Fetch what will probably be asked for next, one after the other, until something else is. */
  async prefetch(steps) {
    const turn = ++this.turn;
    for (const step of steps) {
      if (turn !== this.turn) return;
      // What fails here is asked for again, and reported, when it is to be shown.
      if (!this.ready.has(step)) await this.get(step).catch(() => null);
    }
  }

  #keep(step, snapshot) {
    this.ready.delete(step);
    this.ready.set(step, snapshot);
    // A Map lists its keys in the order of arrival: the first is the one not used for longest.
    while (this.ready.size > KEPT) this.ready.delete(this.ready.keys().next().value);
  }
}
