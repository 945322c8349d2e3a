// The explorer's slider and figures: dragging previews in the page, releasing asks for a real run.
// uses: job figures beyond

class Controls {
  constructor(store, parent) {
    this.store = store;
    this.timer = 0;
    const bar = el(parent, "section", "mod-controls");
    const label = el(bar, "label", "mod-slider");
    this.name = el(label, "span");
    this.slider = el(label, "input", "modlab-threshold");
    this.slider.type = "range";
    ownKeys(this.slider);
    this.value = el(label, "output", "modlab-p");
    this.badge = el(bar, "span", "modlab-badge");
    this.badge.setAttribute("role", "status");
    this.how = el(parent, "p", "mod-note modlab-how");
    this.beyond = new Beyond(store, parent);
    this.job = store.job = new Job(store, parent);
    this.figures = new Figures(store, parent);
    this.slider.addEventListener("input", () => store.model.set("threshold", this.chosen(Number(this.slider.value))));
    // "change" comes on release of the mouse, but after every press of an arrow key: wait for the last one.
    this.slider.addEventListener("change", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.job.ask({ type: "run", p: store.threshold }), 250);
    });
  }

  destroy() { clearTimeout(this.timer); this.job.destroy(); }

  // The threshold itself, or, where that says little, one token in how many is kept: 1 to 16, in equal steps of factors.
  scale() {
    const { byRatio } = this.store;
    if (byRatio === this.byRatio) return;
    this.byRatio = byRatio;
    Object.assign(this.slider, byRatio ? { min: 0, max: 4, step: 0.02 } : { min: LEAST_P, max: 1 - LEAST_P, step: 0.005 });
    this.name.textContent = byRatio ? "kept: one in" : "threshold p";
    this.slider.setAttribute("aria-label", byRatio ? "kept: one token in so many" : "threshold p");
  }

  chosen(value) { return this.byRatio ? this.store.levels.all.reachedBy(2 ** -value) : value; }

  draw() {
    this.scale();
    const { store } = this, { summary } = store, p = store.threshold, preview = store.preview, { running } = this.job;
    const share = store.levels.all.of(p), at = this.byRatio ? clamp(-Math.log2(share || 1e-9), 0, 4) : p;
    if (document.activeElement !== this.slider || Math.abs(Number(this.slider.value) - at) > (this.byRatio ? 0.1 : 0.0026)) this.slider.value = at;
    const says = this.byRatio ? (share ? (1 / share).toFixed(1) : "none") : chance(p);
    this.value.textContent = !preview && summary.varies ? "per layer" : says;
    this.slider.setAttribute("aria-valuetext", says);
    const state = running ? "running" : preview ? "preview" : "measured";
    this.badge.dataset.state = state;
    this.badge.textContent = { running: "running the model …", preview: "preview", measured: "measured" }[state];
    this.how.textContent = this.explain(preview);
    this.beyond.draw([p]);
    this.how.hidden = running || this.beyond.shows; // what is being done shows in its place, so that nothing below moves
    this.job.draw();
    this.figures.draw();
  }

  explain(preview) {
    const { store } = this, can = store.model.get("can_run"), at = chance(store.summary.p);
    if (preview && this.job.gone) return "No kernel answers, so this stays a preview. Run the cell again for a live one.";
    if (preview)
      return `Preview from the gates recorded at p ${at}; in a real run the gates of later layers change too. ` +
        (can ? "Release the slider for one." : "That needs a notebook with the model.");
    const share = store.levels.all.of(store.summary.p), ratio = this.byRatio && share ? `one token in ${(1 / share).toFixed(1)} kept, ` : "";
    const how = store.summary.varies ? "the thresholds of its layers." : `${ratio}p ${at}.`;
    const measured = `Measured: the model ran this text with ${how}`;
    return measured + (can ? " Drag the slider for another one." : "");
  }
}
