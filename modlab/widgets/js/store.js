// The state that all views of one widget share: the recorded gates, the threshold, the cursor.
// `model` is anywidget's model, or a PlainModel on a page without Jupyter; both know get, set, on, off.

const KEPT = 0x8000, LEVEL = 0x3fff;

class Store {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.views = [];
    this.pointer = { token: -1, layer: -1 }; // the cell under the mouse or the keyboard cursor
    this.locked = false;
    this.handlers = [];
    this.listen("change:summary", () => { this.load(); this.update(); });
    for (const name of ["threshold", "cursor", "layer"]) this.listen("change:" + name, () => this.update());
    this.load();
    this.decide();
  }

  listen(event, handler) {
    this.model.on(event, handler);
    this.handlers.push([event, handler]);
  }

  destroy() {
    for (const [event, handler] of this.handlers) this.model.off(event, handler);
    for (const view of this.views) view.destroy?.();
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
    this.rowOf = new Int32Array(this.numLayers).fill(-1);
    this.layers.forEach((layer, row) => { this.rowOf[layer] = row; });
    let low = GRID, high = 0;
    const bins = this.bins = new Uint32Array(50);
    for (const cell of this.cells) {
      const level = cell & LEVEL;
      if (level < low) low = level;
      if (level > high) high = level;
      bins[Math.min(49, Math.floor((level * 50) / GRID))] += 1;
    }
    // The colours span the gates that occur, to the next tenth: most models use a part of 0..1 only.
    this.low = Math.min(0.9, Math.floor((low / GRID) * 10) / 10);
    this.high = Math.max(this.low + 0.1, Math.ceil((high / GRID) * 10) / 10);
  }

  get threshold() { return this.model.get("threshold"); }
  get preview() { return Math.round(this.threshold * GRID) !== Math.round(this.summary.p * GRID); }
  get textLayer() { return this.model.get("layer"); }
  get cursor() { return this.model.get("cursor"); }

  gate(row, t) { return (this.cells[row * this.T + t] & LEVEL) / GRID; }
  kept(row, t) { return this.mask[row * this.T + t] === 1; }
  colour(gate) { return css(ramp((gate - this.low) / (this.high - this.low), this.theme.dark)); }

  // The executed decisions at the measured threshold; at any other one, what the recorded gates would decide.
  decide() {
    const { T, R, cells } = this, level = Math.round(this.threshold * GRID), preview = this.preview;
    const mask = this.mask = new Uint8Array(R * T), count = this.count = new Uint16Array(T);
    this.ratio = new Float64Array(R);
    for (let row = 0; row < R; row++) {
      let sum = 0;
      for (let t = 0, i = row * T; t < T; t++, i++) {
        const keep = preview ? ((cells[i] & LEVEL) >= level || t < this.keepFirst) : (cells[i] & KEPT) !== 0;
        if (keep) { mask[i] = 1; count[t]++; sum++; }
      }
      this.ratio[row] = sum / T;
    }
    this.keepRatio = this.ratio.reduce((a, b) => a + b, 0) / Math.max(1, R);
    this.decidedFor = [this.threshold, this.summary];
  }

  // Bytes of K and V: measured ones, or for a preview the kept tokens' own.
  kvBytes() {
    const s = this.summary;
    if (!this.preview) return s.kv_bytes;
    if (!s.token_bytes) return s.dense_bytes;
    return s.token_bytes * this.T * (this.numLayers - this.R + this.keepRatio * this.R);
  }

  // Draw all views once in the next frame, however often it is asked for.
  update() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      const [threshold, summary] = this.decidedFor;
      this.theme = readTheme(this.root);
      if (threshold !== this.threshold || summary !== this.summary) this.decide();
      for (const view of this.views) view.draw();
    });
  }

  point(token, layer = -1) {
    this.pointer = { token, layer };
    if (this.cursor !== token) this.model.set("cursor", token);
    this.update();
  }

  lock(on) {
    this.locked = on;
    if (!on) this.point(-1);
    this.model.save_changes(); // Python sees the token that was chosen, not every one passed over
    this.update();
  }

  selectLayer(layer) {
    this.model.set("layer", layer);
    this.model.save_changes();
  }

  // Arrow keys, Home, End, Enter, Escape: the same wherever the focus is. Returns whether the key was used.
  key(event) {
    const { token, layer } = this.pointer, last = this.T - 1;
    const at = token < 0 ? 0 : token, up = layer < 0 ? 0 : layer;
    const step = event.shiftKey ? 10 : 1;
    const go = {
      ArrowLeft: [Math.max(0, at - step), up], ArrowRight: [Math.min(last, token < 0 ? 0 : at + step), up],
      ArrowUp: [at, Math.max(0, up - 1)], ArrowDown: [at, Math.min(this.numLayers - 1, layer < 0 ? 0 : up + 1)],
      Home: [0, up], End: [last, up],
    }[event.key];
    if (go) { this.point(...go); this.reveal = true; }
    else if (event.key === "Enter" || event.key === " ") this.lock(!this.locked);
    else if (event.key === "Escape") this.lock(false);
    else return false;
    event.preventDefault();
    event.stopPropagation();
    return true;
  }

  name(t) {
    if (this.tokens[t] !== "") return `“${visible(this.tokens[t])}”`;
    return t ? "(rest of a character)" : "(start of the text)";
  }

  // One sentence a line on a token, and on its cell in `layer` if that is >= 0.
  describe(t, layer) {
    const lines = [this.name(t), `token ${t.toLocaleString("en")} of ${this.T.toLocaleString("en")}`];
    const row = layer >= 0 ? this.rowOf[layer] : -1;
    if (layer >= 0 && row < 0) lines.push(`layer ${layer}: dense, every token runs`);
    else if (row >= 0) {
      const gate = this.gate(row, t), kept = this.kept(row, t), p = this.threshold;
      // At the measured point each layer may have its own threshold: show only the outcome.
      const own = !this.preview && this.summary.varies;
      const forced = t < this.keepFirst && gate < p;
      const versus = own || forced ? "" : ` ${gate >= p ? "≥" : "<"} p ${number(p)}`;
      lines.push(`layer ${layer}: gate ${gate.toFixed(3)}${versus}, ${kept ? "kept" : "skipped"}`);
      if (forced) lines.push(`the first ${this.keepFirst} tokens are always kept`);
    }
    lines.push(`kept by ${this.count[t]} of ${this.R} routed layers`);
    if (t > 0 && Number.isFinite(this.losses[t])) lines.push(`loss of this token ${this.losses[t].toFixed(2)} nats`);
    return lines;
  }
}

// -- small helpers ---------------------------------------------------------------------------------------------

// anywidget hands bytes over as a DataView into a larger buffer; a typed array needs its own, aligned one.
function bytes(view) {
  return view.buffer ? view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength) : view;
}

const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const number = (x) => String(Number(x.toFixed(4)));
const percent = (x) => (100 * x).toFixed((x >= 0.0995 && x < 0.995) || x === 1 ? 0 : 1) + " %"; // 100 % is all
const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥");

function byteText(n) { // three figures, as 4.56 kB, 45.6 kB, 456 kB
  const power = [3, 2, 1].find((k) => n >= 999.5 * 1000 ** (k - 1)) || 0, x = n / 1000 ** power;
  return x.toFixed(power === 0 || x >= 99.95 ? 0 : x >= 9.995 ? 1 : 2) + " " + ["B", "kB", "MB", "GB"][power];
}

// A child element with a class and text: el(parent, "div", "name", "text").
function el(parent, tag, name = "", text = "") {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text) node.textContent = text;
  parent.append(node);
  return node;
}

// Viridis at x in 0..1, from the ground of the theme to its ink: dark colours are strong on light, bright ones on dark.
function ramp(x, dark) {
  const span = RAMP.length - 1, y = clamp(x, 0, 1);
  const at = (dark ? 0.12 + 0.88 * y : 0.97 - 0.97 * y) * span, i = Math.min(span - 1, Math.floor(at)), f = at - i;
  return RAMP[i].map((c, k) => Math.round(c + f * (RAMP[i + 1][k] - c)));
}

const css = (rgb) => `rgb(${rgb.join(",")})`;

// Black or white, whichever has the higher contrast on the colour (WCAG relative luminance).
function inkOn(rgb) {
  const [r, g, b] = rgb.map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

// The arrow keys are this element's: JupyterLab, which asks the focused element only, must not take them.
function ownKeys(node) { node.dataset.lmSuppressShortcuts = "true"; }

// Canvas cannot use CSS variables: read what the style sheet made of JupyterLab's theme.
function readTheme(root) {
  const style = getComputedStyle(root), read = (name) => style.getPropertyValue(name).trim();
  const rgb = parseColour(read("--mod-surface")); // not the background: that is still on its way for some frames
  return {
    dark: 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] < 128,
    ink: read("--mod-ink"), faint: read("--mod-faint"), line: read("--mod-line"), dense: read("--mod-dense"),
    accent: read("--mod-accent"), font: style.fontFamily, groundRgb: rgb, accentRgb: parseColour(read("--mod-accent")),
  };
}

// Any CSS colour as [r, g, b]: a canvas knows them all.
const parsed = new Map();
function parseColour(text) {
  if (!parsed.has(text)) {
    const g = document.createElement("canvas").getContext("2d");
    g.fillStyle = text;
    g.fillRect(0, 0, 1, 1);
    parsed.set(text, [...g.getImageData(0, 0, 1, 1).data.slice(0, 3)]);
  }
  return parsed.get(text);
}

// A canvas as sharp as the screen: sets its size in CSS pixels and returns a context that draws in them.
function sharp(canvas, width, height) {
  const scale = window.devicePixelRatio || 1, w = Math.round(width * scale), h = Math.round(height * scale);
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  canvas.style.width = width + "px";
  canvas.style.height = height + "px";
  const g = canvas.getContext("2d");
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.clearRect(0, 0, width, height);
  return g;
}
