// Events of features and metrics, as marks along the time axis and as a list.

import {h, s} from "./dom.js";
import {CHART} from "./chart.js";
import {integer} from "./text.js";
import {eventColor, ink} from "./palette.js";
import {oneTabStop} from "./one_tab_stop.js";
import {AlignmentPanel} from "./alignment_panel.js";

const HEIGHT = 30;
// Maximum number of events in the list, and in a tooltip.
const MAX_LISTED = 60;
const MAX_IN_TOOLTIP = 6;

/** Events of the runs shown. `actions.go(step)` moves to a step, `actions.follow(lineage)` follows a lineage. */
export class EventTrack {
  constructor(actions) {
    this.actions = actions;
    this.marks = s("svg", {height: HEIGHT, class: "lib-marks", "aria-hidden": "true"});
    this.tip = h("div", {class: "lib-tip lib-event-tip", "data-role": "event-tip", hidden: true});
    const head = h("div", {class: "lib-track-head"}, h("strong", {}, "events"));
    this.element = h("div", {class: "lib-track lib-event-track"}, head, this.marks);
    this.list = h("ol", {class: "lib-event-list", "data-role": "events", "aria-label": "newest events: arrow keys move, Enter goes to the step of an event"});
    this.updateStops = oneTabStop(this.list, "button");
    this.aligned = new AlignmentPanel(actions);
    this.title = h("h3", {}, "Newest events");
    // Whether those of other features are listed as well, while one is followed.
    this.listsAll = false;
    this.others = h("button", {type: "button", class: "lib-small", "data-role": "all-events", hidden: true, onclick: () => this.#toggle()});
    this.aside = h("aside", {class: "lib-events", "aria-label": "events"}, this.aligned.element, this.title, this.others, this.list);
    this.marks.addEventListener("mousemove", (event) => this.#hover(event));
    this.marks.addEventListener("mouseleave", () => {
      this.tip.hidden = true;
    });
    this.marks.addEventListener("click", (event) => {
      const near = this.#near(event);
      if (near.length) this.#goTo(near[near.length - 1]);
      else actions.go(this.time.back(event.clientX - this.marks.getBoundingClientRect().left), true);
    });
  }

  /** Draw the events of runs; `followed` is the followed lineage, or null. */
  draw(runs, time, followed) {
    this.runs = runs;
    this.followed = followed;
    this.time = time;
    this.all = runs
      .flatMap(({name, history}) => (history.run.events ?? []).map((event) => ({...event, run: name})))
      .sort((a, b) => a.step - b.step);
    this.element.hidden = this.all.length === 0;
    this.marks.setAttribute("width", time.width);
    const y = HEIGHT / 2;
    this.marks.replaceChildren(
      s("line", {x1: CHART.left, x2: time.width - time.right, y1: y, y2: y, class: "lib-axis"}),
      ...this.all.map((event) =>
        s("circle", {
          cx: time.x(event.step).toFixed(1),
          cy: y,
          r: 4,
          fill: ink(eventColor(event.kind)),
          "fill-opacity": 0.75,
        }),
      ),
    );
    // Rebuilt only if the events changed, so that a button keeps the focus when it is pressed.
    const own = followed && !this.listsAll ? [followed.run, followed.layer, followed.id] : [];
    const listed = [...runs.map(({name, history}) => `${name} ${history.run.version}`), ...own].join("\n");
    if (listed !== this.listed) this.#drawList();
    this.listed = listed;
    this.#drawChoice();
  }

  #drawList() {
    const {followed} = this;
    const isOwn = (event) => event.run === followed.run && event.layer === followed.layer && event.lineage === followed.id;
    const chosen = followed && !this.listsAll ? this.all.filter(isOwn) : this.all;
    const newest = chosen.slice(-MAX_LISTED).reverse();
    const none = h("li", {class: "lib-none"}, chosen === this.all ? "No events yet." : "This feature has no events.");
    const focused = this.list.contains(document.activeElement);
    this.list.replaceChildren(...(newest.length ? newest.map((event) => this.#item(event)) : [none]));
    if (!newest.length) return;
    this.updateStops();
    if (focused) this.list.querySelector("button").focus();
  }

  /** While a feature is followed, its events are listed, and on request all. */
  #drawChoice() {
    const {followed} = this;
    this.others.hidden = !followed;
    const isOwn = followed && !this.listsAll;
    this.title.textContent = isOwn ? `Events of ${followed.layer}/${followed.id}` : "Newest events";
    if (followed) this.others.textContent = isOwn ? "show all events" : `only those of ${followed.layer}/${followed.id}`;
  }

  #toggle() {
    this.listsAll = !this.listsAll;
    this.draw(this.runs, this.time, this.followed);
  }

  #item(event) {
    const run = this.runs.length > 1 ? ` · ${this.runs.find(({name}) => name === event.run).title}` : "";
    const when = h(
      "span",
      {class: "lib-event-step"},
      this.#swatch(event),
      `${integer(event.step)} · ${event.kind}${run}`,
    );
    const attributes = {type: "button", class: "lib-event", onclick: () => this.#goTo(event)};
    return h("li", {"data-step": event.step}, h("button", attributes, when, h("span", {}, event.text)));
  }

  #swatch(event) {
    return h("span", {class: "lib-swatch", style: {background: ink(eventColor(event.kind))}});
  }

  /** Move to the step of an event, and follow its feature. */
  #goTo(event) {
    this.actions.go(event.step);
    const run = this.runs.find((candidate) => candidate.name === event.run);
    const l = run.history.layers.findIndex((layer) => layer.name === event.layer);
    if (l >= 0 && Number.isInteger(event.lineage)) this.actions.follow({run: event.run, l, id: event.lineage});
  }

  #near(event) {
    const x = event.clientX - this.marks.getBoundingClientRect().left;
    return this.all.filter((candidate) => Math.abs(this.time.x(candidate.step) - x) <= 5);
  }

  #hover(event) {
    const near = this.#near(event);
    this.tip.hidden = near.length === 0;
    const more = near.length - MAX_IN_TOOLTIP;
    this.tip.replaceChildren(
      ...near.slice(-MAX_IN_TOOLTIP).map((item) => h("p", {}, this.#swatch(item), item.text)),
      ...(more > 0 ? [h("p", {class: "lib-tip-hint"}, `and ${integer(more)} more`)] : []),
    );
    const left = Math.min(event.clientX + 12, window.innerWidth - 340);
    const top = this.marks.getBoundingClientRect().top - this.tip.offsetHeight - 6;
    Object.assign(this.tip.style, {left: `${Math.max(8, left)}px`, top: `${Math.max(8, top)}px`});
  }

  /** Fade events after a step. */
  moveTo(step) {
    for (const item of this.list.children) item.classList.toggle("lib-later", Number(item.dataset.step) > step);
  }
}
