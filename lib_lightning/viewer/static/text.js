// Formatting of numbers and text.

const SUPERSCRIPTS = {"-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹"};

/** 12345 -> "12,345". */
export function integer(value) {
  return Math.round(value).toLocaleString("en-US");
}

function tenTo(exponent) {
  return "10" + [...String(exponent)].map((letter) => SUPERSCRIPTS[letter]).join("");
}

/** Three significant digits: "0.0123", "1,230", "4.56 × 10⁻⁷". */
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1000 && size < 1e7) return integer(value);
  if (size >= 1e-3 && size < 1000) return String(Number(value.toPrecision(3)));
  const exponent = Math.floor(Math.log10(size));
  return `${Number((value / 10 ** exponent).toPrecision(3))} × ${tenTo(exponent)}`;
}

/** A number with its standard error, rounded to two digits of the error: "0.123 ± 0.012". */
export function withError(value, error) {
  if (value === null || !Number.isFinite(value)) return "–";
  if (error === null || error === undefined || !(error > 0)) return number(value);
  const exponent = Math.floor(Math.log10(Math.max(Math.abs(value), error)));
  const scientific = exponent < -3 || exponent > 6;
  const scale = scientific ? 10 ** exponent : 1;
  const digits = Math.min(9, Math.max(0, 1 - Math.floor(Math.log10(error / scale))));
  const both = `${(value / scale).toFixed(digits)} ± ${(error / scale).toFixed(digits)}`;
  return scientific ? `(${both}) × ${tenTo(exponent)}` : both;
}

/** A number that may be negative, with a minus sign as wide as a plus sign. */
export function signed(value) {
  return number(value).replace("-", "−");
}

/** A change with its standard error, and its sign even if that is plus: "+0.031 ± 0.006". */
export function change(value, error) {
  const text = withError(value, error).replaceAll("-", "−");
  return value > 0 ? `+${text}` : text;
}

/** 0.974 -> "97%"; "100%" and "0%" only if exact. */
export function percent(share) {
  if (!Number.isFinite(share)) return "–";
  if (share > 0 && share < 0.01) return "<1%";
  if (share < 1 && share >= 0.995) return ">99%";
  return `${Math.round(100 * share)}%`;
}

/** 3 -> "3rd". */
export function ordinal(n) {
  const last = n % 100 >= 11 && n % 100 <= 13 ? 0 : n % 10;
  return `${integer(n)}${["th", "st", "nd", "rd"][last] ?? "th"}`;
}

/** One "edge", two "edges". */
export function counted(n, thing) {
  return `${integer(n)} ${thing}${n === 1 ? "" : "s"}`;
}

/** Cut the end of a text to fit a width in pixels, in the font of a canvas context. */
export function shorten(context, text, maxWidth) {
  if (context.measureText(text).width <= maxWidth) return text;
  let end = text.length - 1;
  while (end > 0 && context.measureText(`${text.slice(0, end)}…`).width > maxWidth) end -= 1;
  return end > 0 ? `${text.slice(0, end).trimEnd()}…` : "";
}

/** A name, with quotes if it has spaces at its ends, or no letter or digit: those of tokens. */
export function quoted(text) {
  const name = text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return name && (/^\s|\s$/.test(name) || !/[\p{L}\p{N}]/u.test(name)) ? `“${name}”` : name;
}
