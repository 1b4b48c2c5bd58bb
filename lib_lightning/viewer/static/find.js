// Features by what is typed: `layer/id`, or a label.

// A longer list of proposals would be slow to open and nobody's help.
const PROPOSED = 400;

/** Names to propose, `[name, label]`: those with a label first. */
export function knownFeatures(panels) {
  const labels = new Map();
  for (const {history} of panels) {
    history.layers.forEach((layer, l) => {
      for (const id of history.first[l].keys()) labels.set(`${layer.name}/${id}`, history.run.labels?.[l]?.[id] ?? "");
    });
  }
  return [...labels].sort((a, b) => Boolean(b[1]) - Boolean(a[1])).slice(0, PROPOSED);
}

/** The lineage `{run, l, id}` of that name or label, the youngest of several in a layer; null for none. */
export function findFeature(panels, text) {
  for (const {name, history} of panels) {
    for (const [l, layer] of history.layers.entries()) {
      const ids = [...history.first[l].keys()].reverse();
      const id = ids.find((own) => `${layer.name}/${own}` === text || history.run.labels?.[l]?.[own] === text);
      if (id !== undefined) return {run: name, l, id};
    }
  }
  return null;
}

/** The lineage that is followed, where its run has it still in a layer of that name; null otherwise. */
export function stillThere(follow, shelf) {
  const history = follow && shelf.panels.get(follow.run)?.history;
  const l = history?.layers.findIndex((layer) => layer.name === follow.layer) ?? -1;
  return l >= 0 && history.first[l].has(follow.id) ? {...follow, l} : null;
}
