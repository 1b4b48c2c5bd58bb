// DOM elements without a library. innerHTML is never used, since names and labels are untrusted text.

function withContent(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(element.style, value);
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

/** An HTML element with attributes, listeners (`onclick: f`), styles and children. */
export function h(tag, attributes, ...children) {
  return withContent(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function s(tag, attributes, ...children) {
  return withContent(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

/** Set the options of a `<select>`, `[value, text]` each, and keep the selection if it still exists. */
export function setOptions(select, options, chosen) {
  const wanted = chosen ?? select.value;
  const same =
    select.options.length === options.length && options.every(([value], i) => select.options[i].value === value);
  if (!same) select.replaceChildren(...options.map(([value, text]) => h("option", {value}, text)));
  if (options.some(([value]) => value === wanted)) select.value = wanted;
}

/** Resize a canvas to CSS pixels, at the resolution of the screen; returns its context in CSS pixels. */
export function resizeCanvas(canvas, width, height) {
  const density = window.devicePixelRatio || 1;
  const [w, t] = [Math.round(width * density), Math.round(height * density)];
  if (canvas.width !== w || canvas.height !== t) {
    canvas.width = w;
    canvas.height = t;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(density, 0, 0, density, 0, 0);
  return context;
}
