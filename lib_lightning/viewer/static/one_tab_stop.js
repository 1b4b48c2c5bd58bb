// Many items that are one stop of the Tab key: arrow keys, Home and End move among them.

/**
 * Make the elements of a container that fit a selector one tab stop. Left and right lead to the item beside, in the next
 * element that fits `column`, if given. Returns a function to be called when the items have changed.
 */
export function oneTabStop(container, selector, column = null) {
  const items = (within = container) => [...within.querySelectorAll(selector)];
  const stopAt = (item) => {
    for (const other of items()) other.tabIndex = other === item ? 0 : -1;
  };
  container.addEventListener("focusin", (event) => {
    const item = event.target.closest(selector);
    if (item) stopAt(item);
  });
  container.addEventListener("keydown", (event) => {
    const item = event.target.closest(selector);
    if (!item || event.ctrlKey || event.metaKey || event.altKey) return;
    const next = neighbour(item, event.key);
    if (next === undefined) return;
    // Elsewhere, these keys move the slider of steps.
    event.preventDefault();
    event.stopPropagation();
    next?.focus();
  });

  /** The item that a key leads to, null for none; undefined for other keys. */
  function neighbour(item, key) {
    const columns = column ? [...container.querySelectorAll(column)].filter((one) => items(one).length) : [container];
    const c = columns.findIndex((one) => one.contains(item));
    const own = items(columns[c]);
    const at = own.indexOf(item);
    const beside = (to) => {
      const other = columns[to] ? items(columns[to]) : [];
      return other[Math.min(at, other.length - 1)] ?? null;
    };
    switch (key) {
      case "ArrowDown":
        return own[at + 1] ?? null;
      case "ArrowUp":
        return own[at - 1] ?? null;
      case "ArrowRight":
        return column ? beside(c + 1) : undefined;
      case "ArrowLeft":
        return column ? beside(c - 1) : undefined;
      case "Home":
        return own[0];
      case "End":
        return own[own.length - 1];
      default:
        return undefined;
    }
  }

  return () => {
    const all = items();
    stopAt(all.find((item) => item.tabIndex === 0) ?? all[0]);
  };
}
