// The state that all views of one trace share: the recorded gates, the thresholds, the decisions, the selection.
// uses: selection levels

const KEPT = 0x8000, LEVEL = 0x3fff;
const LEAST_P = 0.01; // a slider for p goes no further, nor closer to 1

class Store extends Scene {
  constructor(model, root) {
    super(model, root);
    this.forced = new Map(); // row * T + t -> keep, of flipped cells
    this.listen("change:summary", () => { this.load(); this.update(); });
    this.listen("change:group", () => this.join());
    for (const name of ["threshold", "layer_thresholds"]) this.listen("change:" + name, () => this.update());
    this.listen("change:cursor", () => this.selection.set({ token: model.get("cursor") }));
    this.listen("change:layer", () => this.selection.set({ textLayer: model.get("layer") }));
    this.listen("change:locked", () => this.selection.set({ locked: model.get("locked") }));
    this.follow = () => this.mirror();
    root.addEventListener("keydown", (event) => { if (event.key === "Escape") this.key(event); });
    this.load();
    this.join();
    this.decide();
  }

  destroy() {
    super.destroy();
    this.selection.removeEventListener("change", this.follow);
  }

  join() {
    const { model } = this;
    this.selection?.removeEventListener("change", this.follow);
    this.selection = selectionOf(model.get("group"));
    this.selection.addEventListener("change", this.follow);
    if (this.selection.token >= this.T) this.selection.set({ token: -1, locked: false });
    if (this.selection.token < 0 && model.get("cursor") >= 0)
      this.selection.set({ token: model.get("cursor"), locked: model.get("locked") });
    if (this.selection.textLayer < 0) this.selection.set({ textLayer: model.get("layer") });
    if (this.selection.textLayer >= this.numLayers) this.selection.set({ textLayer: -1, textHead: -1 });
    this.mirror();
  }

  // Bring this widget's traits in line with the selection. Python hears of a locked token, not of every one passed over.
  mirror() {
    const { model, selection } = this, tell = selection.locked || model.get("locked");
    let news = false;
    for (const [trait, name] of [["cursor", "token"], ["layer", "textLayer"], ["locked", "locked"]])
      if (model.get(trait) !== selection[name]) {
        model.set(trait, selection[name]);
        news ||= tell || trait === "layer";
      }
    if (news) this.save();
    if (tell) this.reveal = true; // bring a chosen token into view
    this.update();
  }

  load() {
    const m = this.model;
    this.tokens = m.get("tokens");
    this.layers = m.get("layers");
    this.numLayers = m.get("num_layers");
    this.keepFirst = m.get("keep_first");
    this.summary = m.get("summary");
    this.T = this.tokens.length;
    this.R = this.layers.length;
    this.cells = new Uint16Array(bytes(m.get("gates")));
    this.losses = new Float32Array(bytes(m.get("losses")));
    this.rowsOf = Array.from({ length: this.numLayers }, () => []); // a row a gate: one a layer, or one a KV head
    this.layers.forEach((layer, row) => this.rowsOf[layer].push(row));
    this.routed = this.rowsOf.filter((rows) => rows.length).length;
    this.several = this.R > this.routed;
    // What is drawn one below the other: a line a gate, one for a layer without.
    this.lanes = this.rowsOf.flatMap((rows, layer) => (rows.length ? rows : [-1]).map((row, head) => ({ layer, row, head })));
    this.laneFrom = this.rowsOf.map((_, layer) => this.lanes.findIndex((lane) => lane.layer === layer));
    this.byRatio = Boolean(this.summary.by_ratio); // pictures/page.py
    this.levels = new Levels(this.cells, new Float32Array(bytes(m.get("fine"))), this.byRatio);
    this.stale = true;
  }

  get threshold() { return this.model.get("threshold"); }
  get textLayer() { return this.selection.textLayer; }
  get cursor() { return this.selection.token < this.T ? this.selection.token : -1; }
  get textHead() { return this.selection.textHead; }
  get pointer() { return { token: this.cursor, layer: this.selection.layer, head: this.selection.head }; }
  get locked() { return this.selection.locked; }

  // The p of a routed row: its own slider's, else the one for all; at the measured point that of the run.
  p(row) {
    const own = this.model.get("layer_thresholds");
    if (own?.length) return own[row];
    return this.preview ? this.threshold : this.summary.ps[row];
  }

  get preview() {
    const own = this.model.get("layer_thresholds"), { summary } = this, at = Math.fround;
    if (own?.length) return own.some((p, row) => at(p) !== at(summary.ps[row]));
    return at(this.threshold) !== at(summary.p);
  }

  gate(row, t) { return this.levels.value(this.cells[row * this.T + t] & LEVEL); }
  kept(row, t) { return this.mask[row * this.T + t] === 1; }
  // The part of its layer that a row is: all of it, or one KV head's.
  weight(row) { return 1 / this.rowsOf[this.layers[row]].length; }
  // Share of a layer's gates that keep the token, 0..1; all of a layer without.
  share(layer, t, rows = this.rowsOf[layer]) { return rows.length ? rows.reduce((sum, row) => sum + this.kept(row, t), 0) / rows.length : 1; }
  layerRatio(layer) { const rows = this.rowsOf[layer]; return rows.reduce((sum, row) => sum + this.ratio[row], 0) / rows.length; }
  // The lane of a cell, -1 for none.
  lane(layer, head = 0) { return layer < 0 ? -1 : this.laneFrom[layer] + Math.min(head, Math.max(0, this.rowsOf[layer].length - 1)); }
  colour(gate) { return css(ramp(this.levels.at(gate), this.theme.dark)); }

  prepare() {
    const key = [this.threshold, ...(this.model.get("layer_thresholds") || [])].join();
    if (this.stale || key !== this.decidedFor) this.decide();
    // Views that are expensive to draw do so only when this has changed.
    this.stamp = [this.decided, this.theme.key, this.textLayer, this.textHead].join();
  }

  // The executed decisions at the measured thresholds; at any others, what the recorded gates would decide.
  decide() {
    const { T, R, cells, preview, keepFirst, forced } = this;
    const mask = this.mask = new Uint8Array(R * T), count = this.count = new Uint16Array(T);
    this.held = new Float32Array(T); // layers that keep the token, those with several gates in part
    this.ratio = new Float64Array(R);
    for (let row = 0; row < R; row++) {
      const level = this.levels.of(this.p(row)), start = row * T;
      let sum = 0;
      for (let t = 0, i = start; t < T; t++, i++) {
        const keep = preview ? (cells[i] & LEVEL) >= level || t < keepFirst : (cells[i] & KEPT) !== 0;
        if (keep) { mask[i] = 1; count[t]++; this.held[t] += this.weight(row); sum++; }
      }
      this.ratio[row] = sum / T;
    }
    for (const [i, keep] of forced) {
      const row = Math.floor(i / T), change = Number(keep) - mask[i];
      mask[i] = Number(keep);
      count[i % T] += change;
      this.held[i % T] += change * this.weight(row);
      this.ratio[row] += change / T;
    }
    this.keepRatio = this.ratio.reduce((a, b) => a + b, 0) / Math.max(1, R);
    this.keptShare = this.layers.reduce((sum, _, row) => sum + this.ratio[row] * this.weight(row), 0) / Math.max(1, this.routed);
    this.decidedFor = [this.threshold, ...(this.model.get("layer_thresholds") || [])].join();
    this.decided = (this.decided || 0) + 1;
    this.stale = false;
  }

  // Bytes of K and V: measured ones, or for a preview the kept tokens' own.
  kvBytes() {
    const s = this.summary;
    if (!this.preview) return s.kv_bytes;
    if (!s.token_bytes) return s.dense_bytes;
    return this.T * (s.token_bytes * (this.numLayers - this.routed) + s.stored_bytes * this.stored(this.T) * this.routed);
  }

  // Share of a text of `tokens` that a routed layer's cache holds: kept tokens, and the latest whether kept or not.
  stored(tokens, keepRatio = this.keptShare) {
    const recent = tokens ? Math.min(1, (this.summary.recent || 0) / tokens) : 0;
    return keepRatio + (1 - keepRatio) * recent;
  }

  point(token, layer = -1, head = 0) { this.selection.set({ token, layer, head }); }

  lock(on) { this.selection.set(on ? { locked: true } : { locked: false, token: -1, layer: -1, head: 0 }); }

  selectLayer(layer, head = -1) { this.selection.set({ textLayer: layer, textHead: head }); }

  // Arrow keys, Home, End, Enter, Escape: the same wherever the focus is. Returns whether the key was used.
  key(event) {
    const { token, layer, head } = this.pointer, last = this.T - 1;
    const at = token < 0 ? 0 : token, up = Math.max(0, this.lane(layer, head));
    const step = event.shiftKey ? 10 : 1;
    const go = {
      ArrowLeft: [Math.max(0, at - step), up], ArrowRight: [Math.min(last, token < 0 ? 0 : at + step), up],
      ArrowUp: [at, Math.max(0, up - 1)], ArrowDown: [at, Math.min(this.lanes.length - 1, layer < 0 ? 0 : up + 1)],
      Home: [0, up], End: [last, up],
    }[event.key];
    if (go) { const lane = this.lanes[go[1]]; this.reveal = true; this.point(go[0], lane.layer, lane.head); }
    else if ((event.key === "Enter" || event.key === " ") && token >= 0 && this.choose(token, layer)) { /* a flip */ }
    else if (event.key === "Enter" || event.key === " ") this.lock(!this.locked);
    else if (event.key === "Escape") this.lock(false);
    else return false;
    event.preventDefault();
    event.stopPropagation();
    return true;
  }

  // What a click on a cell does beyond locking; true if that was all. Views with an own idea replace it.
  choose(_token, _layer) { return false; }

  name(t) {
    if (this.tokens[t] !== "") return `“${visible(this.tokens[t])}”`;
    return t ? "(rest of a character)" : "(start of the text)";
  }

  // What is said and drawn of a token that a layer does not keep (pictures/words.py).
  get words() { return this.summary.words; }

  // A row, as people call it.
  rowName(row) {
    const layer = this.layers[row], rows = this.rowsOf[layer];
    return `layer ${layer}` + (rows.length > 1 ? `, ${this.words.gate} ${rows.indexOf(row)}` : "");
  }

  // How much of the model keeps the token.
  countText(t) {
    if (!this.several) return `kept by ${this.count[t]} of ${this.R} routed layers`;
    return `kept by ${this.count[t]} of ${this.R} ${this.words.gate}s`;
  }

  // One sentence a line on a token, and on its cell in `layer` if that is >= 0: of one of its gates, or (-1) of all.
  describe(t, layer, head = 0) {
    const lines = [this.name(t), `token ${t.toLocaleString("en")} of ${this.T.toLocaleString("en")}`];
    const rows = layer >= 0 ? this.rowsOf[layer] : [], all = head < 0 && rows.length > 1;
    const row = rows.length && !all ? rows[clamp(head, 0, rows.length - 1)] : -1;
    if (layer >= 0 && !rows.length) lines.push(`layer ${layer}: not routed, every token is kept`);
    else if (all) lines.push(`layer ${layer}: kept by ${rows.filter((r) => this.kept(r, t)).length} of ${rows.length} ${this.words.gate}s`);
    else if (row >= 0) {
      const gate = this.gate(row, t), kept = this.kept(row, t), p = this.p(row), forced = this.forced.get(row * this.T + t);
      const always = forced === undefined && t < this.keepFirst && gate < p;
      const versus = always || forced !== undefined ? "" : ` ${gate >= p ? "≥" : "<"} p ${chance(p)}`;
      const became = (kept ? "kept" : this.words.past) + (forced === undefined ? "" : " by you");
      lines.push(`${this.rowName(row)}: gate ${this.byRatio ? chance(gate) : gate.toFixed(3)}${versus}, ${became}`);
      if (always) lines.push(`the first ${this.keepFirst} tokens are always kept`);
    }
    lines.push(this.countText(t));
    if (t > 0 && Number.isFinite(this.losses[t])) lines.push(`loss of this token ${this.losses[t].toFixed(2)} nats`);
    return lines;
  }
}
