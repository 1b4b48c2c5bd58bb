// Plays the film, and answers the keys: arrows, Home, End, space, Escape.

/** Moves a view through its steps. */
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

  /** Play from here to the end, or from the beginning where this is the end; or stop. */
  play(on) {
    clearTimeout(this.timer);
    this.timer = null;
    this.view.controls.showPlaying(on);
    if (!on) return;
    const at = this.at();
    const start = at >= this.view.steps.length - 1 ? 0 : at + 1;
    this.timer = setTimeout(() => this.#forward(start), 0);
  }

  at() {
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
    // From where the view is now: the slider may have been moved meanwhile.
    this.timer = setTimeout(() => this.#forward(this.at() + 1), Math.max(0, due - performance.now()));
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
    const far = event.shiftKey ? 10 : 1;
    const last = view.steps.length - 1;
    const to = {ArrowLeft: this.at() - far, ArrowRight: this.at() + far, Home: 0, End: last}[event.key];
    // Sliders other than that of the steps keep their own arrows, buttons and boxes their space.
    if (to !== undefined && !within("input[type=range]:not([data-role=step])")) {
      event.preventDefault();
      view.show(view.steps[Math.min(last, Math.max(0, to))], {fade: true});
    } else if (event.key === " " && !within("button, input[type=checkbox]")) {
      event.preventDefault();
      this.toggle();
    }
  }
}
