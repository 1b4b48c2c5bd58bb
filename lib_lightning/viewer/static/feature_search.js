// A search field for features with a list of matches: arrow keys, Enter and Escape, or the mouse.

import {h} from "./dom.js";

const MAX_LISTED = 12;

/** The field. `choose(text)` is called with the name of a feature, or with what was typed. */
export class FeatureSearch {
  constructor(choose) {
    this.choose = choose;
    this.known = [];
    this.matches = [];
    this.active = -1;
    this.list = h("ul", {class: "lib-matches", id: "lib-matches", role: "listbox", "aria-label": "features", hidden: true});
    this.input = h("input", {
      type: "search",
      "data-role": "find",
      role: "combobox",
      "aria-autocomplete": "list",
      "aria-expanded": "false",
      "aria-controls": "lib-matches",
      placeholder: "layer/id or label",
      autocomplete: "off",
      size: 20,
      "aria-label": "find a feature and open its page",
      title: "find a feature: arrow keys and Enter open its page",
      oninput: () => this.#search(),
      onfocus: () => this.#search(),
      onblur: () => this.#close(),
      onkeydown: (event) => this.#key(event),
    });
    this.element = h("span", {class: "lib-search"}, this.input, this.list);
  }

  /** Set what can be found, as pairs `[name, label]`. */
  setKnown(known) {
    this.known = known;
    if (!this.list.hidden) this.#search();
  }

  #search() {
    const text = this.input.value.trim().toLowerCase();
    this.matches = this.known.filter(([name, label]) => `${name} ${label}`.toLowerCase().includes(text)).slice(0, MAX_LISTED);
    this.active = -1;
    this.#draw();
  }

  #draw() {
    this.list.replaceChildren(
      ...this.matches.map(([name, label], i) =>
        h(
          "li",
          {
            role: "option",
            id: `lib-match-${i}`,
            "aria-selected": String(i === this.active),
            // Before the field loses the focus.
            onmousedown: (event) => {
              event.preventDefault();
              this.#take(name);
            },
          },
          h("b", {}, name),
          label ? ` ${label}` : "",
        ),
      ),
    );
    this.list.hidden = this.matches.length === 0;
    this.input.setAttribute("aria-expanded", String(!this.list.hidden));
    if (this.active >= 0) this.input.setAttribute("aria-activedescendant", `lib-match-${this.active}`);
    else this.input.removeAttribute("aria-activedescendant");
    this.list.children[this.active]?.scrollIntoView({block: "nearest"});
  }

  #close() {
    this.matches = [];
    this.active = -1;
    this.#draw();
  }

  #take(name) {
    this.input.value = name;
    this.#close();
    this.choose(name);
  }

  #key(event) {
    const n = this.matches.length;
    if ((event.key === "ArrowDown" || event.key === "ArrowUp") && n) {
      event.preventDefault();
      this.active = event.key === "ArrowDown" ? (this.active + 1) % n : (this.active <= 0 ? n : this.active) - 1;
      this.#draw();
    } else if (event.key === "Enter") {
      event.preventDefault();
      const text = this.active >= 0 ? this.matches[this.active][0] : this.input.value.trim();
      if (text) this.#take(text);
    } else if (event.key === "Escape" && !this.list.hidden) {
      event.preventDefault();
      event.stopPropagation();
      this.#close();
    }
  }
}
