// The user's note on a feature: written to the run's folder by the tab on the same machine, kept by the browser for a film.

import {h} from "./dom.js";

const MAX_CHARACTERS = 10000;

/** A text field with a note. `source.saveNote(run, id, text)` keeps it, and returns the text kept. */
export class NoteField {
  constructor(source) {
    this.source = source;
    this.kept = new Map();
    this.drafts = new Map();
    this.text = h("textarea", {
      class: "lib-note-text",
      rows: 2,
      maxlength: MAX_CHARACTERS,
      "data-role": "note",
      "aria-label": "your note on this feature",
      placeholder: "your note on this feature",
      oninput: () => this.#typed(),
      onkeydown: (event) => this.#key(event),
    });
    this.save = h("button", {type: "button", class: "lib-small", "data-role": "save-note", onclick: () => this.#save()}, "save note");
    this.download = h(
      "button",
      {type: "button", class: "lib-small", "data-role": "download-notes", title: "put it into the folder of the run", onclick: () => this.#download()},
      "download notes.json",
    );
    this.state = h("span", {class: "lib-none", role: "status"});
    this.readOnly = h("p", {class: "lib-note-read", "data-role": "note-read", hidden: true});
    this.form = h("div", {class: "lib-note-form"}, this.text, h("div", {class: "lib-note-buttons"}, this.save, this.download, this.state));
    this.element = h("div", {class: "lib-feature-note"}, this.form, this.readOnly);
  }

  /** Show the note of a feature: `page.note`, which can be changed if `page.editable`. */
  show(run, id, page) {
    const key = `${run}\n${id}`;
    const note = this.kept.get(key) ?? page.note ?? "";
    this.form.hidden = !page.editable;
    this.readOnly.hidden = page.editable || !note;
    this.readOnly.textContent = note;
    this.download.hidden = !this.source.notesFile;
    if (key === this.key) return;
    this.key = key;
    [this.run, this.id, this.note] = [run, id, note];
    this.text.value = this.drafts.get(key) ?? note;
    this.state.textContent = "";
    this.#typed();
  }

  #typed() {
    const changed = this.text.value.trim() !== this.note.trim();
    if (changed) this.drafts.set(this.key, this.text.value);
    else this.drafts.delete(this.key);
    this.save.disabled = !changed;
    if (changed) this.state.textContent = "not saved yet";
  }

  #key(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.#save();
    // Only the second Escape closes the panel: the first one leaves the text.
    if (event.key === "Escape") {
      event.stopPropagation();
      this.element.closest("[tabindex]")?.focus();
    }
  }

  async #save() {
    const {key, run, id} = this;
    const text = this.text.value.trim();
    this.save.disabled = true;
    try {
      const {note, where} = await this.source.saveNote(run, id, text);
      this.kept.set(key, note);
      this.drafts.delete(key);
      if (key !== this.key) return;
      this.note = note;
      this.#typed();
      this.state.textContent = where;
    } catch (error) {
      if (key !== this.key) return;
      this.save.disabled = false;
      this.state.textContent = `The note could not be saved. ${error.message ?? error}`;
    }
  }

  async #download() {
    const notes = await this.source.notesFile(this.run);
    const address = URL.createObjectURL(new Blob([`${JSON.stringify(notes, null, 1)}\n`], {type: "application/json"}));
    h("a", {href: address, download: "notes.json"}).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  }
}
