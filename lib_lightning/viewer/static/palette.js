// Colours as in lib_lightning/display/palette.py (Okabe and Ito), and how large a dot is.

export const TEXT = "#222222",
  MUTED = "#666666";
export const BLUE = "#0072B2",
  VERMILION = "#D55E00",
  GREEN = "#009E73",
  ORANGE = "#E69F00";
export const PURPLE = "#CC79A7",
  SKY = "#56B4E9",
  WINE = "#6B1030";
export const MODULE_COLORS = [BLUE, ORANGE, GREEN, PURPLE, WINE, SKY, VERMILION];
export const OTHER_MODULES = "#6E6E6E",
  NO_MODULE = "#B8B8B8";
// Edges between modules: light enough not to hide what holds a module together.
export const BETWEEN = "#8A8A8A";

const BASIS_COLORS = {lib: BLUE, pca: VERMILION, neuron: GREEN};
const RUN_COLORS = [BLUE, VERMILION, GREEN, PURPLE, WINE, ORANGE, SKY];

// How long a lineage has been there, in snapshots: the newest stand out.
export const AGES = [
  {until: 0, color: VERMILION, name: "new at this step"},
  {until: 4, color: ORANGE, name: "for 1 to 4 snapshots"},
  {until: 19, color: SKY, name: "for 5 to 19"},
  {until: Infinity, color: BLUE, name: "for 20 or more"},
];
export const FROM_THE_START = "#9A9A9A";

/**
 * A colour for each run: that of its basis where no other run has it, so that figures and view agree.
 * Runs keep the colours that they were `given`; others get those that the fewest of the runs have.
 */
export function runColors(names, given = new Map()) {
  const colors = new Map(given);
  const here = new Map(RUN_COLORS.map((color) => [color, 0]));
  const ever = new Map(here);
  const count = (counts, color) => counts.set(color, counts.get(color) + 1);
  for (const color of given.values()) count(ever, color);
  for (const name of names) if (given.has(name)) count(here, given.get(name));
  for (const name of names) {
    if (colors.has(name)) continue;
    const own = BASIS_COLORS[name.split("/").pop()];
    const [rarest] = [...RUN_COLORS].sort((a, b) => here.get(a) - here.get(b) || ever.get(a) - ever.get(b));
    const color = own && ever.get(own) === 0 ? own : rarest;
    colors.set(name, color);
    count(here, color);
    count(ever, color);
  }
  return colors;
}

/** Radius in pixels of a dot whose importance is this share of its layer's largest; see display/legend.py. */
export function dotRadius(share) {
  return Math.sqrt(12 + 230 * Math.sqrt(Math.max(0, share))) * 0.62;
}

/** Width in pixels and opacity of an edge whose strength is this share of its section's largest. */
export function edgeStyle(share, crowd) {
  const root = Math.sqrt(share);
  // In a crowd the same widths and opacities would run into one block.
  const widest = Math.max(1.2, 4.5 * Math.min(1, Math.sqrt(40 / Math.max(1, crowd))));
  const thinned = Math.max(0.35, Math.min(1, Math.sqrt(400 / Math.max(1, crowd))));
  return {width: Math.max(0.4, widest * (0.1 + 0.9 * root)), opacity: (0.07 + 0.78 * root) * thinned};
}
