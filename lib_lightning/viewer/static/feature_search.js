// A search field for features with a list of matches: arrow keys, Enter and Escape, or the mouse.

import {h} from "./dom.js";
import {counted} from "./text.js";

const MAX_LISTED = 60;

/** The field. `choose(text)` is called with the name of a feature, or with what was typed. */
export class FeatureSearch {
  constructor(choose) {
    this.choose = choose;
    this.known = [];
    this.matches = [];
    this.active = -1;
    this.list = h("ul", {id: "lib-matches", role: "listbox", "aria-label": "features"});
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
    this.count = h("div", {class: "lib-matches-count", role: "status"});
    this.popup = h("div", {class: "lib-matches", hidden: true}, this.list, this.count);
    this.element = h("span", {class: "lib-search"}, this.input, this.popup);
  }

  /** Set what can be found, as pairs `[name, label]`. */
  setKnown(known) {
    this.known = known;
    if (this.isOpen) this.#search();
  }

  get isOpen() {
    return !this.popup.hidden;
  }

  /** List the features with all words in their names or labels: those first whose name begins with them. */
  #search() {
    const text = this.input.value.trim().toLowerCase();
    const words = text.split(/\s+/);
    const found = this.known.filter(([name, label]) => {
      const both = `${name} ${label}`.toLowerCase();
      return words.every((word) => both.includes(word));
    });
    const begins = ([name]) => text !== "" && name.toLowerCase().startsWith(text);
    this.matches = [...found.filter(begins), ...found.filter((one) => !begins(one))].slice(0, MAX_LISTED);
    const more = found.length > this.matches.length ? `, ${this.matches.length} listed` : "";
    this.count.textContent = found.length ? `${counted(found.length, "feature")}${more}` : "";
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
    this.popup.hidden = this.matches.length === 0;
    this.input.setAttribute("aria-expanded", String(this.isOpen));
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
      const text = this.input.value.trim();
      const isExact = this.known.some((entry) => entry.includes(text));
      // Of part of a name, the first match.
      const match = this.active >= 0 ? this.matches[this.active] : isExact ? null : this.matches[0];
      if (text || this.active >= 0) this.#take(match?.[0] ?? text);
    } else if (event.key === "Escape" && this.isOpen) {
      event.preventDefault();
      event.stopPropagation();
      this.#close();
    }
  }
}
