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
  }

  /** The chosen runs that are here, in the order of the list. */
  get shown() {
    return this.full.map((run) => this.panels.get(run.name)).filter(Boolean);
  }

  /** Choose a run, or no longer; the last one stays. */
  choose(name, on) {
    const others = (this.chosen ?? []).filter((own) => own !== name);
    if (on) this.chosen = [...others, name];
    else if (others.length) this.chosen = others;
  }

  /** Ask for the runs; fetch those anew that are chosen and have changed. Returns whether there is something new. */
  async refresh() {
    const listed = await this.source.runs();
    this.full = listed.filter((run) => run.snapshots > 0);
    this.colors = runColors(listed.map((run) => run.name));
    const there = this.full.map((run) => run.name);
    const chosen = (this.chosen ?? []).filter((name) => there.includes(name));
    this.chosen = chosen.length ? chosen : there.slice(0, 1);
    const gone = [...this.panels.keys()].filter((name) => !this.chosen.includes(name));
    for (const name of gone) this.panels.delete(name);
    const changed = this.full.filter(
      (run) => this.chosen.includes(run.name) && this.panels.get(run.name)?.version !== run.version,
    );
    for (const {name, version} of changed) {
      const run = await this.source.run(name);
      const panel = this.panels.get(name) ?? this.make(name, this.colors.get(name));
      panel.take(new History(run), this.source, version);
      this.panels.set(name, panel);
    }
    return gone.length + changed.length > 0;
  }
}
