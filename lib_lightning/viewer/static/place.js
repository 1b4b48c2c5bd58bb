// Step, runs and followed feature in the address of the page, so that a link shows the same.

const KEYS = ["step", "feature", "of", "run"];

/**
 * The address. In TensorBoard it is that of the whole page, whose part behind "#" begins with the name of the tab; what
 * follows is in the form that TensorBoard has for plugins, "p.lib.step=20". Elsewhere it is that of the page itself.
 */
export class Place {
  constructor(changed) {
    const board = boardWindow();
    this.owner = board ?? window;
    this.prefix = board ? "p.lib." : "";
    this.changed = () => {
      // TensorBoard has another tab in front.
      if (!board || this.#parts()[0] === "lib") changed(this.read());
    };
    this.owner.addEventListener("hashchange", this.changed);
  }

  #parts() {
    return this.owner.location.hash.slice(1).split("&").filter(Boolean);
  }

  /** `{step, feature, of, runs}`, null for what the address does not say; `of` is the run of the feature. */
  read() {
    const found = {step: [], feature: [], of: [], run: []};
    for (const part of this.#parts()) {
      const [key, value] = part.split("=");
      const name = key.startsWith(this.prefix) ? key.slice(this.prefix.length) : "";
      if (KEYS.includes(name) && value) found[name].push(decoded(value));
    }
    const step = Number(found.step[0] ?? NaN);
    return {
      step: Number.isInteger(step) ? step : null,
      feature: found.feature[0] ?? null,
      of: found.of[0] ?? null,
      runs: found.run.length ? found.run : null,
    };
  }

  /** Write them, without a new entry in the history of the browser. */
  write({step, feature, of, runs}) {
    const values = [["step", step], ["feature", feature], ["of", of], ...(runs ?? []).map((run) => ["run", run])];
    const own = values.filter(([, value]) => value !== null).map(([key, value]) => `${this.prefix}${key}=${encoded(value)}`);
    const others = this.#parts().filter((part) => !KEYS.some((key) => part.startsWith(`${this.prefix}${key}=`)));
    if (this.prefix && others[0] !== "lib") return;
    const hash = [...others, ...own].join("&");
    if (hash === this.#parts().join("&")) return;
    try {
      const {pathname, search} = this.owner.location;
      this.owner.history.replaceState(this.owner.history.state, "", hash ? `#${hash}` : `${pathname}${search}`);
    } catch {
      // A page without an address of its own, such as a frame in a notebook.
    }
  }

  destroy() {
    this.owner.removeEventListener("hashchange", this.changed);
  }
}

/** TensorBoard's window, of which the tab is a frame; null elsewhere. */
export function boardWindow() {
  try {
    const outer = window.parent === window ? null : window.parent;
    return outer?.document.querySelector("tb-webapp") ? outer : null;
  } catch {
    return null; // a page of another origin
  }
}

/** Slashes need no sign of their own behind "#", and are easier to read. */
function encoded(value) {
  return encodeURIComponent(value).replaceAll("%2F", "/");
}

function decoded(value) {
  try {
    return decodeURIComponent(value);
  } catch {
    return value;
  }
}
