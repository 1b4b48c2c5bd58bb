// Tooltip text of a feature: its properties in a snapshot.

import {h} from "./dom.js";
import {change as signedChange, integer, number, ordinal, percent, withError} from "./text.js";
import {ink} from "./palette.js";
import {labelOf} from "./scene.js";

const MAX_NEIGHBOURS = 4;
const MAX_FOLDED = 5;

/**
 * Properties of the feature of a dot, as elements for a tooltip. `others` is what comparisons with the runs beside
 * say about it (see shared.js), null if there are none.
 */
export function featureDetails(scene, {l, feature: i, color, folded}, {followed, others}) {
  const {history, k, snapshot} = scene;
  const layer = snapshot.layers[l];
  const id = history.lineage(k, l, i);
  const similarity = layer.similarity?.[i];
  const module = layer.modules ? history.modules[k][l][i] : null;
  const label = labelOf(history, snapshot, l, i, id);
  const score = layer.labels?.[i] === label ? layer.label_score?.[i] : null;
  const rows = [
    ["importance", withError(layer.importance[i], layer.error?.[i])],
    layer.nats ? ["effect on predictions", `${withError(layer.nats[i], layer.nats_error?.[i])} nats, to second order`] : null,
    ["rank", `${ordinal(history.rank(k, l, i))} of ${integer(layer.importance.length)}`],
    ["index", `${integer(i)} in the bases, edges and labels of this snapshot`],
    module === null ? null : ["module", module < 0 ? "none" : String(module)],
    ["birth", history.isTracked(k, l) ? history.birth(l, id) : "not tracked over training"],
    similarity === null || similarity === undefined
      ? null
      : ["similarity", `${number(similarity)} to the previous snapshot`],
    layer.degenerate?.[i] ? ["direction", "not determined by the samples"] : null,
    folded.length ? ["like it", likeText(layer.importance[i], folded, history.layers[l].name)] : null,
  ];
  return [
    h(
      "div",
      {class: "lib-tip-title"},
      h("span", {class: "lib-swatch", style: {background: ink(color)}}),
      `${history.layers[l].name}/${id}`,
    ),
    label ? h("div", {class: "lib-tip-label"}, label) : null,
    label && Number.isFinite(score) ? h("div", {}, `predicts its activity: AUROC ${number(score)}`) : null,
    ...inOtherRuns(others),
    h(
      "dl",
      {},
      rows.filter(Boolean).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
    ),
    neighbours(scene, l, i, "before"),
    neighbours(scene, l, i, "after"),
    h("div", {class: "lib-tip-hint"}, followed ? "click to stop following this feature and close its page" : "click for examples, interactions and effects, and to follow it over training"),
  ].filter(Boolean);
}

/** Which features a dot stands for as well. */
function likeText(importance, folded, layer) {
  const names = folded.slice(0, MAX_FOLDED).map((id) => `${layer}/${id}`).join(", ");
  const all = folded.length > MAX_FOLDED ? `${names} and ${integer(folded.length - MAX_FOLDED)} more` : names;
  return `${all}: ${importance > 0 ? "the same importance and edges" : "never active on these samples"}`;
}

/** What is known of counterparts in other runs. */
function inOtherRuns(others) {
  if (others === null) return [];
  if (!others.length) return [h("div", {class: "lib-tip-shared"}, "not in the snapshot that was compared")];
  return others.map(({run, layer, kind, similarity, p, matches}) => {
    const evidence = [
      similarity === null ? "" : `similarity ${number(similarity)}`,
      p === null || p >= 1 ? "" : `p ${number(p)}`,
    ].filter(Boolean);
    const names = matches.map((match) => `${layer}/${match.id}`).slice(0, MAX_NEIGHBOURS).join(", ");
    const found =
      {
        shared: `the same feature as ${names}`,
        split: `one of those that ${names} is split into`,
        merged: `one of those that ${names} is merged from`,
        rotated: "in a subspace that both have, not as one feature",
        constant: "does not vary",
      }[kind] ?? `not there${similarity === null ? "" : ", at most"}`;
    const text = [found, ...evidence].join(", ").replace("at most, ", "at most ");
    return h("div", {class: "lib-tip-shared"}, h("span", {}, `in ${run}: `), text);
  });
}

/** Strength of an edge; with signs, its attribution, and whether that is two standard errors from zero. */
function strengthText(scene, section, e) {
  const {weight, attribution, attribution_error: error} = section.edges;
  if (!scene.hasSigns) return `${number(weight[e])} (${percent(weight[e] / section.strongest)})`;
  const certain = !(Math.abs(attribution[e]) <= 2 * (error?.[e] ?? 0));
  const sign = attribution[e] < 0 ? "holds against" : "drives";
  return `${signedChange(attribution[e], error?.[e] ?? null)} ${certain ? sign : "sign unsure"}`;
}

function neighbours(scene, l, i, side) {
  const {history, k, snapshot} = scene;
  const other = side === "before" ? l - 1 : l + 1;
  const section = snapshot.sections[Math.min(l, other)];
  if (other < 0 || !section) return null;
  const [end, otherEnd] = side === "before" ? ["target", "source"] : ["source", "target"];
  const strongest = [];
  // Edges are sorted by strength.
  for (let e = 0; e < section.edges.weight.length && strongest.length < MAX_NEIGHBOURS; e++) {
    if (section.edges[end][e] === i) strongest.push([section.edges[otherEnd][e], strengthText(scene, section, e)]);
  }
  return h(
    "div",
    {class: "lib-tip-neighbours"},
    h("div", {class: "lib-tip-side"}, `strongest edges ${side === "before" ? "from" : "to"} ${history.layers[other].name}${scene.hasSigns ? ", attributions" : ""}`),
    strongest.length
      ? h(
          "ol",
          {},
          strongest.map(([j, strength]) => {
            const id = history.lineage(k, other, j);
            return h(
              "li",
              {},
              h("b", {}, `${history.layers[other].name}/${id}`),
              " ",
              labelOf(history, snapshot, other, j, id),
              h("span", {class: "lib-tip-number"}, strength),
            );
          }),
        )
      : h("div", {class: "lib-tip-none"}, "none among the strongest edges"),
  );
}
