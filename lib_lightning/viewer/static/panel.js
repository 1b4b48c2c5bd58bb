// The graph of one run: canvases, the words around them, and the mouse.

import {AGES, FROM_THE_START, MUTED, NO_MODULE, OTHER_MODULES, VERMILION} from "./palette.js";
import {h, sized} from "./dom.js";
import {counted, integer, percent} from "./text.js";
import {keptHeights, moduleHeights} from "./layout.js";
import {SnapshotCache} from "./cache.js";
import {buildScene, dotAt, dotOfLineage} from "./scene.js";
import {drawFocus, drawScene} from "./graph.js";
import {featureFacts} from "./tooltip.js";

const KINDS = {lib: "LIB features", pca: "PCA features", neuron: "neurons", centered: "neurons, centred"};
const FADE_MS = 110;

/** One run's picture. `onfollow(l, id)` is called with a click on a dot, `onfollow(null)` with one beside. */
export class RunPanel {
  constructor(name, color, tip, onfollow) {
    this.name = name;
    this.tip = tip;
    this.onfollow = onfollow;
    this.scene = null;
    this.hovered = null;
    this.followed = null;
    this.canvases = [h("canvas"), h("canvas")];
    this.overlay = h("canvas", {class: "lib-overlay"});
    this.heads = h("div", {class: "lib-heads"});
    this.base = h("div", {class: "lib-base"}, this.canvases);
    this.stage = h("div", {class: "lib-stage", role: "img"}, this.base, this.overlay, this.heads);
    this.counts = h("span", {class: "lib-counts", "data-role": "edge-counts"});
    this.at = h("strong", {"data-role": "own-step", hidden: true});
    this.note = h("div", {class: "lib-note"});
    this.colors = h("div", {class: "lib-colors", "data-role": "colors"});
    this.element = h(
      "section",
      {class: "lib-panel", "data-run": name},
      h(
        "div",
        {class: "lib-panel-head"},
        h("h2", {}, h("span", {class: "lib-line-swatch", style: {background: color}}), name),
        this.at,
        this.counts,
      ),
      this.stage,
      this.colors,
      this.note,
    );
    this.stage.addEventListener("mousemove", (event) => this.#hover(event));
    this.stage.addEventListener("mouseleave", () => this.#leave());
    this.stage.addEventListener("click", (event) => this.#click(event));
  }

  /** Take a run's data, anew when its version has changed. */
  take(history, source, version) {
    this.history = history;
    this.version = version;
    this.cache = new SnapshotCache(source, this.name);
    this.frames = new Map();
  }

  #frame(k, view) {
    if (view.heights === "module") return moduleHeights(this.history, k, view.limit);
    if (!this.frames.has(view.limit)) this.frames.set(view.limit, keptHeights(this.history, view.limit));
    return this.frames.get(view.limit)[k];
  }

  /** Draw snapshot k. `fade` lets it come up softly over the one before. */
  draw(k, snapshot, view, fade) {
    const [width, height] = [Math.max(320, this.stage.clientWidth), view.graphHeight];
    this.stage.style.height = `${height}px`;
    this.scene = buildScene(this.history, k, snapshot, this.#frame(k, view), {...view, width, height});
    const front = this.canvases.reverse()[0];
    drawScene(sized(front, width, height), this.scene, width, height);
    this.base.append(front);
    for (const animation of front.getAnimations()) animation.cancel();
    if (fade) front.animate([{opacity: 0}, {opacity: 1}], {duration: FADE_MS, easing: "ease-out"});
    this.size = [width, height];
    this.#write(view);
    this.hovered = this.hovered && dotOfLineage(this.scene, this.hovered.l, this.hovered.id);
    this.focus();
    if (this.hovered) this.#tell(this.hovered);
  }

  #tell(dot) {
    this.tip.show(this, featureFacts(this.scene, dot.l, dot.feature, dot.color));
  }

  /** Say why there is no graph here. */
  clear(text) {
    this.scene = null;
    this.heads.replaceChildren(h("div", {class: "lib-blank"}, text));
    for (const canvas of [...this.canvases, this.overlay]) canvas.width = canvas.width + 0;
    this.counts.textContent = "";
    this.at.hidden = true;
    this.colors.replaceChildren();
    this.note.textContent = "";
  }

  #write(view) {
    const {scene} = this;
    const own = this.history.steps[scene.k];
    this.at.hidden = own === view.step;
    this.at.textContent = `at step ${integer(own)}`;
    this.counts.textContent =
      `${integer(scene.edgesDrawn)} of ${counted(scene.edges, "edge")} drawn, ` +
      `${percent(scene.share)} of the strength; ${integer(scene.featuresDrawn)} of ${counted(scene.features, "feature")}`;
    this.stage.setAttribute("aria-label", `Interaction graph of ${this.name}: ${this.counts.textContent}`);
    const heads = scene.columns.map((column, l) => {
      const {name, kind} = this.history.layers[l];
      const shown = column.dots.length;
      const of = shown < column.total ? `${integer(shown)} of ${integer(column.total)}` : integer(shown);
      const width = Math.max(60, scene.pitch - 8);
      return h(
        "div",
        {class: "lib-head", title: name, style: {left: `${column.x}px`, width: `${width}px`}},
        h("b", {}, h("bdi", {}, name)),
        h("span", {}, `${of} ${KINDS[kind] ?? "features"}`),
      );
    });
    const feet = scene.sections.map((section) =>
      h(
        "div",
        {class: "lib-foot", style: {left: `${section.x}px`, width: `${Math.max(60, scene.pitch - 6)}px`}},
        h("span", {}, `${integer(section.edges.length)} of ${counted(section.count, "edge")}`),
        h("span", {}, `${percent(section.strength / section.total)} of strength`),
      ),
    );
    this.heads.replaceChildren(...heads, ...feet);
    this.note.textContent = scene.cut
      ? `Only the strongest ${integer(scene.held)} edges of a section are at hand: weaker ones are not drawn.`
      : "";
    this.colors.replaceChildren(...this.#colorKey(view.color));
  }

  #colorKey(by) {
    const entry = ([color, text]) =>
      h("span", {class: "lib-key"}, h("span", {class: "lib-swatch", style: {background: color}}), text);
    const {history, scene} = this;
    if (by === "age") {
      return [
        h("span", {}, "how long it has been there:"),
        ...[[FROM_THE_START, "from the start"], ...AGES.map((age) => [age.color, age.name])].map(entry),
      ];
    }
    if (by === "label") {
      const groups = [...history.labelGroups].filter(([, color]) => color !== OTHER_MODULES);
      if (!groups.length) return [h("span", {}, "No feature has a label.")];
      const others = history.labelGroups.size - groups.length;
      return [
        h("span", {}, "labels, by their first word:"),
        ...groups.map(([group, color]) => entry([color, group])),
        ...(others ? [entry([OTHER_MODULES, `${integer(others)} more`])] : []),
        entry([NO_MODULE, "none"]),
      ];
    }
    if (!history.hasModules) return [h("span", {}, "No modules are known: "), entry([VERMILION, "features"])];
    const numbers = new Map();
    let [others, none] = [new Set(), false];
    scene.snapshot.layers.forEach((layer, l) =>
      layer.modules?.forEach((module, i) => {
        const color = history.moduleColor(scene.k, l, i);
        if (color === NO_MODULE) none = true;
        else if (color === OTHER_MODULES) others.add(module);
        else numbers.set(color, module);
      }),
    );
    const modules = [...numbers].sort((a, b) => a[1] - b[1]).map(([color, module]) => entry([color, String(module)]));
    return [
      h("span", {}, "modules at this step:"),
      ...modules,
      ...(others.size ? [entry([OTHER_MODULES, counted(others.size, "smaller one")])] : []),
      ...(none ? [entry([NO_MODULE, "none"])] : []),
      h("span", {style: {color: MUTED}}, "grey lines run between modules"),
    ];
  }

  /** Bring out the dots under the mouse and the one that is followed. */
  focus() {
    if (!this.scene) return;
    const followed = this.followed && dotOfLineage(this.scene, this.followed.l, this.followed.id);
    const focused = [this.hovered, followed].filter(Boolean);
    this.stage.classList.toggle("lib-hovering", Boolean(this.hovered));
    this.stage.classList.toggle("lib-following", Boolean(followed) && !this.hovered);
    const [width, height] = this.size;
    drawFocus(sized(this.overlay, width, height), this.scene, focused, width, height);
    if (!this.hovered) this.tip.hide(this);
  }

  #hover(event) {
    if (!this.scene) return;
    const rim = this.stage.getBoundingClientRect();
    const dot = dotAt(this.scene, event.clientX - rim.left, event.clientY - rim.top);
    this.stage.style.cursor = dot ? "pointer" : "";
    if (dot !== this.hovered) {
      this.hovered = dot;
      this.focus();
      if (dot) this.#tell(dot);
    }
    if (dot) this.tip.place(rim.left + dot.x, rim.top + dot.y, dot.radius);
  }

  #leave() {
    this.hovered = null;
    this.focus();
  }

  #click(event) {
    if (!this.scene) return;
    const rim = this.stage.getBoundingClientRect();
    const dot = dotAt(this.scene, event.clientX - rim.left, event.clientY - rim.top);
    this.onfollow(dot ? {run: this.name, l: dot.l, id: dot.id} : null);
  }

  /** Where a lineage's dot lies on the page, in pixels; null where it is not drawn. */
  positionOf(layer, id) {
    const l = this.history?.layers.findIndex((own) => own.name === layer) ?? -1;
    const dot = this.scene && l >= 0 ? dotOfLineage(this.scene, l, id) : null;
    if (!dot) return null;
    const rim = this.stage.getBoundingClientRect();
    return {x: rim.left + window.scrollX + dot.x, y: rim.top + window.scrollY + dot.y};
  }
}

/** What sizes, widths and marks say, the same for all runs. */
export function markLegend() {
  const dot = (radius, extra) =>
    h("span", {class: `lib-dot ${extra ?? ""}`, style: {width: `${2 * radius}px`, height: `${2 * radius}px`}});
  const line = (width, opacity) => h("span", {class: "lib-edge", style: {height: `${width}px`, opacity}});
  const item = (...parts) => h("span", {class: "lib-key"}, parts);
  return h(
    "div",
    {class: "lib-legend"},
    item(h("span", {}, "dots: importance, of the layer's largest"), dot(9.6), "1", dot(5.7), "0.1", dot(2.8), "0.001"),
    item(
      h("span", {}, "lines: strength, of the section's largest"),
      line(4.5, 0.85),
      "1",
      line(1.7, 0.32),
      "0.1",
      line(0.9, 0.15),
      "0.01",
    ),
    item(dot(5, "lib-hollow"), "direction not fixed by the samples"),
    item(dot(5, "lib-new"), "new at this step"),
  );
}

/** The one tooltip of a view; each panel may show its own text in it. */
export class Tooltip {
  constructor() {
    this.element = h("div", {class: "lib-tip", "data-role": "tooltip", role: "tooltip", hidden: true});
    this.owner = null;
  }

  show(owner, content) {
    this.owner = owner;
    this.element.replaceChildren(...content);
    this.element.hidden = false;
  }

  hide(owner) {
    if (this.owner !== owner) return;
    this.owner = null;
    this.element.hidden = true;
  }

  /** Below or above a point of the window, where it hides the fewest edges of a dot there; beside it in low windows. */
  place(x, y, gap) {
    const {offsetWidth: width, offsetHeight: height} = this.element;
    const {innerWidth, innerHeight} = window;
    const far = gap + 16;
    let [left, top] = [x - width / 2, y + far];
    if (top + height > innerHeight - 8) top = y - far - height;
    if (top < 8) {
      left = x + far + width > innerWidth - 8 ? x - far - width : x + far;
      top = Math.min(y - 30, innerHeight - height - 8);
    }
    this.element.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
    this.element.style.top = `${Math.max(8, top)}px`;
  }
}
