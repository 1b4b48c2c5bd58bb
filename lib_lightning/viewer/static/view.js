// The view: its state (runs, step, drawing options), and all changes of it.

import {watchDark} from "./dark.js";
import {h} from "./dom.js";
import {themeColors} from "./palette.js";
import {THEME} from "./theme.js";
import {integer} from "./text.js";
import {dotOfLineage} from "./scene.js";
import {Controls} from "./controls.js";
import {Timeline} from "./timeline.js";
import {RunPanel, Tooltip, markLegend} from "./panel.js";
import {RunList} from "./run_list.js";
import {FeaturePanel} from "./feature_panel.js";
import {SharedFeatures} from "./shared.js";
import {ManyRuns} from "./many_runs.js";
import {Place} from "./place.js";
import {pictureOf, savePng} from "./picture_file.js";
import {Player} from "./player.js";
import {emptyState, stepText} from "./strings.js";
import {findFeature, featureSuggestions, followedIn, resolveFollowed} from "./find.js";

const POLL_MS = 5000;
const PREFETCHED = 4;

/** Create the view inside an element. `source` provides runs and snapshots. */
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
      limit: THEME.column.max_features,
      color: "module",
      heights: "lineage",
      signs: false,
      speed: 4,
      metric: null,
      scalars: null,
      aligned: null,
      xscale: "auto",
      follow: null,
      graphHeight: 480,
      dark: false,
    };
    this.steps = [];
    this.pictures = null;
    this.player = new Player(this);
    this.requestId = 0;
    this.loading = null;
    this.failed = false;
    this.controls = new Controls(this.state, {
      play: () => this.player.toggle(),
      step: (index) => this.show(this.steps[index], {fade: true}),
      set: (change) => this.set(change),
      run: (name, on) => this.choose(name, on),
      find: (text) => this.find(text),
      save: () => this.savePicture(),
    });
    this.featurePanel = new FeaturePanel(source, {close: () => this.follow(null), go: (id) => this.goTo(id)});
    this.timeline = new Timeline(this.state, {
      set: (change) => this.set(change),
      go: (step, nearest) => this.show(this.stepNear(step, nearest), {fade: true}),
      follow: (lineage) => this.follow(lineage),
    });
    this.tip = new Tooltip();
    const ofPanel = {
      follow: (lineage) => this.clicked(lineage),
      hover: () => this.pair(),
      titleOf: (name) => this.runList.titleOf(name),
    };
    this.runList = new RunList(source, (run) => new RunPanel(run, this.tip, ofPanel));
    this.manyRuns = new ManyRuns(source, {
      run: (name) => this.choose(name, true),
      follow: (members) => this.followMembers(members),
    });
    // What the user has chosen: other options may change with the runs shown.
    this.asked = new Set();
    this.message = h("div", {class: "lib-message", role: "alert", hidden: true});
    this.empty = h("div", {class: "lib-empty", hidden: true});
    this.grid = h("div", {class: "lib-panels"});
    this.content = h(
      "div",
      {class: "lib-content", hidden: true},
      this.controls.film,
      this.controls.options,
      h("div", {class: "lib-main"}, this.grid, this.featurePanel.element),
      markLegend(),
      this.timeline.element,
    );
    this.root = h(
      "main",
      {class: "lib-view", tabindex: -1, "data-ready": "false"},
      this.controls.header,
      this.message,
      this.empty,
      this.content,
      this.manyRuns.element,
      this.tip.element,
      this.timeline.events.tip,
    );
    this.endWatch = watchDark((dark) => this.setDark(dark));
    element.append(this.root);
    this.place = new Place((place) => this.goToPlace(place));
    this.linked = this.place.read();
    this.state.step = this.linked.step;
    this.runList.chosen = this.linked.runs;
    this.keys = (event) => this.player.onKey(event);
    document.addEventListener("keydown", this.keys);
    this.resized = new ResizeObserver(() => this.onResize());
    this.resized.observe(this.root);
    this.handle = {
      positionOf: (run, layer, id) => this.runList.panels.get(run)?.positionOf(layer, id) ?? null,
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
      if (!this.destroyed) this.timer = setTimeout(poll, POLL_MS);
    };
    if (!this.destroyed) this.timer = setTimeout(poll, POLL_MS);
  }

  destroy() {
    this.destroyed = true;
    clearTimeout(this.timer);
    this.player.play(false);
    document.removeEventListener("keydown", this.keys);
    this.resized.disconnect();
    this.endWatch();
    this.place.destroy();
    this.root.remove();
    delete this.element.libView;
  }

  /** Fetch what has changed. */
  async refresh() {
    try {
      const changed = await this.runList.refresh();
      if (this.destroyed) return;
      if (!this.failed) this.report(null);
      this.controls.showRuns(this.runList);
      this.showEmpty(this.runList.available.length === 0);
      if (changed) await this.dataChanged();
      else if (this.failed) await this.show(this.state.step);
      else if (!this.steps.length) this.root.dataset.ready = "true";
      await this.manyRuns.refresh(this.runList.available);
    } catch (error) {
      this.report(error, this.source.live);
    }
  }

  async dataChanged() {
    try {
      await this.#applyData();
    } catch (error) {
      this.failed = true;
      this.runList.invalidate();
      throw error;
    }
  }

  async #applyData() {
    this.requestId += 1;
    const atEnd = this.state.step === null || this.state.step === this.steps[this.steps.length - 1];
    this.steps = [...new Set(this.runList.shown.flatMap((panel) => panel.history.steps))].sort((a, b) => a - b);
    // If the last snapshot is shown, move to the new last one; otherwise keep the step.
    const step = atEnd ? this.steps[this.steps.length - 1] : this.stepNear(this.state.step);
    this.state.follow = resolveFollowed(this.state.follow, this.runList);
    this.grid.replaceChildren(...this.runList.shown.map((panel) => panel.element));
    this.grid.dataset.runs = this.runList.shown.length;
    this.root.dataset.runs = this.runList.shown.map((panel) => panel.name).join(" ");
    this.controls.showSuggestions(featureSuggestions(this.runList.shown));
    this.#findShared();
    this.content.hidden = this.steps.length === 0;
    this.pictures = null;
    if (this.steps.length) {
      this.drawTimeline();
      await this.show(step);
      const {linked} = this;
      this.linked = null;
      if (linked?.feature) this.find(linked.feature, linked.of);
      return;
    }
    this.failed = false;
    this.root.dataset.ready = "true";
  }

  /** Find out which features the runs shown share; if any are known, draw them so, unless the user has chosen. */
  #findShared() {
    const shared = new SharedFeatures(this.runList.shown);
    this.shared = shared.exist ? shared : null;
    for (const panel of this.runList.shown) panel.setShared(this.shared);
    for (const [option, usual] of [["color", "module"], ["heights", "lineage"]]) {
      if (this.shared && !this.asked.has(option)) this.state[option] = "shared";
      else if (!this.shared && this.state[option] === "shared") this.state[option] = usual;
    }
    this.controls.showShared(Boolean(this.shared), this.state);
  }

  /** Emphasize the counterparts of the feature under the mouse in the graphs beside; without one, of the followed one. */
  pair() {
    const panels = this.runList.shown;
    const owner = panels.find((panel) => panel.hovered);
    const of = owner ? {run: owner.name, l: owner.hovered.l, id: owner.hovered.id} : this.state.follow;
    for (const panel of panels) {
      const k = panel.history.at(this.state.step);
      const isBeside = of && this.shared && panel.name !== of.run && k >= 0;
      panel.setPaired(isBeside ? this.shared.counterparts(of, panel.name, k) : []);
      panel.focus();
    }
  }

  showEmpty(empty) {
    this.empty.hidden = !empty;
    this.controls.save.hidden = empty;
    if (!empty) return;
    this.content.hidden = true;
    this.root.dataset.ready = "true";
    this.empty.replaceChildren(...emptyState(this.source.live));
  }

  /** Show an error, or else the error of a run that cannot be shown, if there is one. */
  report(error, again = false) {
    const shown = error ?? this.runList.error;
    const more = (error ? again : this.source.live) ? " Retrying every five seconds." : "";
    this.message.hidden = !shown;
    this.message.textContent = shown ? `${String(shown.message ?? shown)}${more}` : "";
    if (error) this.root.dataset.ready = "true";
  }

  /** The newest step at or before this one, or with `nearest` the one closest to it. */
  stepNear(step, nearest = false) {
    if (nearest)
      return this.steps.reduce(
        (best, other) => (Math.abs(other - step) < Math.abs(best - step) ? other : best),
        this.steps[0],
      );
    return [...this.steps].reverse().find((other) => other <= step) ?? this.steps[0];
  }

  /** Show a step once its snapshots are loaded, unless another step is requested meanwhile. */
  async show(step, {fade = false} = {}) {
    if (step === undefined || step === null) return;
    const started = performance.now();
    const id = ++this.requestId;
    const backwards = this.state.step !== null && step < this.state.step;
    this.state.step = step;
    this.root.dataset.ready = "false";
    const index = this.steps.indexOf(step);
    const wanted = this.runList.shown.map((panel) => ({panel, k: panel.history.at(step)}));
    this.controls.showStep(index, this.steps.length, stepText(step, index, this.steps.length, wanted));
    let fetched = false;
    try {
      const found = wanted.map(({panel, k}) => (k < 0 ? null : panel.cache.peek(panel.history.steps[k])));
      if (wanted.some(({k}, i) => k >= 0 && !found[i])) {
        // While a request is pending, only the latest of the steps passed by a drag is requested.
        await this.loading?.catch(() => null);
        if (id !== this.requestId || this.destroyed) return;
        this.loading = Promise.all(
          wanted.map(({panel, k}) => (k < 0 ? null : panel.cache.get(panel.history.steps[k]))),
        );
        (await this.loading).forEach((snapshot, i) => {
          found[i] = snapshot;
        });
      }
      if (id !== this.requestId || this.destroyed) return;
      fetched = true;
      this.draw(
        wanted.map(({panel, k}, i) => ({panel, k, snapshot: found[i]})),
        fade && !this.skipsAnimation(),
      );
      this.handle.lastStepMs = performance.now() - started;
      this.failed = false;
      this.report(null);
      this.prefetch(wanted, backwards);
    } catch (error) {
      if (id !== this.requestId) return;
      this.failed = true;
      if (fetched) this.runList.invalidate();
      this.report(error, this.source.live);
    }
  }

  /** Whether to skip animations: they are unwanted, or too fast to be seen. */
  skipsAnimation() {
    return matchMedia("(prefers-reduced-motion: reduce)").matches || (this.player.playing && this.state.speed > 6);
  }

  draw(pictures, fade) {
    const started = performance.now();
    this.pictures = pictures;
    const {state} = this;
    state.graphHeight = this.graphHeight(pictures);
    for (const {panel, k, snapshot} of pictures) {
      panel.setFollowed(followedIn(state.follow, panel.name));
      if (snapshot) panel.draw(k, snapshot, state, fade);
      else panel.clear(`${panel.title} has no snapshot at or before step ${integer(state.step)}.`);
    }
    this.pair();
    this.controls.showThreshold(state.threshold);
    this.timeline.moveTo(state.step);
    this.describeFollowed();
    this.showFeature();
    const sum = (value) => pictures.reduce((total, {panel}) => total + (panel.scene ? value(panel.scene) : 0), 0);
    Object.assign(this.root.dataset, {
      step: state.step,
      color: state.color,
      edgesDrawn: sum((scene) => scene.edgesDrawn),
      featuresDrawn: sum((scene) => scene.featuresDrawn),
      ready: "true",
    });
    this.writePlace();
    this.handle.lastDrawMs = performance.now() - started;
  }

  setDark(dark) {
    this.root.classList.toggle("lib-dark", dark);
    themeColors(this.root, dark);
    this.state.dark = dark;
    this.redraw();
  }

  /** Height in which the numbers of all features can be read, if most of the window is enough for that. */
  graphHeight(pictures) {
    const least = Math.min(640, Math.max(400, 0.5 * window.innerHeight));
    const most = Math.max(least, 0.7 * window.innerHeight);
    const needed = Math.max(0, ...pictures.map(({panel, k, snapshot}) => (snapshot ? panel.heightOfNumbers(k, this.state) : 0)));
    return Math.round(Math.min(most, Math.max(least, needed)));
  }

  /** Show what the address says, after it has been changed by hand or by a link. */
  async goToPlace({step, feature, of, runs}) {
    if (runs && String(runs) !== String(this.runList.chosen)) {
      this.runList.chosen = runs;
      await this.refresh();
    }
    if (!this.steps.length) return;
    await this.show(step === null ? this.steps[this.steps.length - 1] : this.stepNear(step));
    const {following} = this.root.dataset;
    if (!feature && following) this.follow(null);
    else if (feature && feature !== following) this.find(feature, of);
  }

  /** Write step, feature and runs into the address. Without a step, it leads to the last snapshot, also a later one. */
  writePlace() {
    if (this.player.playing || this.linked) return;
    const {step, follow} = this.state;
    const isLast = step === this.steps[this.steps.length - 1];
    const runs = this.runList.available.length > 1 ? this.runList.shown.map(({name}) => name) : null;
    const of = follow && this.runList.shown.length > 1 ? follow.run : null;
    this.place.write({step: isLast ? null : step, feature: this.root.dataset.following || null, of, runs});
  }

  savePicture() {
    const panels = this.runList.shown;
    if (!panels.some((panel) => panel.scene)) return;
    const {step, dark} = this.state;
    const names = panels.map(({title}) => title).join("-");
    savePng(pictureOf(panels, {dark, step: `step ${integer(step)}`}), `${names}-step-${step}`);
  }

  redraw() {
    if (this.pictures && this.root.dataset.ready === "true") this.draw(this.pictures, false);
  }

  prefetch(wanted, backwards) {
    // After the picture is on the screen.
    setTimeout(() => {
      for (const {panel, k} of wanted) {
        const next = Array.from({length: PREFETCHED}, (_, n) => (backwards ? k - 1 - n : k + 1 + n));
        const steps = [...next, backwards ? k + 1 : k - 1].map((near) => panel.history.steps[near]);
        panel.cache.prefetch(steps.filter((step) => step !== undefined));
      }
    }, 30);
  }

  set(change) {
    Object.assign(this.state, change);
    for (const option of Object.keys(change)) this.asked.add(option);
    if (["metric", "scalars", "aligned", "xscale"].some((name) => name in change)) this.drawTimeline();
    else if (!("speed" in change)) this.redraw();
  }

  choose(name, on) {
    this.runList.choose(name, on);
    return this.refresh();
  }

  /** Handle a click: follow the lineage of a dot; stop following on a second click, or on a click beside dots. */
  clicked(lineage) {
    const now = this.state.follow;
    const same = now && lineage && now.run === lineage.run && now.l === lineage.l && now.id === lineage.id;
    this.follow(same ? null : lineage);
  }

  /** Follow a lineage `{run, l, id}` over training, with its page beside the graph, or none. */
  follow(lineage) {
    const layer = lineage && this.runList.panels.get(lineage.run).history.layers[lineage.l].name;
    const wasOpen = this.featurePanel.isOpen;
    if (lineage && !wasOpen) this.opener = document.activeElement;
    this.state.follow = lineage && {...lineage, layer};
    const hadFocus = this.featurePanel.element.contains(document.activeElement);
    this.showFeature();
    if (!lineage && hadFocus) this.opener?.focus();
    if (this.featurePanel.isOpen !== wasOpen) this.redraw(); // the graph has another width
    for (const panel of this.runList.shown) panel.setFollowed(followedIn(this.state.follow, panel.name));
    this.pair();
    this.drawTimeline();
    this.describeFollowed();
    this.writePlace();
  }

  /** Follow a feature that several runs have, by run; if no such run is shown, show the first one. */
  async followMembers(members) {
    if (!this.runList.shown.some((panel) => members[panel.name])) {
      const first = this.runList.available.find((run) => members[run.name]);
      if (!first) return;
      await this.choose(first.name, true);
    }
    const panels = this.runList.shown.filter((panel) => members[panel.name]);
    const found = panels.map((panel) => findFeature([panel], members[panel.name])).filter(Boolean);
    if (!found.length) {
      this.report(new Error("The runs shown no longer have this feature."));
      return;
    }
    this.follow({...found[0], others: found.slice(1)});
    this.content.scrollIntoView({block: "start"});
  }

  /** Open, update or close the page of the followed feature. */
  showFeature() {
    const {follow} = this.state;
    const panel = follow && this.runList.panels.get(follow.run);
    this.content.classList.toggle("lib-with-feature", Boolean(panel));
    if (!panel) {
      this.featurePanel.close();
      return;
    }
    const {history, version} = panel;
    this.featurePanel.show({...follow, version, history}, Math.max(0, history.at(this.state.step)));
  }

  /** Go to another feature from the page of one. */
  goTo(id) {
    this.find(id, this.state.follow?.run ?? null);
    this.featurePanel.focus();
  }

  describeFollowed() {
    const {follow} = this.state;
    this.root.dataset.following = follow
      ? `${this.runList.panels.get(follow.run).history.layers[follow.l].name}/${follow.id}`
      : "";
    const picture = follow && this.pictures?.find(({panel, snapshot}) => panel.name === follow.run && snapshot);
    if (!picture) return;
    const drawn = Boolean(dotOfLineage(picture.panel.scene, follow.l, follow.id));
    this.timeline.describeFollowed(picture.panel.history, picture.k, picture.snapshot, drawn);
  }

  drawTimeline() {
    this.timeline.draw(
      this.runList.shown.map(({name, title, history}) => ({name, title, history, color: this.runList.colors.get(name)})),
    );
    if (this.pictures) this.describeFollowed();
  }

  /** Follow the feature with a name or label, in one run or in the first that has it. */
  find(text, run = null) {
    const panels = this.runList.shown;
    const found = findFeature(run === null ? panels : panels.filter((panel) => panel.name === run), text);
    if (found) {
      const byKeyboard = this.controls.search.element.contains(document.activeElement);
      this.follow(found);
      if (byKeyboard) this.featurePanel.focus();
      if (!this.failed) this.report(null);
    } else this.report(new Error(`No feature shown has the name or label “${text}”.`));
  }

  onResize() {
    const width = this.root.clientWidth;
    if (width === this.width) return;
    this.width = width;
    this.manyRuns.draw();
    if (!this.steps.length) return;
    this.redraw();
    this.drawTimeline();
  }
}
