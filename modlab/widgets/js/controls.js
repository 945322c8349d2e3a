// The explorer's slider and figures: dragging previews in the page, releasing asks for a real run.
// uses: job figures

class Controls {
  constructor(store, parent) {
    this.store = store;
    this.timer = 0;
    const bar = el(parent, "section", "mod-controls");
    const label = el(bar, "label", "mod-slider", "threshold p");
    this.slider = el(label, "input", "modlab-threshold");
    Object.assign(this.slider, { type: "range", min: 0.01, max: 0.99, step: 0.005 });
    this.slider.setAttribute("aria-label", "threshold p");
    ownKeys(this.slider);
    this.value = el(label, "output", "modlab-p");
    this.badge = el(bar, "span", "modlab-badge");
    this.badge.setAttribute("role", "status");
    this.how = el(parent, "p", "mod-note modlab-how");
    this.job = store.job = new Job(store, parent);
    this.figures = new Figures(store, parent);
    this.slider.addEventListener("input", () => store.model.set("threshold", Number(this.slider.value)));
    // "change" comes on release of the mouse, but after every press of an arrow key: wait for the last one.
    this.slider.addEventListener("change", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.job.ask({ type: "run", p: store.threshold }), 250);
    });
  }

  destroy() { clearTimeout(this.timer); this.job.destroy(); }

  draw() {
    const { store } = this, { summary } = store, p = store.threshold, preview = store.preview, { running } = this.job;
    if (document.activeElement !== this.slider || Math.abs(Number(this.slider.value) - p) > 0.0026) this.slider.value = p;
    this.value.textContent = !preview && summary.varies ? "per layer" : number(p);
    const state = running ? "running" : preview ? "preview" : "measured";
    this.badge.dataset.state = state;
    this.badge.textContent = { running: "running the model …", preview: "preview", measured: "measured" }[state];
    this.how.textContent = this.explain(preview);
    this.how.hidden = running; // what is being done shows in its place, so that nothing below moves
    this.job.draw();
    this.figures.draw();
  }

  explain(preview) {
    const { store } = this, can = store.model.get("can_run"), at = number(store.summary.p);
    if (preview && this.job.gone) return "No kernel answers, so this stays a preview. Run the cell again for a live one.";
    if (preview)
      return `Preview from the gates recorded at p ${at}; in a real run the gates of later layers change too. ` +
        (can ? "Release the slider for one." : "That needs a notebook with the model.");
    const measured = "Measured: the model ran this text with " + (store.summary.varies ? "the thresholds of its layers." : `p ${at}.`);
    return measured + (can ? " Drag the slider for another one." : "");
  }
}
