// The data source of a film in one HTML file: everything is in the page, compressed.

/** The JSON in the text of a `<script>` element. */
export async function decompressed(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** A data source that reads the `<script>` elements of a film. */
export function embeddedSource(page) {
  let runs = null;
  const scripts = new Map();
  const script = (kind, name, step) => {
    const found = [...page.querySelectorAll(`script.${kind}`)].find(
      ({dataset}) => dataset.run === name && (step === undefined || Number(dataset.step) === step),
    );
    if (found && !scripts.has(found)) scripts.set(found, decompressed(found.textContent));
    return scripts.get(found);
  };
  const notes = new BrowserNotes();
  const all = () => (runs ??= decompressed(page.getElementById("lib-runs").textContent));
  return {
    live: false,
    async runs() {
      return (await all()).runs;
    },
    async run(name) {
      const found = (await all()).run[name];
      if (!found) throw new Error(`This file does not contain run ${name}.`);
      return found;
    },
    async curveNames() {
      const found = Object.values((await all()).run);
      const unique = (names) => [...new Set(names)].sort();
      return {
        metric: unique(found.flatMap((run) => run.snapshots.flatMap((snapshot) => Object.keys(snapshot.metrics ?? {})))),
        scalar: unique(found.flatMap((run) => Object.keys(run.scalars ?? {}))),
      };
    },
    /** The curve of each run that has it. Baselines share the logged scalars of the run that they are beside. */
    async curves(kind, curve) {
      const seen = new Set();
      return Object.entries((await all()).run).flatMap(([name, run]) => {
        if (kind === "metric") {
          const values = run.snapshots.map((snapshot) => snapshot.metrics?.[curve]?.value ?? null);
          return values.some((value) => value !== null) ? [{name, steps: run.snapshots.map(({step}) => step), values}] : [];
        }
        const found = run.scalars?.[curve];
        const key = `${name.slice(0, name.lastIndexOf("/") + 1)} ${found?.values}`;
        if (!found || seen.has(key)) return [];
        seen.add(key);
        return [{name, ...found}];
      });
    },
    async sharedFeatures() {
      return (await all()).shared ?? [];
    },
    async snapshot(name, step) {
      const element = [...page.querySelectorAll("script.lib-snapshot")].find(
        (script) => script.dataset.run === name && Number(script.dataset.step) === step,
      );
      if (!element) throw new Error(`This file does not contain a snapshot of run ${name} at step ${step}.`);
      return decompressed(element.textContent);
    },
    /** The page of a feature at a step, or at the nearest one that the file has. */
    async feature(name, step, _, id, layer) {
      const ofRun = await script("lib-features-of-run", name);
      const feature = `${layer}/${id}`;
      const near = [...(ofRun?.steps ?? [])].sort((a, b) => Math.abs(a - step) - Math.abs(b - step));
      for (const at of near) {
        const found = (await script("lib-features", name, at))[feature];
        if (!found) continue;
        const history = ofRun.history[feature];
        const note = notes.of(name)[feature] ?? ofRun.notes[feature] ?? "";
        const final = ofRun.final_since?.[feature] ?? null;
        const renderings = {...ofRun.renderings[""], ...ofRun.renderings[found.samples]};
        return {...found, renderings, history, effect: latestEffect(history, at), final_since: final, note, editable: true};
      }
      throw new Error(
        near.length
          ? `This file has the pages of the ${ofRun.limit} most important features of each node layer, and this feature is not among them. ` +
              "The tab in TensorBoard has all of them."
          : "This file has no pages of features. The tab in TensorBoard has them.",
      );
    },
    async saveNote(name, feature, text) {
      const kept = notes.save(name, feature, text);
      return {
        note: text,
        where: kept ? "kept by this browser" : "kept until this page is closed: download notes.json",
      };
    },
    /** All notes of a run, as the file that the tab and `Run.annotate` read. */
    async notesFile(name) {
      const all = {...(await script("lib-features-of-run", name))?.notes, ...notes.of(name)};
      return Object.fromEntries(Object.entries(all).filter(([, text]) => text));
    },
  };
}

/** The newest effect at or before a step, before the first one that one, like in the tab. */
function latestEffect(history, step) {
  const known = history.steps.map((_, k) => k).filter((k) => history.effect[k] !== null);
  if (!known.length) return null;
  const k = known.filter((k) => history.steps[k] <= step).pop() ?? known[0];
  return {
    change: history.effect[k],
    error: history.effect_error[k],
    significant: Boolean(history.effect_significant[k]),
    step: history.steps[k],
    score: history.score[k],
  };
}

/** Notes in the storage of the browser, or in memory where a page has no storage. */
class BrowserNotes {
  constructor() {
    this.inMemory = new Map();
  }

  of(run) {
    if (!this.inMemory.has(run)) {
      let kept = null;
      try {
        kept = JSON.parse(localStorage.getItem(`lib-notes:${run}`));
      } catch {
        // A sandboxed frame, such as in a notebook, has no storage.
      }
      this.inMemory.set(run, kept && typeof kept === "object" ? kept : {});
    }
    return this.inMemory.get(run);
  }

  /** Keep a note; returns whether it stays after the page is closed. */
  save(run, feature, text) {
    const notes = {...this.of(run), [feature]: text};
    this.inMemory.set(run, notes);
    try {
      localStorage.setItem(`lib-notes:${run}`, JSON.stringify(notes));
      return true;
    } catch {
      return false;
    }
  }
}
