// Which features of the runs shown together are the same, as comparisons of their snapshots have found.

import {integer} from "./text.js";

const SHARED = "shared";

/** `runs` are `{name, history}`. A comparison is of one snapshot of each run; lineages carry it to all others. */
export class SharedFeatures {
  constructor(runs) {
    this.histories = new Map(runs.map(({name, history}) => [name, history]));
    // By `run l id`: what comparisons say about a feature, one entry for each other run.
    this.found = new Map();
    // Steps of the snapshots that were compared, by run.
    this.steps = new Map();
    this.groups = new Groups();
    this.columns = new Groups();
    this.weights = new Map();
    runs.forEach((a, i) => {
      for (const b of runs.slice(i + 1)) this.#addPair(a, b);
    });
    this.#number();
  }

  /** Whether any of these runs have been compared with each other. */
  get exist() {
    return this.steps.size > 0;
  }

  #addPair(a, b) {
    for (const {history} of [a, b, ...[...this.histories.values()].map((other) => ({history: other}))]) {
      for (const {fingerprints, layers} of history.run.comparisons ?? []) {
        for (const [first, second] of [[a, b], [b, a]]) {
          const steps = [first, second].map((run, side) => run.history.run.fingerprints?.[fingerprints[side]]);
          if (steps.some((step) => step === undefined)) continue;
          this.#add([first, second], steps, layers);
          return;
        }
      }
    }
  }

  #add(runs, steps, layers) {
    runs.forEach(({name}, side) => this.steps.set(name, new Set([...(this.steps.get(name) ?? []), steps[side]])));
    for (const layer of layers) {
      const l = runs.map(({history}, side) => history.layers.findIndex(({name}) => name === [layer.a, layer.b][side]));
      if (l.includes(-1)) continue;
      const columns = runs.map(({name}, side) => `${name}\n${l[side]}`);
      this.columns.join(columns[0], columns[1]);
      runs.forEach(({name}, side) => {
        for (const [id, kind, similarity, p, importance] of layer.features[side]) {
          const key = `${columns[side]}\n${id}`;
          const list = this.found.get(key) ?? [];
          list.push({run: runs[1 - side].name, l: l[1 - side], side, kind, similarity, p, matches: []});
          this.found.set(key, list);
          this.weights.set(key, Math.max(this.weights.get(key) ?? 0, importance));
        }
      });
      for (const [idA, idB, kind, similarity, p] of layer.matches) {
        const ids = [idA, idB];
        const keys = columns.map((column, side) => `${column}\n${ids[side]}`);
        keys.forEach((key, side) => {
          const entry = this.found.get(key)?.find(({run}) => run === runs[1 - side].name);
          entry?.matches.push({id: ids[1 - side], kind, similarity, p});
        });
        if (kind === SHARED) this.groups.join(keys[0], keys[1], (key) => key.split("\n")[0]);
      }
    }
  }

  /** Number the shared features of each node layer by importance: this is their order, and their colour. */
  #number() {
    this.rows = new Map();
    const byColumn = new Map();
    for (const members of this.groups.all()) {
      const [run, l] = members[0].split("\n");
      const column = this.columns.of(`${run}\n${l}`);
      const weight = Math.max(...members.map((key) => this.weights.get(key) ?? 0));
      byColumn.set(column, [...(byColumn.get(column) ?? []), {members, weight}]);
    }
    for (const groups of byColumn.values()) {
      groups.sort((a, b) => b.weight - a.weight);
      groups.forEach(({members}, row) => members.forEach((key) => this.rows.set(key, row)));
    }
  }

  /**
   * What comparisons say about feature `id` of node layer `l` of a run in snapshot k: its `row` among the features
   * that are shared, null if it is none of them, and `others`, one entry for each run that it was compared with.
   */
  of(run, l, id, k) {
    const key = `${run}\n${l}\n${id}`;
    const others = this.#applies(run, l, k) ? (this.found.get(key) ?? []) : [];
    return {row: others.length ? (this.rows.get(key) ?? null) : null, others};
  }

  /**
   * The counterparts of a lineage `{run, l, id}` in snapshot k of another run, as `{l, id}`: the same feature, or those
   * that it is split into or merged with.
   */
  counterparts({run, l, id}, other, k) {
    return (this.found.get(`${run}\n${l}\n${id}`) ?? [])
      .filter((entry) => entry.run === other && this.#applies(other, entry.l, k))
      .flatMap((entry) => entry.matches.map((match) => ({l: entry.l, id: match.id})));
  }

  layerName(run, l) {
    return this.histories.get(run).layers[l].name;
  }

  /** Which snapshots of a run were compared, for a legend. */
  comparedText(run) {
    const steps = [...(this.steps.get(run) ?? [])].map(integer);
    if (!steps.length) return "not compared with the runs beside";
    return `compared at step ${steps.join(" and ")}; at other steps, features are those of the same lineage`;
  }

  /** Without lineages, a number means the same feature in the compared snapshot alone, except for single neurons. */
  #applies(run, l, k) {
    const history = this.histories.get(run);
    if (history.isTracked(k, l) || history.layers[l].kind === "neuron") return true;
    return this.steps.get(run)?.has(history.steps[k]) ?? false;
  }

  /**
   * For each node layer of a run, which of its heights are for which shared features, the same ones in all runs:
   * `{slotOf(k, id), first, slots}`, where others begin at slot `first`; null for a layer that was not compared.
   */
  reserved(run, limit) {
    this.reservations ??= new Map();
    if (!this.reservations.has(limit)) this.reservations.set(limit, this.#reserve(limit));
    return this.histories.get(run).layers.map((_, l) => {
      const column = this.columns.of(`${run}\n${l}`);
      const found = column === null ? null : this.reservations.get(limit).get(column);
      if (!found) return null;
      const slotOf = (k, id) => {
        const {row} = this.of(run, l, id, k);
        return row === null ? null : (found.slots.get(row) ?? null);
      };
      return {slotOf, first: found.slots.size, slots: Math.max(1, found.slots.size + found.others)};
    });
  }

  #reserve(limit) {
    const reserved = new Map();
    for (const members of this.columns.all()) {
      const rows = new Set();
      let others = 0;
      for (const member of members) {
        const [run, layer] = member.split("\n");
        const [history, l] = [this.histories.get(run), Number(layer)];
        history.order.forEach((order, k) => {
          let rest = 0;
          for (const i of order[l].slice(0, limit)) {
            const {row} = this.of(run, l, history.lineage(k, l, i), k);
            if (row === null) rest += 1;
            else rows.add(row);
          }
          others = Math.max(others, rest);
        });
      }
      const slots = new Map([...rows].sort((a, b) => a - b).map((row, slot) => [row, slot]));
      reserved.set(this.columns.of(members[0]), {slots, others});
    }
    return reserved;
  }
}

/** Things that belong together, in groups. */
class Groups {
  constructor() {
    this.members = new Map();
  }

  /** Put two things into one group, unless it would have two for which `kindOf` is the same. */
  join(a, b, kindOf = null) {
    const [first, second] = [this.members.get(a) ?? [a], this.members.get(b) ?? [b]];
    if (first === second) return;
    const both = [...first, ...second];
    if (kindOf && new Set(both.map(kindOf)).size < both.length) return;
    for (const member of both) this.members.set(member, both);
  }

  /** The first member of a thing's group, null if it is in none. */
  of(thing) {
    return this.members.get(thing)?.[0] ?? null;
  }

  all() {
    return [...new Set(this.members.values())];
  }
}
