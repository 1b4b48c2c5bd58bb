// Playback and keyboard control: arrows, Home, End, space, Escape.

/** Plays the steps of a view. */
export class Player {
  constructor(view) {
    this.view = view;
    this.timer = null;
  }

  get playing() {
    return this.timer !== null;
  }

  toggle() {
    this.play(!this.playing);
  }

  /** Play from the current step to the end (from the beginning if at the end), or stop. */
  play(on) {
    clearTimeout(this.timer);
    this.timer = null;
    this.view.controls.showPlaying(on);
    if (!on) {
      this.view.writePlace();
      return;
    }
    const current = this.index();
    const start = current >= this.view.steps.length - 1 ? 0 : current + 1;
    this.timer = setTimeout(() => this.#forward(start), 0);
  }

  index() {
    return this.view.steps.indexOf(this.view.state.step);
  }

  async #forward(index) {
    const {view} = this;
    const due = performance.now() + 1000 / view.state.speed;
    await view.show(view.steps[index], {fade: true});
    if (!this.playing) return;
    if (index >= view.steps.length - 1) {
      this.play(false);
      return;
    }
    // Continue from the current step: the slider may have been moved.
    this.timer = setTimeout(() => this.#forward(this.index() + 1), Math.max(0, due - performance.now()));
  }

  onKey(event) {
    const {view} = this;
    const within = (selector) => Boolean(event.target.closest?.(selector));
    if (event.key === "Escape" && view.state.follow) {
      view.follow(null);
      return;
    }
    const typing = within("input:not([type=range]):not([type=checkbox]), select, textarea");
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !view.steps.length) return;
    const distance = event.shiftKey ? 10 : 1;
    const last = view.steps.length - 1;
    const to = {ArrowLeft: this.index() - distance, ArrowRight: this.index() + distance, Home: 0, End: last}[event.key];
    // Other sliders handle arrow keys themselves, and buttons and checkboxes the space bar.
    if (to !== undefined && !within("input[type=range]:not([data-role=step])")) {
      event.preventDefault();
      view.show(view.steps[Math.min(last, Math.max(0, to))], {fade: true});
    } else if (event.key === " " && !within("button, input[type=checkbox]")) {
      event.preventDefault();
      this.toggle();
    }
  }
}
