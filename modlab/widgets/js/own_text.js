// Another text for the widget: pasted, typed, or opened from a file of the reader's machine. The kernel runs it.

const MOST_CHARACTERS = 1000000; // far more than any view draws; a message of 10 MB ends Jupyter's connection

class OwnText {
  constructor(store, parent) {
    this.store = store;
    const title = parent.querySelector(".mod-title"), can = store.model.get("can_run");
    this.opener = button(title, "Use your own text", "Use your own text", () => this.toggle(this.box.hidden));
    this.opener.classList.add("mod-main", "modlab-own-text");
    this.note = el(parent, "p", "modlab-text-note");
    this.note.setAttribute("role", "status");
    this.box = el(parent, "section", "modlab-own-box");
    this.box.hidden = true;
    if (!can) {
      this.opener.disabled = true;
      el(title, "span", "mod-note", "Your own text needs a notebook with the model.");
      return;
    }
    const label = el(this.box, "label", "mod-prompt", "Paste or type a text here, or open a file");
    this.area = el(label, "textarea", "modlab-own-area");
    Object.assign(this.area, { rows: 8, spellcheck: false });
    ownKeys(this.area);
    this.area.addEventListener("keydown", (event) => this.key(event));
    const bar = el(this.box, "div", "mod-own-bar");
    this.run = button(bar, "Run this text", "Run this text", () => this.ask());
    this.run.classList.add("mod-main", "modlab-run-text");
    button(bar, "Open a file …", "Open a file …", () => this.file.click());
    this.file = el(bar, "input", "modlab-own-file");
    this.file.type = "file";
    this.file.hidden = true;
    this.file.addEventListener("change", () => this.read(this.file.files[0]));
    button(bar, "Close", "Close", () => this.toggle(false));
    this.hint = el(bar, "span", "mod-note");
    this.hint.setAttribute("role", "status");
    store.listen("change:text_note", () => store.update());
  }

  toggle(open) {
    this.box.hidden = !open;
    this.opener.setAttribute("aria-expanded", String(open));
    if (!open) return this.opener.focus();
    this.say("");
    this.area.value = this.store.tokens.join("");
    this.area.focus();
    this.area.select(); // so that pasting replaces it
    this.area.scrollTop = 0;
  }

  say(problem) {
    this.hint.textContent = problem || "Ctrl+Enter or ⌘+Enter runs it, Escape closes this.";
    this.hint.dataset.problem = String(Boolean(problem));
  }

  key(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.ask();
    else if (event.key === "Escape") this.toggle(false);
    else return event.stopPropagation(); // no shortcut of the page's
    event.preventDefault();
    event.stopPropagation();
  }

  async read(file) {
    this.file.value = ""; // the same file can be chosen again
    if (!file) return;
    if (file.size > 4 * MOST_CHARACTERS) return this.say(`${file.name} is too large: ${byteText(file.size)}.`);
    const text = await file.text();
    if (text.includes("\0")) return this.say(`${file.name} is not a text file.`);
    this.area.value = text;
    this.ask();
  }

  ask() {
    const text = this.area.value;
    if (!text) return this.say("There is no text yet: paste one, or open a file.");
    if (text.length > MOST_CHARACTERS)
      return this.say(`The text has ${text.length.toLocaleString("en")} characters; `
        + `at most ${MOST_CHARACTERS.toLocaleString("en")} can be sent. Paste a part of it.`);
    this.say("");
    this.before = this.store.tokens;
    this.asked = this.store.job.ask({ type: "text", text }) && this.store.job.sent;
  }

  draw() {
    const { store } = this, { state } = store.job;
    this.note.textContent = store.model.get("text_note") || "";
    this.note.hidden = !this.note.textContent;
    if (!this.asked) return;
    const done = state.id >= this.asked && state.state === "idle", failed = state.id >= this.asked && state.state === "failed";
    if (done || failed || store.tokens !== this.before) {
      this.asked = 0;
      if (!failed) this.toggle(false); // what was asked for is on the page: make room for it
    }
  }
}
