// Draws a scene on a canvas. Edges of the same style are drawn as one path: thousands of single strokes are slow.

import {AGAINST, edgeStyle} from "./palette.js";
import {THEME} from "./theme.js";
import {shorten} from "./text.js";

// Number of different widths and opacities of edges.
const LEVELS = 14;
const COLUMN_LINE = {top: 42, bottom: 36};
// Maximum number of labels in a column, and in a column with little space; the most important features have priority.
const MAX_LABELS = 40,
  MAX_LABELS_DENSE = 16;
// Width in pixels below which a label would be two letters and dots.
const MIN_LABEL_WIDTH = 46;
// Pixels between numbers that do not overlap.
const NUMBER_HEIGHT = 9.5;
export const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif";

/** Draw the edges, dots and labels of a scene; `colors` are those of `canvasColors`. */
export function drawScene(context, scene, {width, height}, colors) {
  // Opaque rather than transparent: the canvas fades in over that of the previous step.
  context.fillStyle = colors.paper;
  context.fillRect(0, 0, width, height);
  for (const column of scene.columns) drawColumnLine(context, column.x, height, colors);
  for (const section of scene.sections) drawEdges(context, section.edges, {total: section.edges.length, widening: 1}, colors);
  for (const column of scene.columns) {
    for (const dot of [...column.dots].reverse()) drawDot(context, dot, colors);
    drawColumnText(context, column, colors);
  }
}

/** Draw one or two dots with their edges and neighbours, for the overlay above a faded scene. */
export function drawFocus(context, scene, focused, colors) {
  const near = new Set(focused);
  for (const section of scene.sections) {
    const edges = section.edges.filter(({from, to}) => focused.includes(from) || focused.includes(to));
    drawEdges(context, edges, {total: Math.min(edges.length, 60), widening: 1.25}, colors);
    for (const {from, to} of edges) near.add(from).add(to);
  }
  for (const dot of near) drawDot(context, dot, colors);
  for (const dot of focused) {
    drawRing(context, dot, colors.text, 2, 4);
  }
  for (const column of scene.columns) {
    const dots = column.dots.filter((dot) => near.has(dot));
    drawLabels(context, column, dots, new Set(focused), colors);
    // Above the edges, which end where numbers are. The label of a followed feature has its number.
    drawNumbers(
      context,
      dots.filter((dot) => !focused.includes(dot)),
      colors,
      colors.text,
    );
  }
}

/** Draw a faint line through the dots of a layer. */
function drawColumnLine(context, x, height, {muted}) {
  context.globalAlpha = 0.12;
  context.fillStyle = muted;
  context.fillRect(x - 1, COLUMN_LINE.top, 2, height - COLUMN_LINE.top - COLUMN_LINE.bottom);
  context.globalAlpha = 1;
}

function drawEdges(context, edges, {total, widening}, colors) {
  const styles = new Map();
  for (const edge of edges) {
    const level = Math.min(LEVELS, Math.round(Math.sqrt(edge.share) * LEVELS));
    const sign = edge.sign ? (edge.sign === AGAINST ? "-" : "+") : " ";
    const key = `${edge.isBetween ? 0 : 1} ${String(level).padStart(2, "0")} ${sign} ${edge.color}`;
    const list = styles.get(key);
    if (list) list.push(edge);
    else styles.set(key, [edge]);
  }
  // Edges between modules are drawn first, so that they do not hide those inside; and weak before strong ones.
  for (const key of [...styles.keys()].sort()) {
    const level = Number(key.slice(2, 4)) / LEVELS;
    let {width, opacity} = edgeStyle(level * level, total);
    const sign = key[5];
    if (sign !== " ") {
      // Dashes of very thin lines are not visible as such.
      width = Math.max(width, THEME.signs.points_min);
      opacity = Math.max(opacity, THEME.signs.opacity_min);
    }
    context.setLineDash(sign === "-" ? [2 + 2.5 * width, 1.5 + 1.5 * width] : []);
    context.strokeStyle = colors.of(key.slice(7));
    context.globalAlpha = Math.min(1, widening > 1 ? 0.3 + 0.7 * opacity : opacity);
    context.lineWidth = width * widening;
    context.beginPath();
    for (const {from, to} of styles.get(key)) {
      const bend = (to.x - from.x) * 0.42;
      context.moveTo(from.x, from.y);
      context.bezierCurveTo(from.x + bend, from.y, to.x - bend, to.y, to.x, to.y);
    }
    context.stroke();
  }
  context.globalAlpha = 1;
  context.setLineDash([]);
}

function drawDot(context, dot, colors) {
  const color = colors.of(dot.color);
  context.beginPath();
  context.arc(dot.x, dot.y, dot.radius, 0, 2 * Math.PI);
  context.fillStyle = dot.hollow ? colors.paper : color;
  context.fill();
  context.strokeStyle = dot.hollow ? color : colors.paper;
  context.lineWidth = dot.hollow ? Math.min(1.8, 0.6 * dot.radius) : Math.min(1, 0.3 * dot.radius);
  context.stroke();
  if (dot.isNew) drawRing(context, dot, colors.text, 1, 2);
}

function drawRing(context, dot, color, lineWidth, gap) {
  context.beginPath();
  context.arc(dot.x, dot.y, dot.radius + gap, 0, 2 * Math.PI);
  context.strokeStyle = color;
  context.lineWidth = lineWidth;
  context.stroke();
}

function drawColumnText(context, column, colors) {
  const hasSpace = column.labelWidth >= MIN_LABEL_WIDTH;
  // Names of outputs are short, and nothing else says what these are.
  const most = column.hasTextSpace || column.hasNames ? MAX_LABELS : MAX_LABELS_DENSE;
  const named = column.dots.filter((dot) => dot.label && hasSpace).slice(0, most);
  drawLabels(context, column, named, new Set(), colors);
  drawNumbers(context, column.dots, colors, colors.muted);
}

/** Draw the numbers of dots to the left of them, as many as fit, by importance. */
function drawNumbers(context, dots, colors, color) {
  context.font = `11px ${FONT}`;
  context.textAlign = "right";
  context.textBaseline = "middle";
  const drawn = [];
  for (const dot of dots) {
    if (drawn.some((other) => Math.abs(other.y - dot.y) < NUMBER_HEIGHT)) continue;
    drawn.push(dot);
    const number = dot.folded.length ? `${dot.folded.length + 1} × ${dot.id}` : String(dot.id);
    drawText(context, number, dot.x - dot.radius - 5, dot.y, colors, color);
  }
}

/** Draw labels to the right of dots, as many as fit, by importance; those in `emphasized` in bold and with their id. */
function drawLabels(context, column, dots, emphasized, colors) {
  context.textAlign = "left";
  context.textBaseline = "middle";
  const drawn = [];
  const first = dots.filter((dot) => emphasized.has(dot));
  for (const dot of [...first, ...dots.filter((dot) => !emphasized.has(dot))]) {
    if (drawn.some((other) => Math.abs(other.y - dot.y) < 12)) continue;
    const text = emphasized.has(dot) ? [dot.id, dot.label].filter((word) => word !== "").join(" · ") : dot.label;
    if (!text) continue;
    drawn.push(dot);
    context.font = `${emphasized.has(dot) ? "600 12px" : "10.5px"} ${FONT}`;
    const x = dot.x + dot.radius + (emphasized.has(dot) ? 8 : 4);
    const label = shorten(context, text, Math.max(column.labelWidth, 30) * (emphasized.has(dot) ? 1.15 : 1));
    if (emphasized.has(dot)) {
      // Cover the same label in the faded scene below.
      context.fillStyle = colors.paper;
      context.fillRect(x - 2, dot.y - 8, context.measureText(label).width + 8, 16);
    }
    drawText(context, label, x, dot.y, colors, colors.text);
  }
}

function drawText(context, text, x, y, {paper}, color) {
  context.lineJoin = "round";
  context.lineWidth = 4;
  context.strokeStyle = `${paper}E6`;
  context.strokeText(text, x, y);
  context.fillStyle = color;
  context.fillText(text, x, y);
}
