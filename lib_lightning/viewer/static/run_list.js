// The runs there are, those that were chosen, and a panel for each of these with the run's newest data.

import {runColors} from "./palette.js";
import {History} from "./history.js";

/** Knows a source's runs; `make(name, color)` makes a panel for a run when it is first chosen. */
export class Shelf {
  constructor(source, make) {
    this.source = source;
    this.make = make;
    this.full = [];
    this.chosen = null;
    this.colors = new Map();
    this.panels = new Map();
    this.errors = new Map();
  }

  /** The chosen runs that are here, in the order of the list. */
  get shown() {
    return this.full.map((run) => this.panels.get(run.name)).filter(Boolean);
  }

  /** Choose a run, or no longer; the last one stays. */
  choose(name, on) {
    const others = (this.chosen ?? []).filter((own) => own !== name);
    if (on) this.chosen = [...others, name];
    else if (others.length) {
      this.chosen = others;
      this.errors.delete(name);
    }
  }

  /** Ask for the runs; fetch those anew that are chosen and have changed. Returns whether there is something new. */
  async refresh() {
    const listed = await this.source.runs();
    this.full = listed.filter((run) => run.snapshots > 0);
    this.colors = runColors(
      listed.map((run) => run.name),
      this.colors,
    );
    const there = this.full.map((run) => run.name);
    this.chosen = (this.chosen ?? []).filter((name) => there.includes(name));
    for (const name of this.errors.keys()) if (!there.includes(name)) this.errors.delete(name);
    // Where nothing is chosen, the first run that can be read is.
    const any = this.chosen.length === 0;
    const fetched = [];
    for (const run of this.full) {
      const stale = this.chosen.includes(run.name) && this.panels.get(run.name)?.version !== run.version;
      const wanted = any ? this.chosen.length === 0 : stale;
      const found = wanted || this.errors.has(run.name) ? await this.#fetch(run) : null;
      if (!found) continue;
      fetched.push(found);
      if (this.chosen.length === 0) this.chosen = [run.name];
    }
    const gone = [...this.panels.keys()].filter((name) => !this.chosen.includes(name));
    for (const name of gone) this.panels.delete(name);
    // All at once, so that nobody meets a panel whose data are newer than what else is shown.
    const taken = fetched.filter((run) => this.chosen.includes(run.name));
    for (const {name, history, version} of taken) {
      const panel = this.panels.get(name) ?? this.make(name, this.colors.get(name));
      panel.take(history, this.source, version);
      this.panels.set(name, panel);
    }
    return gone.length + taken.length > 0;
  }

  /** A run's history; null, and a sentence among the errors, where it cannot be had. */
  async #fetch({name, version}) {
    try {
      const history = new History(await this.source.run(name));
      this.errors.delete(name);
      return {name, version, history};
    } catch (error) {
      const told = String(error.message ?? error);
      this.errors.set(name, told.includes(name) ? told : `${name}: ${told}`);
      return null;
    }
  }

  /** Fetch the runs shown again at the next look: what is here could not be drawn. */
  doubt() {
    for (const panel of this.panels.values()) panel.version = null;
  }

  /** What keeps runs from being shown, as an error; null for nothing. */
  get trouble() {
    const [first, ...more] = this.errors.values();
    if (first === undefined) return null;
    return new Error(more.length ? `${first} ${more.length} more cannot be read.` : first);
  }
}
