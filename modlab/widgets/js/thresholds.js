// One threshold for all layers and one for each: dragging previews in the page, releasing measures.
// uses: heatmap job own_text figures budget

class ThresholdSliders {
  constructor(store, parent) {
    this.store = store;
    this.timer = 0;
    this.how = el(parent, "p", "mod-note modlab-how");
    this.job = store.job = new Job(store, parent);
    const all = el(parent, "section", "mod-controls");
    const label = el(all, "label", "mod-slider", "all layers");
    this.all = this.slider(label, "modlab-threshold", "threshold of all layers", (p) => this.set(store.layers.map(() => p)));
    this.value = el(label, "output", "modlab-p");
    this.badge = el(all, "span", "modlab-badge");
    this.badge.setAttribute("role", "status");
    this.rows = el(parent, "section", "mod-layer-sliders");
    this.each = store.rowsOf.map((rows, layer) => ({ rows, layer })).filter(({ rows }) => rows.length).map(({ rows, layer }) => {
      const line = el(this.rows, "label", "mod-layer-slider");
      el(line, "span", "mod-layer-name", `layer ${layer}`);
      const bins = el(line, "canvas", "mod-layer-bins");
      bins.setAttribute("aria-hidden", "true");
      const set = (p) => this.set(this.ps.map((old, i) => (rows.includes(i) ? p : old)));
      const slider = this.slider(line, "modlab-layer-threshold", `threshold of layer ${layer}`, set);
      return { slider, bins, rows, layer, value: el(line, "output", "mod-layer-p"), kept: el(line, "span", "mod-layer-kept") };
    });
    this.figures = new Figures(store, parent);
  }

  destroy() { clearTimeout(this.timer); this.job.destroy(); }

  get ps() { return this.store.model.get("layer_thresholds"); }

  slider(parent, cls, name, act) {
    const made = el(parent, "input", cls);
    Object.assign(made, { type: "range", min: 0.01, max: 0.99, step: 0.005 });
    made.setAttribute("aria-label", name);
    ownKeys(made);
    made.addEventListener("input", () => act(Number(made.value)));
    made.addEventListener("change", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.job.ask({ type: "run", ps: this.ps }), 250);
    });
    return made;
  }

  set(ps) { this.store.model.set("layer_thresholds", ps); }

  draw() {
    const { store } = this, { ps } = this, { running } = this.job, { preview } = store;
    const mean = ps.reduce((a, b) => a + b, 0) / ps.length, one = ps.every((p) => p === ps[0]);
    if (document.activeElement !== this.all || !one) this.all.value = mean;
    this.value.textContent = one ? number(ps[0]) : "per layer";
    const state = running ? "running" : preview ? "preview" : "measured";
    this.badge.dataset.state = state;
    this.badge.textContent = { running: "working …", preview: "preview", measured: "measured" }[state];
    const how = store.model.get("can_run") ? "Release the slider for one." : "That needs a notebook with the model.";
    this.how.textContent = preview ? `Preview from the gates of the last run; in a real run the gates of later layers change too. ${how}`
      : "Measured: the model ran this text with these thresholds.";
    this.how.hidden = running;
    for (const { slider, value, kept, bins, rows, layer } of this.each) {
      const p = ps[rows[0]], share = percent(store.layerRatio(layer));
      if (document.activeElement !== slider || Math.abs(Number(slider.value) - p) > 0.0026) slider.value = p;
      value.textContent = number(p);
      kept.textContent = `keeps ${share}`;
      slider.setAttribute("aria-valuetext", `${number(p)}, keeps ${share}`);
      this.drawBins(bins, rows, p);
    }
    this.job.draw();
    this.figures.draw();
  }

  // The layer's gates (its rows lie next to each other) over 0..1, under its slider: full from p on.
  drawBins(canvas, rows, p) {
    const { store } = this, { T, theme } = store, width = canvas.clientWidth || 200, height = 22, count = 50;
    if (this.loaded !== store.cells) { this.loaded = store.cells; this.counts = []; }
    const counts = this.counts[rows[0]] ||= countLevels(store, rows[0] * T, rows.length * T, count), most = Math.max(...counts, 1);
    const key = [p, width, theme.key, store.decided].join();
    if (canvas.drawnFor === key) return;
    canvas.drawnFor = key;
    const g = sharp(canvas, width, height), each = width / count;
    for (let i = 0; i < count; i++) {
      const tall = counts[i] ? Math.max(2, Math.sqrt(counts[i] / most) * height) : 0;
      g.fillStyle = (i + 0.5) / count >= p ? theme.accent : theme.line;
      g.fillRect(i * each, height - tall, each - 0.5, tall);
    }
  }
}

function countLevels({ cells, levels }, start, length, count) {
  const counts = new Array(count).fill(0);
  for (let i = start; i < start + length; i++) counts[Math.min(count - 1, Math.floor(levels.value(cells[i] & LEVEL) * count))] += 1;
  return counts;
}

VIEWS.thresholds = { scene: Store, title: "Thresholds", about, parts: () => [OwnText, ThresholdSliders, Budget, Heatmap] };
