// Colours, dot sizes and edge widths, computed from the theme that the figures use as well.

import {THEME} from "./theme.js";

export const TEXT = THEME.text,
  MUTED = THEME.muted;
export const {blue: BLUE, vermilion: VERMILION, orange: ORANGE, sky: SKY} = THEME.colors;
export const MODULE_COLORS = THEME.modules.map((name) => THEME.colors[name]);
export const OTHER_MODULES = THEME.other_modules,
  NO_MODULE = THEME.no_module;
// Edges between modules.
export const BETWEEN = THEME.between_modules;
// Edges where a feature drives another, and where it holds against it.
export const DRIVES = THEME.colors[THEME.signs.drives],
  AGAINST = THEME.colors[THEME.signs.against];

/** The colour of a line between modules, where colours stand for signs. */
export function paler(color) {
  return mixed(color, THEME.paper);
}

function mixed(color, paper) {
  const share = THEME.signs.between_modules;
  const parts = rgb(paper).map((part, k) => Math.round(part * share + rgb(color)[k] * (1 - share)));
  return `#${parts.map((part) => part.toString(16).padStart(2, "0")).join("")}`.toUpperCase();
}

/** The colour of a module, by its number: the same as in figures. */
export function moduleColor(number) {
  return number < 0 ? NO_MODULE : (MODULE_COLORS[number] ?? OTHER_MODULES);
}

/** What the dots of features stand for that are not shared with the runs beside; shared ones have colours of modules. */
export const SHARED_KINDS = {
  partly: {color: OTHER_MODULES, hollow: true, name: "split, merged or rotated in the other run"},
  alone: {color: TEXT, hollow: true, name: "only in this run"},
  unknown: {color: NO_MODULE, hollow: false, name: "not in the snapshots that were compared"},
};

/** The colour of a shared feature, by its number among those of its node layer: the same in all runs. */
export function sharedColor(row) {
  return MODULE_COLORS[row % MODULE_COLORS.length];
}

/** The colour of a kind of event. */
export function eventColor(kind) {
  const name = THEME.events[kind];
  return THEME.colors[name] ?? THEME[name] ?? OTHER_MODULES;
}

// Colours of runs, and of other lines beside those of a single run.
export const SERIES = THEME.series.map((name) => THEME.colors[name]);
const BASIS_COLORS = Object.fromEntries(Object.keys(THEME.basis_names).map((kind, i) => [kind, SERIES[i]]));

// Age of a lineage in snapshots; new ones stand out.
export const AGES = [
  {until: 0, color: VERMILION, name: "new at this step"},
  {until: 4, color: ORANGE, name: "1 to 4 snapshots"},
  {until: 19, color: SKY, name: "5 to 19"},
  {until: Infinity, color: BLUE, name: "20 or more"},
];
export const FROM_THE_START = "#9A9A9A";

// What each colour is on a dark page. Everywhere else in the viewer, colours are called by what they are on a light one.
const DARK = darkColors();

function darkColors() {
  const {colors, ...others} = THEME.dark;
  const named = Object.keys(colors).map((name) => [THEME.colors[name], colors[name]]);
  const plain = Object.keys(others).map((name) => [THEME[name], others[name]]);
  const pale = [BLUE, VERMILION].map((color) => [paler(color), mixed(new Map(named).get(color), others.paper)]);
  return new Map([...named, ...plain, ...pale]);
}

/** A colour for the style sheet or an SVG element: on a dark page, the one that it has there. */
export function ink(color) {
  return DARK.has(color) ? `var(--ink-${color.slice(1)}, ${color})` : color;
}

/** Set the variables of the style sheet: the colours of a light or of a dark page. */
export function themeColors(root, dark) {
  const {colors, ...plain} = dark ? THEME.dark : THEME;
  const {paper, text, muted} = plain;
  const variables = {paper, text, muted, accent: colors.blue, warning: colors.vermilion};
  for (const [name, color] of Object.entries(variables)) root.style.setProperty(`--${name}`, color);
  for (const [light, color] of DARK) root.style.setProperty(`--ink-${light.slice(1)}`, dark ? color : light);
}

/** The colours that a canvas needs, which cannot read variables: those of the page, and `of(color)` of anything else. */
export function canvasColors(dark) {
  const {paper, text, muted} = dark ? THEME.dark : THEME;
  return {paper, text, muted, of: (color) => (dark ? (DARK.get(color) ?? color) : color)};
}

/**
 * A colour for each run: the colour of its basis if no other run has it, so that figures and viewer agree.
 * Runs keep the colours in `assigned`; the others get the colours that the fewest runs have.
 */
export function runColors(names, assigned = new Map()) {
  const colors = new Map(assigned);
  const current = new Map(SERIES.map((color) => [color, 0]));
  const ever = new Map(current);
  const count = (counts, color) => counts.set(color, counts.get(color) + 1);
  for (const color of assigned.values()) count(ever, color);
  for (const name of names) if (assigned.has(name)) count(current, assigned.get(name));
  for (const name of names) {
    if (colors.has(name)) continue;
    const preferred = BASIS_COLORS[name.split("/").pop()];
    const [rarest] = [...SERIES].sort((a, b) => current.get(a) - current.get(b) || ever.get(a) - ever.get(b));
    const color = preferred && ever.get(preferred) === 0 ? preferred : rarest;
    colors.set(name, color);
    count(current, color);
    count(ever, color);
  }
  return colors;
}

// Pixels per point of a figure's dot.
const DOT_SCALE = 0.62;

/** Radius in pixels of the dot of a feature, from its importance divided by the largest in its layer. */
export function dotRadius(share) {
  const {area_min, area_range} = THEME.dot;
  return DOT_SCALE * Math.sqrt(area_min + area_range * Math.sqrt(Math.max(0, share)));
}

/**
 * Width in pixels and opacity of an edge, from its strength divided by the largest in its section.
 * Among many edges (`total`) both are smaller, to keep them distinguishable.
 */
export function edgeStyle(share, total) {
  const {width_min, width_range, opacity_min, opacity_range, crowd} = THEME.edge;
  const root = Math.sqrt(share);
  const maxWidth = Math.max(1.2, 4.5 * Math.min(1, Math.sqrt(crowd / Math.max(1, total))));
  const thinning = Math.max(0.35, Math.min(1, Math.sqrt((10 * crowd) / Math.max(1, total))));
  return {
    width: Math.max(0.4, maxWidth * (width_min + width_range * root)),
    opacity: (opacity_min + opacity_range * root) * thinning,
  };
}

/** Background for a value of a feature: one colour for each sign, stronger for larger values. */
export function valueColor(value, scale) {
  if (value === null || !Number.isFinite(value)) return "transparent";
  // On dark pages as well, since the text in front of a lighter colour could not be read.
  const [r, g, b] = rgb(value >= 0 ? VERMILION : BLUE);
  return `rgb(${r} ${g} ${b} / ${(62 * shareOf(value, scale)).toFixed(0)}%)`;
}

function shareOf(value, scale) {
  return Math.min(1, Math.abs(value) / (scale || 1));
}

/** Fill of a bar for a value: the same colours without text in front of them. */
export function barFill(value, scale) {
  return {fill: ink(value >= 0 ? VERMILION : BLUE), "fill-opacity": (0.25 + 0.37 * shareOf(value, scale)).toFixed(2)};
}

/** Red, green and blue of a colour such as "#336699", from 0 to 255. */
function rgb(color) {
  return [1, 3, 5].map((start) => parseInt(color.slice(start, start + 2), 16));
}
