// A cache of one run's snapshots, with prefetching.

// 200 large snapshots would take hundreds of megabytes.
const MAX_SNAPSHOTS = 32;

/** A bounded cache of `source.snapshot`. */
export class SnapshotCache {
  constructor(source, name) {
    this.source = source;
    this.name = name;
    this.pending = new Map();
    this.ready = new Map();
    this.prefetchId = 0;
  }

  /** The snapshot if it is cached, or null. */
  peek(step) {
    return this.ready.get(step) ?? null;
  }

  /** The snapshot, fetched if necessary. Failures are not cached: the next call tries again. */
  get(step) {
    const cached = this.ready.get(step);
    if (cached) {
      this.#store(step, cached);
      return Promise.resolve(cached);
    }
    if (!this.pending.has(step)) {
      const fetched = this.source
        .snapshot(this.name, step)
        .then((snapshot) => {
          this.#store(step, snapshot);
          return snapshot;
        })
        .finally(() => this.pending.delete(step));
      this.pending.set(step, fetched);
    }
    return this.pending.get(step);
  }

  /** Fetch snapshots that will probably be needed next, one after the other; a later call cancels this one. */
  async prefetch(steps) {
    const id = ++this.prefetchId;
    for (const step of steps) {
      if (id !== this.prefetchId) return;
      // A failure here is ignored: the snapshot is requested again, and the error reported, when it is shown.
      if (!this.ready.has(step)) await this.get(step).catch(() => null);
    }
  }

  #store(step, snapshot) {
    this.ready.delete(step);
    this.ready.set(step, snapshot);
    // A Map iterates in order of insertion: the first key is the least recently used.
    while (this.ready.size > MAX_SNAPSHOTS) this.ready.delete(this.ready.keys().next().value);
  }
}
