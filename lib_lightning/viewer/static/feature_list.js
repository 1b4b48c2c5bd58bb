// The features in a graph as a list, for keyboards, screen readers and fingers: what the dots of the graph are for a mouse.

import {h} from "./dom.js";
import {ink} from "./palette.js";
import {oneTabStop} from "./one_tab_stop.js";

/** The list. `actions.point(dot)` emphasizes a dot, or none, and `actions.follow(dot)` follows its feature. */
export class FeatureList {
  constructor(actions) {
    this.dots = new Map();
    this.buttons = new Map();
    this.columns = h("div", {class: "lib-list-columns", role: "group", "aria-label": "features of this graph, a column for each node layer: arrow keys move, Enter opens a feature"});
    this.element = h("details", {class: "lib-list", "data-role": "feature-list", ontoggle: () => this.#fill()}, h("summary", {}, "Features as a list"), this.columns);
    this.update = oneTabStop(this.columns, "button", "section");
    const dotOf = (event) => this.dots.get(event.target.closest?.("button")?.dataset.feature) ?? null;
    this.columns.addEventListener("focusin", (event) => actions.point(dotOf(event)));
    this.columns.addEventListener("mouseover", (event) => actions.point(dotOf(event)));
    for (const leave of ["focusout", "mouseleave"]) this.columns.addEventListener(leave, () => actions.point(null));
    this.columns.addEventListener("click", (event) => dotOf(event) && actions.follow(dotOf(event)));
  }

  /** Show the dots of a scene, null for none. */
  show(scene) {
    this.scene = scene;
    this.#fill();
  }

  /** Mark the followed feature, `{l, id}` or null. */
  showFollowed(followed) {
    for (const [feature, dot] of this.dots) {
      const isFollowed = followed?.l === dot.l && [dot.id, ...dot.folded].includes(followed.id);
      this.buttons.get(feature).setAttribute("aria-pressed", String(isFollowed));
    }
  }

  #fill() {
    const {scene} = this;
    const columns = this.element.open && scene ? scene.columns : [];
    const entries = columns.map(({dots, l}) => dots.map((dot) => this.#entry(dot, scene.history.layers[l].name)));
    this.dots = new Map(entries.flat().map(({id, dot}) => [id, dot]));
    // Buttons stay while they say the same, so that one keeps the focus.
    const key = JSON.stringify(entries.flat().map(({id, text, color}) => [id, text, color]));
    if (key === this.key) return;
    this.key = key;
    const focused = this.columns.contains(document.activeElement) ? document.activeElement.dataset.feature : null;
    this.buttons = new Map(entries.flat().map((entry) => [entry.id, button(entry)]));
    this.columns.replaceChildren(
      ...columns.map(({l}, n) => {
        const {name} = scene.history.layers[l];
        const list = entries[n].map(({id}) => h("li", {}, this.buttons.get(id)));
        return h("section", {"aria-label": name}, h("h3", {}, name), h("ol", {}, list));
      }),
    );
    if (!this.buttons.size) return;
    this.update();
    if (focused) (this.buttons.get(focused) ?? [...this.buttons.values()][0]).focus();
  }

  #entry(dot, layer) {
    const more = dot.folded.length ? `and ${dot.folded.length} like it` : "";
    const text = [dot.label, more, dot.isNew ? "new" : ""].filter(Boolean).join(", ");
    return {id: `${layer}/${dot.id}`, dot, text, color: dot.color};
  }
}

function button({id, dot, text, color}) {
  return h(
    "button",
    {type: "button", "data-feature": id, "aria-pressed": "false", tabindex: -1},
    h("span", {class: "lib-swatch", style: {background: ink(color)}}),
    h("b", {}, String(dot.id)),
    ` ${text}`,
  );
}
