// The available runs, the chosen ones, and their panels with current data.

import {runColors} from "./palette.js";
import {History} from "./history.js";
import {SharedFeatures} from "./shared.js";

/** The runs of a data source. `makePanel({name, title, color})` creates the panel of a run when it is first chosen. */
export class RunList {
  constructor(source, makePanel) {
    this.source = source;
    this.makePanel = makePanel;
    this.available = [];
    this.chosen = null;
    this.colors = new Map();
    this.panels = new Map();
    this.errors = new Map();
  }

  /** Panels of the chosen runs with data, in the order of the list. */
  get shown() {
    return this.available.map((run) => this.panels.get(run.name)).filter(Boolean);
  }

  /** What a run is called: by its folder, where that is enough. Its name is its path. */
  titleOf(name) {
    return this.available.find((run) => run.name === name)?.title ?? name;
  }

  /** Choose a run or remove it from the choice; the last one cannot be removed. */
  choose(name, on) {
    const others = (this.chosen ?? []).filter((other) => other !== name);
    if (on) this.chosen = [...others, name];
    else if (others.length) {
      this.chosen = others;
      this.errors.delete(name);
    }
  }

  /** Update the list, and fetch chosen runs that have changed. Returns whether anything shown has changed. */
  async refresh() {
    const listed = await this.source.runs();
    this.available = titled(listed.filter((run) => run.snapshots > 0));
    this.colors = runColors(
      listed.map((run) => run.name),
      this.colors,
    );
    const names = this.available.map((run) => run.name);
    this.chosen = (this.chosen ?? []).filter((name) => names.includes(name));
    for (const name of this.errors.keys()) if (!names.includes(name)) this.errors.delete(name);
    // If no run is chosen, choose the first readable one; in a file, those as well that it was compared with.
    const noneChosen = this.chosen.length === 0;
    const fetched = [];
    for (const run of this.available) {
      const stale = this.chosen.includes(run.name) && this.panels.get(run.name)?.version !== run.version;
      const wanted = noneChosen ? this.chosen.length === 0 : stale;
      const found = wanted || this.errors.has(run.name) ? await this.#fetch(run) : null;
      if (!found) continue;
      fetched.push(found);
      if (this.chosen.length === 0) this.chosen = [run.name];
    }
    if (noneChosen && !this.source.live && fetched.length) fetched.push(...(await this.#comparedWith(fetched[0])));
    const gone = [...this.panels.keys()].filter((name) => !this.chosen.includes(name));
    for (const name of gone) this.panels.delete(name);
    // Update all panels at once, so that they are consistent.
    const updated = fetched.filter((run) => this.chosen.includes(run.name));
    for (const {name, history, version} of updated) {
      const panel = this.panels.get(name) ?? this.makePanel({name, title: this.titleOf(name), color: this.colors.get(name)});
      panel.setData(history, this.source, version);
      this.panels.set(name, panel);
    }
    return gone.length + updated.length > 0;
  }

  /** Choose and fetch the runs that one was compared with. */
  async #comparedWith(first) {
    const compared = [];
    for (const run of this.available.filter(({name}) => name !== first.name)) {
      const found = await this.#fetch(run);
      if (!found) this.errors.delete(run.name);
      else if (new SharedFeatures([first, found]).exist) compared.push(found);
    }
    this.chosen = [...this.chosen, ...compared.map(({name}) => name)];
    return compared;
  }

  /** Fetch the history of a run; on failure, record the error and return null. */
  async #fetch({name, version}) {
    try {
      const history = new History(await this.source.run(name));
      this.errors.delete(name);
      return {name, version, history};
    } catch (error) {
      const message = String(error.message ?? error);
      this.errors.set(name, message.includes(name) ? message : `${name}: ${message}`);
      return null;
    }
  }

  /** Fetch all runs shown again at the next refresh, because they could not be drawn. */
  invalidate() {
    for (const panel of this.panels.values()) panel.invalidate();
  }

  /** An error describing which runs cannot be shown, or null. */
  get error() {
    const [first, ...more] = this.errors.values();
    if (first === undefined) return null;
    return new Error(more.length ? `${first} ${more.length} more runs cannot be read.` : first);
  }
}

/** Runs with titles that differ: their names where two would have the same. */
function titled(runs) {
  const count = (title) => runs.filter((run) => run.title === title).length;
  return runs.map((run) => ({...run, title: run.title && count(run.title) === 1 ? run.title : run.name}));
}
