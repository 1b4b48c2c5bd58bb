// The graph of one run: canvases, the text around them, and mouse events.

import {
  AGAINST,
  AGES,
  DRIVES,
  FROM_THE_START,
  NO_MODULE,
  OTHER_MODULES,
  SHARED_KINDS,
  MUTED,
  VERMILION,
  dotRadius,
  canvasColors,
  edgeStyle,
  ink,
  moduleColor,
  paler,
  sharedColor,
} from "./palette.js";
import {THEME} from "./theme.js";
import {h, resizeCanvas} from "./dom.js";
import {counted, integer, percent} from "./text.js";
import {heightsByLineage, heightsByModule} from "./layout.js";
import {SnapshotCache} from "./cache.js";
import {buildScene, countShown, dotAt, dotOfLineage, heightOfSlots, modulesShown} from "./scene.js";
import {drawFocus, drawScene} from "./graph.js";
import {FeatureList} from "./feature_list.js";
import {featureDetails} from "./tooltip.js";

const FADE_MS = 110;
const NARROW_PITCH = 120;

/**
 * The graph of one run. `actions.follow({run, l, id})` is called for a click on a dot, `actions.follow(null)` for other
 * clicks, and `actions.hover()` when there is another dot under the mouse.
 */
export class RunPanel {
  constructor({name, title, color}, tip, actions) {
    this.name = name;
    this.title = title;
    this.tip = tip;
    this.actions = actions;
    this.shared = null;
    this.paired = [];
    this.scene = null;
    this.hovered = null;
    this.followed = null;
    this.canvases = [h("canvas"), h("canvas")];
    this.overlay = h("canvas", {class: "lib-overlay"});
    this.columnTexts = h("div", {class: "lib-heads"});
    this.base = h("div", {class: "lib-base"}, this.canvases);
    this.stage = h("div", {class: "lib-stage", role: "img"}, this.base, this.overlay, this.columnTexts);
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
        h("h2", {}, h("span", {class: "lib-line-swatch", style: {background: ink(color)}}), title),
        this.at,
        this.counts,
      ),
      this.stage,
      this.colors,
      this.note,
    );
    this.list = new FeatureList({
      point: (dot) => this.#point(dot),
      follow: (dot) => this.actions.follow({run: this.name, l: dot.l, id: dot.id}),
    });
    this.element.append(this.list.element);
    this.stage.addEventListener("mousemove", (event) => this.#hover(event));
    this.stage.addEventListener("mouseleave", () => this.#leave());
    this.stage.addEventListener("click", (event) => this.#click(event));
  }

  /** Set the data of the run, at first and whenever its version changes. */
  setData(history, source, version) {
    this.history = history;
    this.version = version;
    this.cache = new SnapshotCache(source, this.name);
    this.frames = new Map();
  }

  /** Fetch the data again at the next refresh. */
  invalidate() {
    this.version = null;
  }

  /** Set the lineage `{run, l, id}` that is followed, in this run or another, or null. */
  setFollowed(lineage) {
    this.followed = lineage?.run === this.name ? lineage : null;
  }

  /** Set what is known of features that the runs beside have as well (see shared.js), null for nothing. */
  setShared(shared) {
    this.shared = shared;
    this.sharedFrames = new Map();
  }

  /** Emphasize lineages `{l, id}`: the counterparts of one in a graph beside. */
  setPaired(lineages) {
    this.paired = lineages;
  }

  #frame(k, view) {
    const {history} = this;
    if (view.heights === "module") return heightsByModule(history, k, view.limit);
    const reserved = view.heights === "shared" ? this.shared?.reserved(this.name, view.limit) : null;
    const frames = reserved ? this.sharedFrames : this.frames;
    if (!frames.has(view.limit)) frames.set(view.limit, heightsByLineage(history, view.limit, reserved));
    return frames.get(view.limit)[k];
  }

  /** Height in pixels that the longest column of snapshot k needs, so that there is space for the number of each dot. */
  heightOfNumbers(k, view) {
    return heightOfSlots(Math.max(...this.#frame(k, {...view, heights: "lineage"}).map((column) => column.slots)));
  }

  /** Draw snapshot k; with `fade`, over the previous one. */
  draw(k, snapshot, view, fade) {
    const [width, height] = [Math.max(260, this.stage.clientWidth), view.graphHeight];
    this.stage.style.height = `${height}px`;
    const shared = (l, id, at) => this.shared?.of(this.name, l, id, at) ?? {row: null, others: []};
    const color = view.color === "shared" && !this.shared ? "module" : view.color;
    const scene = {...view, color, shared, width, height};
    this.scene = buildScene(this.history, k, snapshot, this.#frame(k, view), scene);
    const front = this.canvases.reverse()[0];
    this.drawColors = canvasColors(view.dark);
    drawScene(resizeCanvas(front, width, height), this.scene, {width, height}, this.drawColors);
    this.base.append(front);
    for (const animation of front.getAnimations()) animation.cancel();
    if (fade) front.animate([{opacity: 0}, {opacity: 1}], {duration: FADE_MS, easing: "ease-out"});
    this.size = [width, height];
    this.#writeText(view);
    this.hovered = this.hovered && dotOfLineage(this.scene, this.hovered.l, this.hovered.id);
    this.list.show(this.scene);
    this.focus();
    if (this.hovered) this.#showTooltip(this.hovered);
  }

  #showTooltip(dot) {
    const followed = this.followed?.l === dot.l && [dot.id, ...dot.folded].includes(this.followed.id);
    const others = this.shared ? this.#others(dot) : null;
    this.tip.show(this, featureDetails(this.scene, dot, {followed, others}));
  }

  /** What comparisons say about a dot, with the names of the other runs' node layers. */
  #others(dot) {
    return this.shared
      .of(this.name, dot.l, dot.id, this.scene.k)
      .others.map((other) => ({...other, layer: this.shared.layerName(other.run, other.l), run: this.actions.titleOf(other.run)}));
  }

  /** Show a text instead of a graph. */
  clear(text) {
    this.scene = null;
    this.columnTexts.replaceChildren(h("div", {class: "lib-blank"}, text));
    for (const canvas of [...this.canvases, this.overlay]) canvas.width = canvas.width + 0;
    this.counts.textContent = "";
    this.at.hidden = true;
    this.colors.replaceChildren();
    this.list.show(null);
    this.note.textContent = "";
  }

  #writeText(view) {
    const {scene} = this;
    const step = this.history.steps[scene.k];
    this.at.hidden = step === view.step;
    this.at.textContent = `at step ${integer(step)}`;
    this.counts.textContent =
      `${integer(scene.edgesDrawn)} of ${counted(scene.edges, "edge")} drawn, ` +
      `${percent(scene.share)} of the strength; ${integer(scene.featuresDrawn)} of ${counted(scene.features, "feature")}`;
    this.stage.setAttribute("aria-label", `Interaction graph of ${this.title}: ${this.counts.textContent}`);
    // Between columns that are close together, on a phone, there is space for a few letters.
    const isNarrow = scene.pitch < NARROW_PITCH;
    const columnTexts = scene.columns.map((column, l) => {
      const {name, kind} = this.history.layers[l];
      const shown = countShown(column);
      const count = shown < column.total ? `${integer(shown)} of ${integer(column.total)}` : integer(shown);
      // Names at the rim of the picture must not leave it.
      const toRim = Math.min(column.x, this.size[0] - column.x);
      const width = Math.max(60, Math.min(scene.pitch - 8, 2 * toRim));
      return h(
        "div",
        {class: "lib-head", title: name, style: {left: `${column.x}px`, width: `${width}px`}},
        h("b", {}, h("bdi", {}, name)),
        h("span", {}, isNarrow ? count : `${count} ${THEME.feature_names[kind] ?? "features"}`),
      );
    });
    const feet = scene.sections.map((section) =>
      h(
        "div",
        {class: "lib-foot", style: {left: `${section.x}px`, width: `${Math.max(60, scene.pitch - 6)}px`}},
        h("span", {}, `${integer(section.drawn)} of ${isNarrow ? integer(section.count) : counted(section.count, "edge")}`),
        h("span", {}, `${percent(section.strength / section.total)}${isNarrow ? "" : " of strength"}`),
      ),
    );
    this.columnTexts.replaceChildren(...columnTexts, ...feet);
    this.note.textContent = scene.isTruncated
      ? `Only the ${integer(scene.loadedPerSection)} strongest edges of each section are loaded; weaker ones are not drawn.`
      : "";
    this.colors.replaceChildren(...this.#colorKey(view.color), ...(view.signs ? this.#signKey(view.color) : []));
  }

  #signKey(by) {
    const {history, scene} = this;
    if (!scene.hasSigns) return [h("span", {}, "This snapshot is of an earlier version and does not have the signs of edges.")];
    const line = (background, text) =>
      h("span", {class: "lib-key"}, h("span", {class: "lib-line-swatch lib-sign-swatch", style: {background}}), text);
    return [
      h("span", {}, "lines: a feature"),
      line(ink(DRIVES), "drives the next one the way it goes"),
      line(`repeating-linear-gradient(90deg, ${ink(AGAINST)} 0 6px, transparent 6px 9px)`, "holds against it"),
      ...(by === "module" && history.hasModules ? [line(ink(paler(DRIVES)), "faint: between modules")] : []),
    ];
  }

  #colorKey(by) {
    const entry = ([color, text]) =>
      h("span", {class: "lib-key"}, h("span", {class: "lib-swatch", style: {background: ink(color)}}), text);
    const {history, scene} = this;
    if (by === "age") {
      return [
        h("span", {}, "age of features:"),
        ...[[FROM_THE_START, "from the start"], ...AGES.map((age) => [age.color, age.name])].map(entry),
      ];
    }
    if (by === "label") {
      const shown = new Set(scene.columns.flatMap((column) => column.dots.map((dot) => dot.group)));
      const drawn = [...history.labelGroups].filter(([group]) => shown.has(group));
      if (!drawn.length) return [h("span", {}, "No feature shown has a label.")];
      const groups = drawn.filter(([, color]) => color !== OTHER_MODULES);
      const others = drawn.length - groups.length;
      return [
        h("span", {}, "labels:"),
        ...groups.map(([group, color]) => entry([color, group])),
        ...(others ? [entry([OTHER_MODULES, `${integer(others)} more`])] : []),
        ...(shown.has(null) ? [entry([NO_MODULE, "none"])] : []),
      ];
    }
    if (by === "shared" && this.shared) {
      const shown = new Set(scene.columns.flatMap((column) => column.dots.map((dot) => dot.group)));
      const kinds = Object.entries(SHARED_KINDS).filter(([kind]) => shown.has(kind));
      const mark = ({color, hollow}) => {
        const style = hollow ? {border: `2px solid ${ink(color)}`} : {background: ink(color)};
        return h("span", {class: "lib-swatch", style});
      };
      return [
        h("span", {class: "lib-key"}, [0, 1, 2].map((row) => mark({color: sharedColor(row)})), "in both: same height and colour"),
        ...kinds.map(([, kind]) => h("span", {class: "lib-key"}, mark(kind), kind.name)),
        ...(scene.hasSigns || !shown.has("shared") ? [] : [h("span", {}, "blue lines: between features in both")]),
        h("span", {}, this.shared.comparedText(this.name)),
      ];
    }
    if (!history.hasModules) return [entry([scene.hasSigns ? MUTED : VERMILION, "features (modules were not computed)"])];
    const {colored, others, none} = modulesShown(scene);
    return [
      h("span", {}, "modules:"),
      ...colored.map((module) => entry([moduleColor(module), String(module)])),
      ...(others ? [entry([OTHER_MODULES, `${integer(others)} more`])] : []),
      ...(none ? [entry([NO_MODULE, "none"])] : []),
      ...(scene.hasSigns ? [] : [h("span", {}, "grey lines: between modules")]),
    ];
  }

  /** Emphasize the dot under the mouse and the followed one. */
  focus() {
    if (!this.scene) return;
    const followed = this.followed && dotOfLineage(this.scene, this.followed.l, this.followed.id);
    const paired = this.paired.map(({l, id}) => dotOfLineage(this.scene, l, id));
    const focused = [...new Set([this.hovered, followed, ...paired])].filter(Boolean);
    this.focused = focused;
    this.stage.classList.toggle("lib-hovering", Boolean(this.hovered));
    this.stage.classList.toggle("lib-following", Boolean(followed || paired.some(Boolean)) && !this.hovered);
    const [width, height] = this.size;
    this.list.showFollowed(this.followed);
    const context = resizeCanvas(this.overlay, width, height);
    context.clearRect(0, 0, width, height);
    drawFocus(context, this.scene, focused, this.drawColors);
    if (!this.hovered) this.tip.hide(this);
  }

  #hover(event) {
    if (!this.scene) return;
    const bounds = this.stage.getBoundingClientRect();
    const dot = dotAt(this.scene, event.clientX - bounds.left, event.clientY - bounds.top);
    this.stage.style.cursor = dot ? "pointer" : "";
    if (dot !== this.hovered) {
      this.hovered = dot;
      this.actions.hover();
      if (dot) this.#showTooltip(dot);
    }
    if (dot) this.tip.place(bounds.left + dot.x, bounds.top + dot.y, dot.radius);
  }

  /** Emphasize a dot that is pointed at in the list. */
  #point(dot) {
    if (!this.scene || dot === this.hovered) return;
    this.hovered = dot;
    this.actions.hover();
    if (!dot) return;
    this.#showTooltip(dot);
    const bounds = this.stage.getBoundingClientRect();
    this.tip.place(bounds.left + dot.x, bounds.top + dot.y, dot.radius);
  }

  #leave() {
    this.hovered = null;
    this.actions.hover();
  }

  #click(event) {
    if (!this.scene) return;
    const bounds = this.stage.getBoundingClientRect();
    const dot = dotAt(this.scene, event.clientX - bounds.left, event.clientY - bounds.top);
    this.actions.follow(dot ? {run: this.name, l: dot.l, id: dot.id} : null);
    if (this.hovered) this.#showTooltip(this.hovered);
  }

  /** Position of a lineage's dot on the page in pixels, null if it is not drawn. */
  positionOf(layer, id) {
    const l = this.history?.layers.findIndex((other) => other.name === layer) ?? -1;
    const dot = this.scene && l >= 0 ? dotOfLineage(this.scene, l, id) : null;
    if (!dot) return null;
    const bounds = this.stage.getBoundingClientRect();
    return {x: bounds.left + window.scrollX + dot.x, y: bounds.top + window.scrollY + dot.y};
  }
}

/** Legend of sizes, widths and marks. */
export function markLegend() {
  const dot = (radius, extra) =>
    h("span", {class: `lib-dot ${extra ?? ""}`, style: {width: `${2 * radius}px`, height: `${2 * radius}px`}});
  const line = ({width, opacity}) => h("span", {class: "lib-edge", style: {height: `${width}px`, opacity}});
  const item = (...parts) => h("span", {class: "lib-key"}, parts);
  return h(
    "div",
    {class: "lib-legend"},
    item(
      h("span", {}, "dots: importance relative to the layer's largest"),
      [1, 0.1, 0.001].map((share) => [dot(dotRadius(share)), String(share)]),
    ),
    item(
      h("span", {}, "lines: strength relative to the section's largest"),
      [1, 0.1, 0.01].map((share) => [line(edgeStyle(share, 1)), String(share)]),
    ),
    h("span", {class: "lib-key lib-undetermined"}, dot(5, "lib-hollow"), "direction not determined by the samples"),
    item(dot(5, "lib-new"), "new at this step"),
    item(h("span", {}, "numbers: ids of features, as in events and in "), h("code", {}, 'graph.feature("layer/number")')),
    item(h("span", {}, "a click on a feature opens its page")),
  );
}

/** The tooltip of a view, shared by its panels. */
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

  /** Place it below or above a point, where it hides the fewest edges; beside the point in low windows. */
  place(x, y, gap) {
    const {offsetWidth: width, offsetHeight: height} = this.element;
    const {innerWidth, innerHeight} = window;
    const offset = gap + 16;
    let [left, top] = [x - width / 2, y + offset];
    if (top + height > innerHeight - 8) top = y - offset - height;
    if (top < 8) {
      left = x + offset + width > innerWidth - 8 ? x - offset - width : x + offset;
      top = Math.min(y - 30, innerHeight - height - 8);
    }
    this.element.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
    this.element.style.top = `${Math.max(8, top)}px`;
  }
}
