// Elements, made without a library. Never innerHTML: names of runs, layers and labels are other people's text.

function filled(element, attributes, children) {
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
  return filled(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function s(tag, attributes, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

/** Give a `<select>` these options, `[value, text]` each, and keep what was chosen if it is still there. */
export function setOptions(select, options, chosen) {
  const wanted = chosen ?? select.value;
  const same =
    select.options.length === options.length && options.every(([value], i) => select.options[i].value === value);
  if (!same) select.replaceChildren(...options.map(([value, text]) => h("option", {value}, text)));
  if (options.some(([value]) => value === wanted)) select.value = wanted;
}

/** A canvas of this many CSS pixels, sharp on dense screens; returns its context in CSS pixels. */
export function sized(canvas, width, height) {
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
