// Draws a scene on a canvas. All edges of a look are one path: thousands of single strokes would take too long.

import {MUTED, TEXT, edgeStyle} from "./palette.js";
import {shortened} from "./text.js";

// So many steps of width and opacity are told apart by nobody.
const LEVELS = 14;
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif";

/** Draw edges, dots and words of a scene. */
export function drawScene(context, scene, width, height) {
  // White, not empty: the canvas fades in over the one with the step before.
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, width, height);
  context.lineCap = "butt";
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
  const named = [...near].sort((a, b) => a.rank - b.rank);
  drawNames(context, named, scene.pitch * 0.5, new Set(focused));
}

function drawEdges(context, edges, crowd, stronger) {
  const looks = new Map();
  for (const edge of edges) {
    const level = Math.min(LEVELS, Math.round(Math.sqrt(edge.share) * LEVELS));
    const key = `${String(level).padStart(2, "0")} ${edge.color}`;
    const list = looks.get(key);
    if (list) list.push(edge);
    else looks.set(key, [edge]);
  }
  // Weak ones below; a module's colour over the grey of what lies between modules.
  for (const key of [...looks.keys()].sort()) {
    const level = Number(key.slice(0, 2)) / LEVELS;
    const {width, opacity} = edgeStyle(level * level, crowd);
    context.strokeStyle = key.slice(3);
    context.globalAlpha = Math.min(1, opacity * stronger);
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
  const named = column.dots.filter((dot) => dot.label);
  drawNames(context, named, column.pitch - 40, new Set());
  if (!column.words || column.dots.length > 20) return;
  context.font = `10px ${FONT}`;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const dot of column.dots) written(context, String(dot.id), dot.x - dot.radius - 5, dot.y, MUTED);
}

/** Names at the right of dots, as many as fit, the most important first; those of `strong` in bold, with their id. */
function drawNames(context, dots, room, strong) {
  context.textAlign = "left";
  context.textBaseline = "middle";
  const taken = [];
  for (const dot of [...strong, ...dots.filter((dot) => !strong.has(dot))]) {
    if (taken.some((other) => other.x === dot.x && Math.abs(other.y - dot.y) < 12)) continue;
    const text = strong.has(dot) ? [dot.id, dot.label].filter((word) => word !== "").join(" · ") : dot.label;
    if (!text) continue;
    taken.push(dot);
    context.font = `${strong.has(dot) ? "600 12px" : "10.5px"} ${FONT}`;
    written(context, shortened(context, text, Math.max(room, 40)), dot.x + dot.radius + (strong.has(dot) ? 8 : 4), dot.y, TEXT);
  }
}

function written(context, text, x, y, color) {
  context.lineJoin = "round";
  context.lineWidth = 3;
  context.strokeStyle = "rgba(255, 255, 255, 0.85)";
  context.strokeText(text, x, y);
  context.fillStyle = color;
  context.fillText(text, x, y);
}
