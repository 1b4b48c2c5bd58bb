// The view: which runs, which step, what is drawn. Everything that changes goes through here.

import {h} from "./dom.js";
import {integer} from "./text.js";
import {dotOfLineage} from "./scene.js";
import {Controls} from "./controls.js";
import {Timeline} from "./timeline.js";
import {RunPanel, Tooltip, markLegend} from "./panel.js";
import {Shelf} from "./run_list.js";
import {Player} from "./player.js";
import {emptyState, stepText} from "./strings.js";
import {findFeature, knownFeatures, stillThere} from "./find.js";

const POLL_MS = 5000;
const PREFETCHED = 4;

/** Build the view inside an element; `source` is where runs and snapshots come from. */
export function mount(element, source) {
  const view = new View(element, source);
  view.start();
  return {destroy: () => view.destroy()};
}

class View {
  constructor(element, source) {
    this.source = source;
    this.state = {
      step: null,
      threshold: 0.01,
      limit: 40,
      color: "module",
      heights: "lineage",
      speed: 4,
      metric: null,
      scalar: null,
      xscale: "auto",
      follow: null,
      graphHeight: 480,
    };
    this.steps = [];
    this.pictures = null;
    this.player = new Player(this);
    this.asked = 0;
    this.loading = null;
    this.failed = false;
    this.controls = new Controls(this.state, {
      play: () => this.player.toggle(),
      step: (index) => this.show(this.steps[index], {fade: true}),
      set: (change) => this.set(change),
      run: (name, on) => this.choose(name, on),
      find: (text) => this.find(text),
    });
    this.timeline = new Timeline(this.state, {
      set: (change) => this.set(change),
      go: (step, nearest) => this.show(this.stepNear(step, nearest), {fade: true}),
      follow: (lineage) => this.follow(lineage),
    });
    this.tip = new Tooltip();
    const clicked = (lineage) => this.clicked(lineage);
    this.shelf = new Shelf(source, (name, color) => new RunPanel(name, color, this.tip, clicked));
    this.message = h("div", {class: "lib-message", role: "alert", hidden: true});
    this.empty = h("div", {class: "lib-empty", hidden: true});
    this.grid = h("div", {class: "lib-panels"});
    this.content = h(
      "div",
      {class: "lib-content", hidden: true},
      this.controls.film,
      this.controls.options,
      this.grid,
      markLegend(),
      this.timeline.element,
    );
    this.root = h(
      "div",
      {class: "lib-view", tabindex: -1, "data-ready": "false"},
      this.controls.header,
      this.message,
      this.empty,
      this.content,
      this.tip.element,
      this.timeline.events.tip,
    );
    element.append(this.root);
    this.keys = (event) => this.player.onKey(event);
    document.addEventListener("keydown", this.keys);
    this.resized = new ResizeObserver(() => this.onResize());
    this.resized.observe(this.root);
    this.handle = {
      positionOf: (run, layer, id) => this.shelf.panels.get(run)?.positionOf(layer, id) ?? null,
      show: (step) => this.show(step),
      lastDrawMs: null,
      lastStepMs: null,
    };
    element.libView = this.root.libView = this.handle;
    this.element = element;
  }

  async start() {
    await this.refresh();
    if (!this.source.live) return;
    const poll = async () => {
      await this.refresh();
      if (!this.gone) this.timer = setTimeout(poll, POLL_MS);
    };
    if (!this.gone) this.timer = setTimeout(poll, POLL_MS);
  }

  destroy() {
    this.gone = true;
    clearTimeout(this.timer);
    this.player.play(false);
    document.removeEventListener("keydown", this.keys);
    this.resized.disconnect();
    this.root.remove();
    delete this.element.libView;
  }

  /** Look for something new. */
  async refresh() {
    try {
      const changed = await this.shelf.refresh();
      if (this.gone) return;
      if (!this.failed) this.report(null);
      this.controls.showRuns(this.shelf);
      this.showEmpty(this.shelf.full.length === 0);
      if (changed) await this.dataChanged();
      else if (this.failed) await this.show(this.state.step);
      else if (!this.steps.length) this.root.dataset.ready = "true";
    } catch (error) {
      this.report(error, this.source.live);
    }
  }

  async dataChanged() {
    try {
      await this.#takeData();
    } catch (error) {
      this.failed = true;
      this.shelf.doubt();
      throw error;
    }
  }

  async #takeData() {
    this.asked += 1;
    const atEnd = this.state.step === null || this.state.step === this.steps[this.steps.length - 1];
    this.steps = [...new Set(this.shelf.shown.flatMap((panel) => panel.history.steps))].sort((a, b) => a - b);
    // Whoever looks at the newest snapshot sees the next one come; others are left where they are.
    const step = atEnd ? this.steps[this.steps.length - 1] : this.stepNear(this.state.step);
    this.state.follow = stillThere(this.state.follow, this.shelf);
    this.grid.replaceChildren(...this.shelf.shown.map((panel) => panel.element));
    this.grid.dataset.runs = this.shelf.shown.length;
    this.root.dataset.runs = this.shelf.shown.map((panel) => panel.name).join(" ");
    this.controls.showKnown(knownFeatures(this.shelf.shown));
    this.content.hidden = this.steps.length === 0;
    this.pictures = null;
    if (this.steps.length) {
      this.drawTimeline();
      await this.show(step);
      return;
    }
    this.failed = false;
    this.root.dataset.ready = "true";
  }

  showEmpty(empty) {
    this.empty.hidden = !empty;
    if (!empty) return;
    this.content.hidden = true;
    this.root.dataset.ready = "true";
    this.empty.replaceChildren(...emptyState(this.source.live));
  }

  /** Say what is wrong; without an error, what keeps a run from being shown, if anything does. */
  report(error, again = false) {
    const told = error ?? this.shelf.trouble;
    const more = (error ? again : this.source.live) ? " Trying again every five seconds." : "";
    this.message.hidden = !told;
    this.message.textContent = told ? `${String(told.message ?? told)}${more}` : "";
    if (error) this.root.dataset.ready = "true";
  }

  /** The newest step at or before this one, or with `nearest` the one closest to it. */
  stepNear(step, nearest = false) {
    if (nearest)
      return this.steps.reduce(
        (best, own) => (Math.abs(own - step) < Math.abs(best - step) ? own : best),
        this.steps[0],
      );
    return [...this.steps].reverse().find((own) => own <= step) ?? this.steps[0];
  }

  /** Show a step: as soon as its snapshots are here, unless another one has been asked for since. */
  async show(step, {fade = false} = {}) {
    if (step === undefined || step === null) return;
    const begun = performance.now();
    const turn = ++this.asked;
    const back = this.state.step !== null && step < this.state.step;
    this.state.step = step;
    this.root.dataset.ready = "false";
    const index = this.steps.indexOf(step);
    const wanted = this.shelf.shown.map((panel) => ({panel, k: panel.history.at(step)}));
    this.controls.showStep(index, this.steps.length, stepText(step, index, this.steps.length, wanted));
    let fetched = false;
    try {
      const found = wanted.map(({panel, k}) => (k < 0 ? null : panel.cache.peek(panel.history.steps[k])));
      if (wanted.some(({k}, i) => k >= 0 && !found[i])) {
        // Of all steps that a drag passes while something is on its way, only the newest is asked for.
        await this.loading?.catch(() => null);
        if (turn !== this.asked || this.gone) return;
        this.loading = Promise.all(
          wanted.map(({panel, k}) => (k < 0 ? null : panel.cache.get(panel.history.steps[k]))),
        );
        (await this.loading).forEach((snapshot, i) => {
          found[i] = snapshot;
        });
      }
      if (turn !== this.asked || this.gone) return;
      fetched = true;
      this.draw(
        wanted.map(({panel, k}, i) => ({panel, k, snapshot: found[i]})),
        fade && !this.calm(),
      );
      this.handle.lastStepMs = performance.now() - begun;
      this.failed = false;
      this.report(null);
      this.prefetch(wanted, back);
    } catch (error) {
      if (turn !== this.asked) return;
      this.failed = true;
      if (fetched) this.shelf.doubt();
      this.report(error, this.source.live);
    }
  }

  /** Whether motion is not wanted, or would come too fast to be seen. */
  calm() {
    return matchMedia("(prefers-reduced-motion: reduce)").matches || (this.player.playing && this.state.speed > 6);
  }

  draw(pictures, fade) {
    const begun = performance.now();
    this.pictures = pictures;
    const {state} = this;
    state.graphHeight = Math.round(Math.min(640, Math.max(400, 0.5 * window.innerHeight)));
    for (const {panel, k, snapshot} of pictures) {
      panel.followed = state.follow?.run === panel.name ? state.follow : null;
      if (snapshot) panel.draw(k, snapshot, state, fade);
      else panel.clear(`${panel.name} has no snapshot yet at step ${integer(state.step)}.`);
    }
    this.controls.showThreshold(state.threshold);
    this.timeline.moveTo(state.step);
    this.tellFollowed();
    const sum = (value) => pictures.reduce((total, {panel}) => total + (panel.scene ? value(panel.scene) : 0), 0);
    Object.assign(this.root.dataset, {
      step: state.step,
      edgesDrawn: sum((scene) => scene.edgesDrawn),
      featuresDrawn: sum((scene) => scene.featuresDrawn),
      ready: "true",
    });
    this.handle.lastDrawMs = performance.now() - begun;
  }

  redraw() {
    if (this.pictures && this.root.dataset.ready === "true") this.draw(this.pictures, false);
  }

  prefetch(wanted, back) {
    // Not before the picture is on the screen.
    setTimeout(() => {
      for (const {panel, k} of wanted) {
        const next = Array.from({length: PREFETCHED}, (_, n) => (back ? k - 1 - n : k + 1 + n));
        const steps = [...next, back ? k + 1 : k - 1].map((near) => panel.history.steps[near]);
        panel.cache.prefetch(steps.filter((step) => step !== undefined));
      }
    }, 30);
  }

  set(change) {
    Object.assign(this.state, change);
    if ("metric" in change || "scalar" in change || "xscale" in change) this.drawTimeline();
    else if (!("speed" in change)) this.redraw();
  }

  choose(name, on) {
    this.shelf.choose(name, on);
    return this.refresh();
  }

  /** A click on a dot: follow its lineage, or let go of it; a click beside lets go, too. */
  clicked(lineage) {
    const now = this.state.follow;
    const same = now && lineage && now.run === lineage.run && now.l === lineage.l && now.id === lineage.id;
    this.follow(same ? null : lineage);
  }

  /** Follow a lineage `{run, l, id}` through time, or none. */
  follow(lineage) {
    const layer = lineage && this.shelf.panels.get(lineage.run).history.layers[lineage.l].name;
    this.state.follow = lineage && {...lineage, layer};
    for (const panel of this.shelf.shown) {
      panel.followed = this.state.follow?.run === panel.name ? this.state.follow : null;
      panel.focus();
    }
    this.drawTimeline();
    this.tellFollowed();
  }

  tellFollowed() {
    const {follow} = this.state;
    this.root.dataset.following = follow
      ? `${this.shelf.panels.get(follow.run).history.layers[follow.l].name}/${follow.id}`
      : "";
    const picture = follow && this.pictures?.find(({panel, snapshot}) => panel.name === follow.run && snapshot);
    if (!picture) return;
    const drawn = Boolean(dotOfLineage(picture.panel.scene, follow.l, follow.id));
    this.timeline.tell(picture.panel.history, picture.k, picture.snapshot, drawn);
  }

  drawTimeline() {
    this.timeline.draw(
      this.shelf.shown.map(({name, history}) => ({name, history, color: this.shelf.colors.get(name)})),
    );
    if (this.pictures) this.tellFollowed();
  }

  find(text) {
    const found = findFeature(this.shelf.shown, text);
    if (found) {
      this.follow(found);
      if (!this.failed) this.report(null);
    } else this.report(new Error(`No feature shown is called “${text}”.`));
  }

  onResize() {
    const width = this.root.clientWidth;
    if (width === this.width) return;
    this.width = width;
    if (!this.steps.length) return;
    this.redraw();
    this.drawTimeline();
  }
}
