// The content of one picture: dots with positions and colours, and the edges above the threshold.

import {
  AGAINST,
  AGES,
  BETWEEN,
  BLUE,
  DRIVES,
  FROM_THE_START,
  MODULE_COLORS,
  MUTED,
  NO_MODULE,
  OTHER_MODULES,
  SHARED_KINDS,
  VERMILION,
  dotRadius,
  paler,
  sharedColor,
} from "./palette.js";
import {labelGroup} from "./history.js";
import {number} from "./text.js";

/** Margins in pixels: names of layers above, counts below, labels to the right of the last column. */
const MARGIN = {top: 50, bottom: 44, left: 84, right: 84, labels: 130};
// Pixels between dots below which there is no space for text.
const MIN_TEXT_SPACING = 9;
// Pixels between dots with which numbers beside them can be read.
const TEXT_SPACING = 12;

/** Height of a picture in which a column with so many slots has space for a number beside each dot. */
export function heightOfSlots(slots) {
  return MARGIN.top + MARGIN.bottom + TEXT_SPACING * (slots - 1);
}

/**
 * Build a picture of snapshot k.
 *
 * `frame` contains the heights of features (see layout.js). `view` is `{width, height, threshold, color, signs}`: the
 * threshold is relative to each section's strongest edge, the colour of dots is "module", "label", "age" or "shared",
 * `signs` is whether edges have the colours of their signs, and `shared(l, id, k)` is what comparisons with the runs
 * beside say about a feature (see shared.js).
 */
export function buildScene(history, k, snapshot, frame, view) {
  const count = history.layers.length;
  const right = Math.min(history.labelGroups.size || history.hasOutputNames ? MARGIN.labels : MARGIN.right, view.width / (count + 1));
  const plot = {
    left: Math.min(MARGIN.left, view.width / (count + 1)),
    right: view.width - right,
    top: MARGIN.top,
    bottom: view.height - MARGIN.bottom,
  };
  const pitch = count > 1 ? (plot.right - plot.left) / (count - 1) : view.width / 2;
  const columns = frame.map((column, l) =>
    buildColumn(history, k, snapshot, column, l, view, plot, {
      x: count > 1 ? plot.left + pitch * l : (plot.left + plot.right) / 2,
      // Maximum width of a label beside a dot.
      labelWidth: l < count - 1 ? pitch - 40 : right - 24,
    }),
  );
  foldIdentical(columns, snapshot.sections);
  const sections = snapshot.sections.map((section, l) =>
    buildSection(section, columns[l], columns[l + 1], view, history.hasModules),
  );
  const hasSigns = Boolean(view.signs) && snapshot.sections.every((section) => section.edges.attribution);
  return {k, snapshot, history, columns, sections, pitch, hasSigns, ...totals(columns, sections)};
}

function buildColumn(history, k, snapshot, frame, l, view, plot, {x, labelWidth}) {
  const layer = snapshot.layers[l];
  const largest = layer.importance[history.order[k][l][0]] || 1;
  const spacing = (plot.bottom - plot.top) / Math.max(1, frame.slots - 1);
  // In a long column, dots must not merge.
  const most = Math.max(1.3, 0.62 * spacing);
  const dotOf = new Map();
  const dots = frame.shown.map((feature, n) => {
    const id = history.lineage(k, l, feature);
    const age = k - (history.first[l].get(id) ?? 0);
    const label = labelOf(history, snapshot, l, feature, id);
    const dot = {
      l,
      feature,
      id,
      x,
      y: plot.top + frame.heights[n] * (plot.bottom - plot.top),
      radius: Math.min(dotRadius(layer.importance[feature] / largest), most),
      module: history.modules[k][l][feature],
      hollow: Boolean(layer.degenerate?.[feature]),
      ...groupAndColor(history, k, l, {feature, id, label: label === history.outputName(l, id) ? "" : label}, view),
      isNew: age === 0 && k > 0,
      label,
      rank: n,
      importance: layer.importance[feature],
      // Ids of others that this dot stands for.
      folded: [],
    };
    dotOf.set(feature, dot);
    return dot;
  });
  const hasNames = history.hasOutputNames && l === history.layers.length - 1;
  return {l, x, labelWidth, hasNames, dots, dotOf, total: layer.importance.length, hasTextSpace: spacing >= MIN_TEXT_SPACING};
}

/**
 * Label of a feature in this snapshot, or else the newest label of its lineage; for an output, its name, such as that of a
 * class or a token.
 */
export function labelOf(history, snapshot, l, feature, id) {
  return (snapshot.layers[l].labels ?? {})[feature] || history.labelOf(l, id);
}

/** Draw features as one dot that have the same importance and edges, or none at all: neurons that are never active. */
function foldIdentical(columns, sections) {
  for (const column of columns) {
    const groups = groupBy(column.dots, (dot) => number(dot.importance));
    const candidates = new Set([...groups.values()].filter((group) => group.length > 1).flat());
    if (!candidates.size) continue;
    const beside = [[sections[column.l - 1], "target", "source"], [sections[column.l], "source", "target"]].filter(([section]) => section);
    const edges = edgesOf(beside, new Set([...candidates].map((dot) => dot.feature)));
    // Where not all edges are loaded, features without one need not have the same.
    const isWhole = beside.every(([{edges: {weight}, count}]) => weight.length >= count);
    const known = (dot) => !(dot.importance > 0) || isWhole || edges.get(dot.feature).length > 0;
    const same = groupBy([...candidates].filter(known), (dot) =>
      dot.importance > 0 ? [dot.module, number(dot.importance), ...edges.get(dot.feature)].join(" ") : "never active",
    );
    for (const [first, ...others] of same.values()) {
      first.folded = others.map((dot) => dot.id);
      for (const dot of others) column.dotOf.set(dot.feature, first);
      const gone = new Set(others);
      column.dots = column.dots.filter((dot) => !gone.has(dot));
    }
  }
}

/** The loaded edges of features of one column, as texts, by feature. */
function edgesOf(beside, features) {
  const found = new Map([...features].map((feature) => [feature, []]));
  beside.forEach(([section, end, otherEnd], side) => {
    section.edges[end].forEach((feature, e) => {
      found.get(feature)?.push(`${side}:${section.edges[otherEnd][e]}:${number(section.edges.weight[e])}`);
    });
  });
  return new Map([...found].map(([feature, edges]) => [feature, edges.sort()]));
}

function groupBy(items, keyOf) {
  const groups = new Map();
  for (const item of items) groups.set(keyOf(item), [...(groups.get(keyOf(item)) ?? []), item]);
  return groups;
}

/** What a dot's colour stands for, null for nothing, and the colour. Edges inside a group have its colour. */
function groupAndColor(history, k, l, {feature, id, label}, {color: by, signs, shared}) {
  if (by === "shared") {
    const {row, others} = shared(l, id, k);
    if (row !== null) return {group: "shared", color: sharedColor(row), hollow: false};
    const alone = others.every(({kind}) => kind === "lost" || kind === "new" || kind === "constant");
    const kind = others.length === 0 ? "unknown" : alone ? "alone" : "partly";
    return {group: kind, ...SHARED_KINDS[kind]};
  }
  if (by === "age") {
    const first = history.first[l].get(id) ?? 0;
    if (first === 0) return {group: "from the start", color: FROM_THE_START};
    const {name, color} = AGES.find((age) => k - first <= age.until);
    return {group: name, color};
  }
  if (by === "label") {
    if (!label) return {group: null, color: NO_MODULE};
    const group = labelGroup(label);
    return {group, color: history.labelGroups.get(group) ?? OTHER_MODULES};
  }
  if (!history.hasModules) return {group: null, color: signs ? MUTED : VERMILION};
  const module = history.modules[k][l][feature];
  return {group: module < 0 ? null : module, color: history.moduleColor(k, l, feature)};
}

function buildSection(section, before, after, view, hasModules) {
  const {source, target, weight, attribution} = section.edges;
  const byModule = view.color === "module" && hasModules;
  const minWeight = view.threshold * (section.strongest ?? 0);
  const edges = [];
  let strength = 0;
  let folded = 0;
  // Edges are sorted by strength: stop at the first one below the threshold.
  for (let e = 0; e < weight.length && weight[e] >= minWeight && weight[e] > 0; e++) {
    const [from, to] = [before.dotOf.get(source[e]), after.dotOf.get(target[e])];
    if (!from || !to) continue;
    // Those of features that are drawn as one are drawn once.
    if (from.feature !== source[e] || to.feature !== target[e]) {
      strength += weight[e];
      folded += 1;
      continue;
    }
    // Without modules, all dots have one colour and all lines another, as in the figures.
    let color = view.color === "module" && !hasModules ? BLUE : edgeColor(from, to, view.color);
    const isBetween = color === BETWEEN;
    const sign = view.signs && attribution ? (attribution[e] < 0 ? AGAINST : DRIVES) : null;
    if (sign) color = byModule && isBetween ? paler(sign) : sign;
    edges.push({from, to, weight: weight[e], share: weight[e] / section.strongest, color, isBetween, sign});
    strength += weight[e];
  }
  // Only the strongest edges of a section may have been loaded.
  const isTruncated = weight.length > 0 && weight.length < section.count && weight[weight.length - 1] > minWeight;
  return {
    edges,
    drawn: edges.length + folded,
    strength,
    x: (before.x + after.x) / 2,
    count: section.count,
    total: section.strength,
    isTruncated,
    loaded: weight.length,
  };
}

function edgeColor(from, to, by) {
  if (by === "shared") return from.group === "shared" && to.group === "shared" ? paler(BLUE) : BETWEEN;
  if (from.group === null || from.group !== to.group) return BETWEEN;
  return from.color === FROM_THE_START ? MUTED : from.color;
}

/** Number of features that the dots of a column stand for. */
export function countShown({dots}) {
  return dots.reduce((total, dot) => total + 1 + dot.folded.length, 0);
}

function totals(columns, sections) {
  const sum = (list, value) => list.reduce((total, item) => total + (value(item) ?? 0), 0);
  return {
    featuresDrawn: sum(columns, countShown),
    features: sum(columns, (column) => column.total),
    edgesDrawn: sum(sections, (section) => section.drawn),
    edges: sum(sections, (section) => section.count),
    share: sum(sections, (section) => section.strength) / sum(sections, (section) => section.total),
    isTruncated: sections.some((section) => section.isTruncated),
    loadedPerSection: Math.max(0, ...sections.map((section) => section.loaded)),
  };
}

/** The modules of the dots drawn: those with a colour of their own, the number of others, whether dots are in none. */
export function modulesShown({columns}) {
  const shown = new Set(columns.flatMap((column) => column.dots.map((dot) => dot.module)));
  return {
    colored: MODULE_COLORS.map((_, module) => module).filter((module) => shown.has(module)),
    others: [...shown].filter((module) => module >= MODULE_COLORS.length).length,
    none: shown.has(-1),
  };
}

/** The dot nearest to a point, null if none is close. */
export function dotAt(scene, x, y) {
  let [nearest, least] = [null, Infinity];
  for (const column of scene.columns) {
    if (Math.abs(column.x - x) > 16) continue;
    for (const dot of column.dots) {
      const distance = Math.hypot(dot.x - x, dot.y - y) - dot.radius;
      if (distance < least) [nearest, least] = [dot, distance];
    }
  }
  return least <= 6 ? nearest : null;
}

/** The dot of a lineage, null if it is not drawn. */
export function dotOfLineage(scene, l, id) {
  return scene.columns[l]?.dots.find((dot) => dot.id === id || dot.folded.includes(id)) ?? null;
}
