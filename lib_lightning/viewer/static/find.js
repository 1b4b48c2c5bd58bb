// Finding features by `layer/id` or by label.

/** Suggestions as pairs `[name, label]`, those with a label first. */
export function featureSuggestions(panels) {
  const labels = new Map();
  for (const {history} of panels) {
    history.layers.forEach((layer, l) => {
      for (const id of history.first[l].keys()) labels.set(`${layer.name}/${id}`, history.labelOf(l, id));
    });
  }
  return [...labels].sort((a, b) => Boolean(b[1]) - Boolean(a[1]));
}

/** The lineage `{run, l, id}` with a name or label, the newest if there are several in a layer; or null. */
export function findFeature(panels, text) {
  for (const {name, history} of panels) {
    for (const [l, layer] of history.layers.entries()) {
      const ids = [...history.first[l].keys()].reverse();
      const id = ids.find((other) => `${layer.name}/${other}` === text || history.labelOf(l, other) === text);
      if (id !== undefined) return {run: name, l, id};
    }
  }
  return null;
}

/** The followed lineage, with its current layer index; null if the run no longer contains it. */
export function resolveFollowed(follow, runList) {
  const history = follow && runList.panels.get(follow.run)?.history;
  const l = history?.layers.findIndex((layer) => layer.name === follow.layer) ?? -1;
  return l >= 0 && history.first[l].has(follow.id) ? {...follow, l} : null;
}

/** The followed lineage of a run: the one itself, or its counterpart among `others`. */
export function followedIn(follow, run) {
  return follow?.run === run ? follow : (follow?.others?.find((other) => other.run === run) ?? null);
}
