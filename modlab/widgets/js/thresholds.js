// One threshold for all layers and one for each: dragging previews in the page, releasing measures.
// uses: heatmap job own_text figures budget beyond

// Where gates lie close to 0 or 1 a slider goes by share: one token in 1 to 2^MOST_HALVINGS is kept.
const MOST_HALVINGS = 7;

class ThresholdSliders {
  constructor(store, parent) {
    this.store = store;
    this.timer = 0;
    this.how = el(parent, "p", "mod-note modlab-how");
    this.beyond = new Beyond(store, parent);
    this.job = store.job = new Job(store, parent);
    const bar = el(parent, "section", "mod-controls");
    const label = el(bar, "label", "mod-slider", "all layers");
    this.all = this.slider(label, "modlab-threshold", "threshold of all layers", () => store.levels.all, (p) => this.set(store.layers.map(() => p)));
    this.value = el(label, "output", "modlab-p");
    this.badge = el(bar, "span", "modlab-badge");
    this.badge.setAttribute("role", "status");
    this.rows = el(parent, "section", "mod-layer-sliders");
    this.each = store.rowsOf.map((rows, layer) => ({ rows, layer })).filter(({ rows }) => rows.length).map(({ rows, layer }) => {
      const line = el(this.rows, "label", "mod-layer-slider");
      el(line, "span", "mod-layer-name", `layer ${layer}`);
      const bins = el(line, "canvas", "mod-layer-bins");
      bins.setAttribute("aria-hidden", "true");
      const set = (p) => this.set(this.ps.map((old, i) => (rows.includes(i) ? p : old)));
      const slider = this.slider(line, "modlab-layer-threshold", `threshold of layer ${layer}`, () => this.gatesOf(rows).shares, set);
      return { slider, bins, rows, layer, value: el(line, "output", "mod-layer-p"), kept: el(line, "span", "mod-layer-kept") };
    });
    this.figures = new Figures(store, parent);
  }

  destroy() { clearTimeout(this.timer); this.job.destroy(); }

  get ps() { return this.store.model.get("layer_thresholds"); }

  // shares: of the gates that the slider is for.
  slider(parent, cls, name, shares, act) {
    const made = el(parent, "input", cls);
    made.type = "range";
    made.setAttribute("aria-label", name);
    ownKeys(made);
    made.addEventListener("input", () => act(this.byRatio ? shares().reachedBy(2 ** -Number(made.value)) : Number(made.value)));
    made.addEventListener("change", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.job.ask({ type: "run", ps: this.ps }), 250);
    });
    return made;
  }

  scale() {
    const { byRatio } = this.store;
    if (byRatio === this.byRatio) return;
    this.byRatio = byRatio;
    const range = byRatio ? { min: 0, max: MOST_HALVINGS, step: 0.02 } : { min: LEAST_P, max: 1 - LEAST_P, step: 0.005 };
    for (const slider of [this.all, ...this.each.map((one) => one.slider)]) Object.assign(slider, range);
  }

  // Where a slider stands: at p, or at the factor by which fewer tokens are kept.
  place(slider, p, share) {
    const at = this.byRatio ? clamp(-Math.log2(share || 1e-9), 0, MOST_HALVINGS) : p;
    if (document.activeElement !== slider || Math.abs(Number(slider.value) - at) > (this.byRatio ? 0.1 : 0.0026)) slider.value = at;
  }

  // What the bins and the slider of a layer need of its gates, whose rows lie next to each other.
  gatesOf(rows) {
    const { store } = this, { T, levels } = store;
    if (this.loaded !== store.cells) { this.loaded = store.cells; this.gates = []; }
    const cells = () => store.cells.subarray(rows[0] * T, (rows[0] + rows.length) * T);
    return this.gates[rows[0]] ||= { shares: levels.sharesOf(cells()), bins: binned(levels, cells()) };
  }

  set(ps) { this.store.model.set("layer_thresholds", ps); }

  draw() {
    const { store } = this, { ps } = this, { running } = this.job, { preview } = store;
    const mean = ps.reduce((a, b) => a + b, 0) / ps.length, one = ps.every((p) => p === ps[0]), { byRatio } = store;
    this.scale();
    this.place(this.all, mean, one ? store.levels.all.of(ps[0]) : store.keepRatio);
    this.value.textContent = one ? chance(ps[0]) : "per layer";
    this.all.setAttribute("aria-valuetext", `${this.value.textContent}, keeps ${percent(store.keepRatio)}`);
    const state = running ? "running" : preview ? "preview" : "measured";
    this.badge.dataset.state = state;
    this.badge.textContent = { running: "working …", preview: "preview", measured: "measured" }[state];
    const how = store.model.get("can_run") ? "Release the slider for one." : "That needs a notebook with the model.";
    this.how.textContent = preview ? `Preview from the gates of the last run; in a real run the gates of later layers change too. ${how}`
      : "Measured: the model ran this text with these thresholds.";
    if (byRatio) this.how.textContent += ` A slider goes from every token to one in ${2 ** MOST_HALVINGS} kept.`;
    this.beyond.draw(ps);
    this.how.hidden = running || this.beyond.shows;
    for (const { slider, value, kept, bins, rows, layer } of this.each) {
      const p = ps[rows[0]], share = percent(store.layerRatio(layer));
      this.place(slider, p, byRatio ? this.gatesOf(rows).shares.of(p) : 0);
      value.textContent = chance(p);
      kept.textContent = `keeps ${share}`;
      slider.setAttribute("aria-valuetext", `${chance(p)}, keeps ${share}`);
      this.drawBins(bins, rows, p);
    }
    this.job.draw();
    this.figures.draw();
  }

  // The layer's gates above its slider, over 0..1, or by their order of magnitude: full from p on.
  drawBins(canvas, rows, p) {
    const { levels, theme, decided } = this.store, width = canvas.clientWidth || 200, height = 22;
    const key = [p, width, theme.key, decided].join();
    if (canvas.drawnFor === key) return;
    canvas.drawnFor = key;
    const { bins } = this.gatesOf(rows), most = Math.max(...bins, 1), g = sharp(canvas, width, height), each = width / bins.length;
    bins.forEach((count, i) => {
      const tall = count ? Math.max(2, Math.sqrt(count / most) * height) : 0;
      g.fillStyle = (i + 0.5) / bins.length >= binPlace(levels, p) ? theme.accent : theme.line;
      g.fillRect(i * each, height - tall, each - 0.5, tall);
    });
  }
}

const binPlace = (levels, p) => clamp(levels.logarithmic ? levels.at(p) : p, 0, 1);

function binned(levels, cells, count = 50) {
  const bins = new Array(count).fill(0);
  for (const cell of cells) bins[Math.min(count - 1, Math.floor(binPlace(levels, levels.value(cell & LEVEL)) * count))] += 1;
  return bins;
}

VIEWS.thresholds = { scene: Store, title: "Thresholds", about, parts: () => [OwnText, ThresholdSliders, Budget, Heatmap] };
