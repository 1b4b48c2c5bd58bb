// Draws a scene on a canvas. All edges of a look are one path: thousands of single strokes would take too long.

import {BETWEEN, MUTED, TEXT, edgeStyle} from "./palette.js";
import {shortened} from "./text.js";

// So many steps of width and opacity are told apart by nobody.
const LEVELS = 14;
const RAIL = {top: 42, bottom: 36};
// A longer column has no room for all names; those of the most important features are written.
const MOST_NAMES = 40,
  MOST_NAMES_IN_A_CROWD = 16;
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif";

/** Draw edges, dots and words of a scene. */
export function drawScene(context, scene, width, height) {
  // White, not empty: the canvas fades in over the one with the step before.
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, width, height);
  for (const column of scene.columns) drawRail(context, column.x, height);
  for (const section of scene.sections) drawEdges(context, section.edges, section.edges.length, 1);
  for (const column of scene.columns) {
    for (const dot of [...column.dots].reverse()) drawDot(context, dot);
    drawWords(context, column);
  }
}

/** Draw what belongs to one or two dots alone, for the layer above a faded scene. */
export function drawFocus(context, scene, focused, width, height) {
  context.clearRect(0, 0, width, height);
  const near = new Set(focused);
  for (const section of scene.sections) {
    const edges = section.edges.filter(({from, to}) => focused.includes(from) || focused.includes(to));
    drawEdges(context, edges, Math.min(edges.length, 60), 1.25);
    for (const {from, to} of edges) near.add(from).add(to);
  }
  for (const dot of near) drawDot(context, dot);
  for (const dot of focused) {
    drawRing(context, dot, TEXT, 2, 4);
  }
  for (const column of scene.columns) {
    drawNames(
      context,
      column,
      column.dots.filter((dot) => near.has(dot)),
      new Set(focused),
    );
  }
}

/** A hint of a line that the dots of a layer hang on. */
function drawRail(context, x, height) {
  context.fillStyle = "#f1f2f3";
  context.fillRect(x - 1, RAIL.top, 2, height - RAIL.top - RAIL.bottom);
}

function drawEdges(context, edges, crowd, stronger) {
  const looks = new Map();
  for (const edge of edges) {
    const level = Math.min(LEVELS, Math.round(Math.sqrt(edge.share) * LEVELS));
    const key = `${edge.color === BETWEEN ? 0 : 1} ${String(level).padStart(2, "0")} ${edge.color}`;
    const list = looks.get(key);
    if (list) list.push(edge);
    else looks.set(key, [edge]);
  }
  // Grey below, so that it never hides what holds a module together; and weak below strong.
  for (const key of [...looks.keys()].sort()) {
    const level = Number(key.slice(2, 4)) / LEVELS;
    const {width, opacity} = edgeStyle(level * level, crowd);
    context.strokeStyle = key.slice(5);
    context.globalAlpha = Math.min(1, stronger > 1 ? 0.3 + 0.7 * opacity : opacity);
    context.lineWidth = width * stronger;
    context.beginPath();
    for (const {from, to} of looks.get(key)) {
      const bend = (to.x - from.x) * 0.42;
      context.moveTo(from.x, from.y);
      context.bezierCurveTo(from.x + bend, from.y, to.x - bend, to.y, to.x, to.y);
    }
    context.stroke();
  }
  context.globalAlpha = 1;
}

function drawDot(context, dot) {
  context.beginPath();
  context.arc(dot.x, dot.y, dot.radius, 0, 2 * Math.PI);
  context.fillStyle = dot.hollow ? "#ffffff" : dot.color;
  context.fill();
  context.strokeStyle = dot.hollow ? dot.color : "#ffffff";
  context.lineWidth = dot.hollow ? Math.min(1.8, 0.6 * dot.radius) : Math.min(1, 0.3 * dot.radius);
  context.stroke();
  if (dot.isNew) drawRing(context, dot, TEXT, 1, 2);
}

function drawRing(context, dot, color, lineWidth, gap) {
  context.beginPath();
  context.arc(dot.x, dot.y, dot.radius + gap, 0, 2 * Math.PI);
  context.strokeStyle = color;
  context.lineWidth = lineWidth;
  context.stroke();
}

function drawWords(context, column) {
  const named = column.dots.filter((dot) => dot.label).slice(0, column.words ? MOST_NAMES : MOST_NAMES_IN_A_CROWD);
  drawNames(context, column, named, new Set());
  if (!column.words) return;
  context.font = `10px ${FONT}`;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const dot of column.dots) written(context, String(dot.id), dot.x - dot.radius - 5, dot.y, MUTED);
}

/** Names at the right of dots, as many as fit, the most important first; those of `strong` in bold, with their id. */
function drawNames(context, column, dots, strong) {
  context.textAlign = "left";
  context.textBaseline = "middle";
  const taken = [];
  const first = dots.filter((dot) => strong.has(dot));
  for (const dot of [...first, ...dots.filter((dot) => !strong.has(dot))]) {
    if (taken.some((other) => Math.abs(other.y - dot.y) < 12)) continue;
    const text = strong.has(dot) ? [dot.id, dot.label].filter((word) => word !== "").join(" · ") : dot.label;
    if (!text) continue;
    taken.push(dot);
    context.font = `${strong.has(dot) ? "600 12px" : "10.5px"} ${FONT}`;
    const x = dot.x + dot.radius + (strong.has(dot) ? 8 : 4);
    const words = shortened(context, text, Math.max(column.room, 30) * (strong.has(dot) ? 1.15 : 1));
    if (strong.has(dot)) {
      // Over the same name in the faded picture below.
      context.fillStyle = "#ffffff";
      context.fillRect(x - 2, dot.y - 8, context.measureText(words).width + 8, 16);
    }
    written(context, words, x, dot.y, TEXT);
  }
}

function written(context, text, x, y, color) {
  context.lineJoin = "round";
  context.lineWidth = 4;
  context.strokeStyle = "rgba(255, 255, 255, 0.9)";
  context.strokeText(text, x, y);
  context.fillStyle = color;
  context.fillText(text, x, y);
}
