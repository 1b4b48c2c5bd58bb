// How a sample looks with the values of a feature: tokens, image, table row, series or text.

import {h, s} from "./dom.js";
import {integer, signed} from "./text.js";
import {valueColor} from "./palette.js";

// Longer texts are cut to what is around the position.
const MAX_LETTERS = 110;
const MAX_TEXT = 280;
const MAX_COLUMNS = 5;
const IMAGE_PX = 76;
const SERIES = {width: 150, height: 44};

/** Kinds of which several fit beside each other; the others take a line each. */
export const SMALL = new Set(["image", "series"]);

/**
 * One example, other than a table row. `scale` is the value with the strongest colour, `compact` leaves out details.
 */
export function exampleView(example, rendering, {shape, scale, compact = false}) {
  const draw = {tokens: tokensView, image: imageView, series: seriesView, text: textView}[rendering?.kind];
  const small = SMALL.has(rendering?.kind);
  // With a mark in the picture, or at the token.
  const isMarked = small || (rendering?.kind === "tokens" && example.token !== null);
  const where = placeText(example, rendering, shape);
  const value = h("span", {class: "lib-example-value"}, swatch(example.value, scale), signed(example.value));
  const about = h(
    "span",
    {class: "lib-example-about"},
    [draw ? classText(rendering.label) : `sample ${integer(example.sample)}`, compact || isMarked ? "" : where].filter(Boolean).join(" · "),
  );
  const title = [`sample ${integer(example.sample)}`, rendering?.label, where].filter(Boolean).join(", ");
  const picture = draw ? draw(example, rendering, {shape, scale, title, compact}) : null;
  return h(
    "li",
    {class: `lib-example ${small ? "lib-small-example" : "lib-wide-example"}`, "data-sample": example.sample, title},
    small ? [picture, value, about] : [value, h("div", {class: "lib-example-look"}, picture, about)],
  );
}

/** The class of a sample; a number alone would not say that it is one. */
function classText(label) {
  return /^\d+$/.test(label ?? "") ? `class ${label}` : label;
}

function swatch(value, scale) {
  return h("span", {class: "lib-value-swatch", style: {background: valueColor(value, scale)}});
}

/** Where in the sample the feature has this value, "" if a sample has one position. */
function placeText({position}, rendering, shape) {
  if (shape?.length === 2) return `row ${integer(Math.floor(position / shape[1]))}, column ${integer(position % shape[1])}`;
  if (shape?.length === 1 || position > 0) return `position ${integer(position)}`;
  return "";
}

/** Tokens around the position, each in the colour of the feature's value at it. */
function tokensView(example, {tokens}, {shape, scale}) {
  const {context, context_start: start, token} = example;
  // Positions may be those of other tokens, such as behind a class token.
  const position = token ?? example.position;
  const known = context ?? [example.value];
  const from = context ? start + position - example.position : position;
  // A layer that has one value for each sample, such as a pooled one, has no token of its own.
  const hasPlace = token !== null && position < tokens.length && (shape?.length > 0 || position > 0);
  const [first, end] = hasPlace ? windowAround(tokens, from, from + known.length, position) : [0, Math.min(tokens.length, MAX_LETTERS)];
  const shown = [];
  for (let p = first; p < end; p++) {
    if (tokens[p] === "") continue; // padding in front
    const value = hasPlace ? known[p - from] : undefined;
    const has = value !== undefined && value !== null;
    const at = hasPlace && p === position;
    shown.push(
      h(
        at ? "mark" : "span",
        {
          class: `lib-token${at ? " lib-token-here" : ""}${has || !hasPlace ? "" : " lib-token-unknown"}`,
          style: has ? {background: valueColor(value, scale)} : null,
          title: `${has ? signed(value) : "no value kept"} at position ${integer(p)}`,
        },
        visible(String(tokens[p])),
      ),
    );
  }
  return h(
    "span",
    {class: "lib-tokens"},
    first > 0 ? h("span", {class: "lib-cut"}, "… ") : null,
    shown,
    end < tokens.length ? h("span", {class: "lib-cut"}, " …") : null,
  );
}

/** First token and end of a part of a text: the values known, and as much around them as fits into two lines. */
function windowAround(tokens, from, to, position) {
  let [first, end] = [Math.max(0, Math.min(from, position)), Math.min(tokens.length, Math.max(to, position + 1))];
  const letters = (p) => Math.max(1, String(tokens[p] ?? "").length);
  let count = 0;
  for (let p = first; p < end; p++) count += letters(p);
  // A token on each side in turn.
  while (count < MAX_LETTERS && (first > 0 || end < tokens.length)) {
    if (first > 0) count += letters(--first);
    if (end < tokens.length) count += letters(end++);
  }
  return [first, end];
}

/** A token with its line breaks and tabs as signs. */
function visible(token) {
  return token.replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
}

/** An image with a box around the position. Small images are enlarged with their pixels visible. */
function imageView(example, {png, size}, {shape, title, compact}) {
  const [rows, columns] = size ?? [1, 1];
  const zoom = ((compact ? 0.75 : 1) * IMAGE_PX) / Math.max(rows, columns);
  const [width, height] = [columns * zoom, rows * zoom];
  return h(
    "span",
    {class: "lib-image", style: {width: `${width}px`, height: `${height}px`}},
    h("img", {
      src: `data:image/png;base64,${png}`,
      alt: title,
      width,
      height,
      style: {imageRendering: zoom > 1 ? "pixelated" : "auto"},
    }),
    boxView(example, size, shape),
  );
}

/** A box around a part of an image, in shares of its sides. */
function box(left, top, width, height) {
  const style = {left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * width}%`, height: `${100 * height}%`};
  return h("span", {class: "lib-box", style});
}

/** The box of a position in an image. The positions of a sequence that fill a square are those of patches. */
function boxView({position, position_box: part}, size, shape) {
  if (part === null) return null;
  if (part && size) return box(part[1] / size[1], part[0] / size[0], part[3] / size[1], part[2] / size[0]);
  let grid = shape?.length === 2 ? shape : null;
  if (shape?.length === 1) {
    const others = [0, 1].find((extra) => Number.isInteger(Math.sqrt(shape[0] - extra)) && shape[0] - extra > 1);
    if (others === undefined || position < others) return null;
    const side = Math.sqrt(shape[0] - others);
    [grid, position] = [[side, side], position - others];
  }
  if (!grid || grid[0] * grid[1] <= 1 || position >= grid[0] * grid[1]) return null;
  const [row, column] = [Math.floor(position / grid[1]), position % grid[1]];
  return box(column / grid[1], row / grid[0], 1 / grid[1], 1 / grid[0]);
}

/** Rows of a table, with the columns that differ most between the examples; all of them on hover. */
export function rowTable(examples, renderings, {scale, columns, compact}, label) {
  const {columns: names} = renderings[examples[0].sample];
  const chosen = (columns ?? names.map((_, c) => c)).slice(0, compact ? MAX_COLUMNS - 2 : MAX_COLUMNS);
  const more = names.length - chosen.length;
  const hasLabels = examples.some(({sample}) => renderings[sample].label);
  return h(
    "div",
    {class: "lib-rows"},
    h(
      "table",
      {"aria-label": label},
      h(
        "tr",
        {},
        h("th", {}, "value"),
        hasLabels ? h("th", {}, "label") : null,
        chosen.map((c) => h("th", {title: names[c]}, names[c])),
        more ? h("th", {}, `+ ${integer(more)} columns`) : null,
      ),
      examples.map((example) => {
        const {values, label: kind} = renderings[example.sample];
        const all = names.map((name, c) => `${name}: ${cell(values[c])}`).join("\n");
        return h(
          "tr",
          {title: all, "data-sample": example.sample},
          h("td", {class: "lib-example-value"}, swatch(example.value, scale), signed(example.value)),
          hasLabels ? h("td", {}, kind ?? "") : null,
          chosen.map((c) => h("td", {}, cell(values[c]))),
        );
      }),
    ),
  );
}

function cell(value) {
  return typeof value === "number" ? signed(value) : String(value ?? "–");
}

/** Columns of table rows, those first that differ most between the largest and the smallest examples. */
export function tellingColumns(examples, renderings) {
  const rows = (kind) =>
    examples.filter((example) => example.kind === kind).map((example) => renderings[example.sample]).filter((one) => one?.kind === "row");
  const [high, low] = [rows("largest"), rows("smallest")];
  const all = [...high, ...low];
  if (!all.length) return undefined;
  const mean = (list, c) => list.reduce((sum, row) => sum + Number(row.values[c]), 0) / list.length;
  const score = all[0].columns.map((_, c) => {
    const center = mean(all, c);
    const spread = Math.sqrt(all.reduce((sum, row) => sum + (Number(row.values[c]) - center) ** 2, 0) / all.length);
    const difference = high.length && low.length ? mean(high, c) - mean(low, c) : spread;
    return spread > 0 && Number.isFinite(difference) ? Math.abs(difference) / spread : 0;
  });
  return score.map((_, c) => c).sort((a, b) => score[b] - score[a] || a - b);
}

/** Channels as lines, with a mark at the position. */
function seriesView({position, token}, {values, length: steps}, {shape, title, compact}) {
  const zoom = compact ? 0.75 : 1;
  const [width, height] = [SERIES.width * zoom, SERIES.height * zoom];
  const finite = values.flat().filter((value) => Number.isFinite(value));
  const [low, high] = [Math.min(...finite), Math.max(...finite)];
  const y = (value) => (high > low ? 2 + ((high - value) / (high - low)) * (height - 4) : height / 2);
  const length = Math.max(...values.map((channel) => channel.length));
  const x = (t) => (length > 1 ? 2 + (t / (length - 1)) * (width - 4) : width / 2);
  const svg = s("svg", {width, height, class: "lib-series", role: "img", "aria-label": title});
  if (token !== null && shape?.length === 1 && shape[0] > 1) {
    // A layer with fewer positions than the series has each stand for several.
    const band = Math.max(1.5, (width - 4) / shape[0]);
    const share = token === undefined ? (position + 0.5) / shape[0] : (token + 0.5) / (steps ?? length);
    const at = 2 + share * (width - 4);
    svg.append(s("rect", {x: at - band / 2, y: 0, width: band, height, class: "lib-series-here"}));
  }
  values.forEach((channel, c) => {
    const points = channel.map((value, t) => (Number.isFinite(value) ? `${x(t).toFixed(1)},${y(value).toFixed(1)}` : null));
    svg.append(s("polyline", {points: points.filter(Boolean).join(" "), class: `lib-channel lib-channel-${c % 4}`}));
  });
  return svg;
}

function textView(_, {text}) {
  const whole = String(text);
  return h("span", {class: "lib-text", title: whole}, whole.length > MAX_TEXT ? `${whole.slice(0, MAX_TEXT)}…` : whole);
}
