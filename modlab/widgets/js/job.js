// What Python is doing for this widget: a line of text, a bar, a button that stops it, and errors, which nobody sees
// otherwise. `ask` sends a request; the latest one wins.

class Job {
  constructor(scene, parent) {
    this.scene = scene;
    this.patience = 0;
    this.sent = 0;
    this.home = el(parent, "div");
    this.box = el(this.home, "div", "modlab-job");
    this.box.setAttribute("role", "status");
    this.text = el(this.box, "span", "mod-job-text");
    this.bar = el(this.box, "progress", "mod-job-bar");
    this.bar.setAttribute("aria-label", "progress");
    this.stop = button(this.box, "Stop", "stop this computation", () => this.send({ type: "cancel" }));
    this.error = el(this.home, "div", "modlab-error");
    this.error.setAttribute("role", "alert");
    scene.listen("change:job", () => this.answered());
    this.answered();
  }

  destroy() { clearTimeout(this.patience); }

  get state() { return this.scene.model.get("job") || {}; }
  get waiting() { return this.sent > (this.state.id || 0); }
  get running() { return !this.gone && (this.waiting || this.state.state === "running"); }

  send(content) {
    try {
      this.scene.model.save_changes(); // so that Python knows the traits and does not send older ones back
      this.scene.model.send(content);
      this.gone = false;
    } catch { // the kernel was shut down
      this.gone = true;
    }
    this.scene.update();
    return !this.gone;
  }

  // `place`: an element in which progress and errors of this request show, near what was pressed.
  ask(content, place = this.home) {
    if (!this.scene.model.get("can_run")) return false;
    if (this.box.parentNode !== place) place.append(this.box, this.error);
    this.sent = Math.max(this.sent, this.state.id || 0) + 1;
    this.late = false;
    clearTimeout(this.patience);
    this.patience = setTimeout(() => { this.late = true; this.scene.update(); }, 4000);
    return this.send({ ...content, id: this.sent });
  }

  answered() {
    if (!this.waiting) { clearTimeout(this.patience); this.late = false; }
    this.scene.update();
  }

  draw() {
    const { state } = this, { running } = this;
    this.box.hidden = !running && !this.gone && state.state !== "cancelled";
    this.error.hidden = !state.error || this.waiting;
    this.error.textContent = state.error || "";
    this.box.dataset.state = this.gone ? "gone" : running ? "running" : state.state;
    this.stop.hidden = this.bar.hidden = !running;
    if (!running) {
      this.text.textContent = this.gone ? "No kernel answers: run the cell again." : "Stopped. What shows is the state before.";
      return;
    }
    this.text.textContent = this.late && this.waiting ? "Asked the kernel, no answer yet. It may be busy, or not running."
      : state.text || "Waiting for the model";
    if (state.fraction > 0 && !this.waiting) this.bar.value = state.fraction;
    else this.bar.removeAttribute("value");
  }
}
