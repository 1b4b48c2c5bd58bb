// The graphs that are shown, as they are shown, as a PNG file.

import {h} from "./dom.js";
import {canvasColors} from "./palette.js";
import {FONT, drawFocus, drawScene} from "./graph.js";

// Pixels of the file for one of the page.
const DENSITY = 2;
const PADDING = 12;
// Above and below each graph.
const TITLE = 26,
  KEY = 26;

/** Draw panels below each other; `step` is a text. Returns a canvas. */
export function pictureOf(panels, {dark, step}) {
  const shown = panels.filter((panel) => panel.scene);
  const colors = canvasColors(dark);
  const width = Math.max(...shown.map((panel) => panel.size[0])) + 2 * PADDING;
  const height = shown.reduce((total, {size}) => total + size[1] + TITLE + KEY, PADDING);
  const canvas = h("canvas", {width: DENSITY * width, height: DENSITY * height});
  const context = canvas.getContext("2d");
  context.scale(DENSITY, DENSITY);
  context.fillStyle = colors.paper;
  context.fillRect(0, 0, width, height);
  context.translate(PADDING, 0);
  for (const panel of shown) {
    text(context, `${panel.title} · ${step} · ${panel.counts.textContent}`, 0, TITLE / 2 + 4, {color: colors.text, font: `600 13px ${FONT}`});
    context.translate(0, TITLE);
    drawPanel(context, panel, colors);
    context.translate(0, panel.size[1] + KEY);
  }
  return canvas;
}

function drawPanel(context, {scene, size: [width, height], focused, stage, columnTexts, colors: key}, colors) {
  drawScene(context, scene, {width, height}, colors);
  if (focused.length) {
    context.globalAlpha = 0.6;
    context.fillStyle = colors.paper;
    context.fillRect(0, 0, width, height);
    context.globalAlpha = 1;
    drawFocus(context, scene, focused, colors);
  }
  // Names and counts are elements of the page above the canvas.
  const rim = stage.getBoundingClientRect();
  for (const element of columnTexts.querySelectorAll("b, span")) {
    const box = element.getBoundingClientRect();
    const {fontSize, fontWeight} = getComputedStyle(element);
    const style = {color: element.matches("b") ? colors.text : colors.muted, font: `${fontWeight} ${fontSize} ${FONT}`, align: "center"};
    text(context, element.textContent, box.x - rim.x + box.width / 2, box.y - rim.y + box.height / 2, style);
  }
  drawKey(context, key, height + KEY / 2, colors);
}

/** The line below a graph that says what its colours mean. */
function drawKey(context, element, y, colors) {
  const font = `12px ${FONT}`;
  let x = 0;
  for (const part of element.children) {
    for (const swatch of part.querySelectorAll(".lib-swatch")) {
      const {backgroundColor, borderTopColor, borderTopWidth} = getComputedStyle(swatch);
      context.beginPath();
      context.arc(x + 5, y, 4.5, 0, 2 * Math.PI);
      context.fillStyle = backgroundColor;
      context.strokeStyle = borderTopColor;
      context.fill();
      if (parseFloat(borderTopWidth)) context.stroke();
      x += 15;
    }
    text(context, part.textContent, x, y, {color: colors.muted, font});
    x += context.measureText(part.textContent).width + 16;
  }
}

function text(context, content, x, y, {color, font, align = "left"}) {
  Object.assign(context, {font, fillStyle: color, textAlign: align, textBaseline: "middle"});
  context.fillText(content, x, y);
}

/** Save a canvas as a file. */
export function savePng(canvas, name) {
  canvas.toBlob((blob) => {
    const address = URL.createObjectURL(blob);
    h("a", {href: address, download: `${name.replace(/[^\w.-]+/g, "-")}.png`}).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  });
}
