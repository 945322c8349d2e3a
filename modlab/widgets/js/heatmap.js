// Tokens from left to right, layers from top to bottom. A full cell is a token that the layer ran, a thin line
// one that passed by; so the decision shows without colour, and colour shows the gate. A layer with several gates
// has a line for each. Only what is in view is drawn, as pixels (raster.js).
// uses: store raster

const WIDEST = 40; // CSS pixels of a token, zoomed in
const TALL = 216; // of all lines together, where each can have three: slider, figures and heatmap share a screen

class Heatmap {
  constructor(store, parent) {
    this.store = store;
    this.box = el(parent, "section", "mod-heat");
    const head = el(this.box, "div", "mod-head");
    this.title = el(head, "h3");
    this.zooms = el(head, "span", "mod-zooms");
    this.key = el(head, "span", "mod-key");
    for (const [sign, text, factor] of [["−", "zoom out", 1 / 1.5], ["+", "zoom in", 1.5], ["⇔", "show all tokens", 0]])
      button(this.zooms, sign, text, () => this.zoom(factor));
    this.legend = el(head, "canvas", "mod-legend");
    this.legend.setAttribute("role", "img");
    const frame = el(this.box, "div", "mod-frame");
    this.scroll = el(frame, "div", "mod-scroll");
    this.spacer = el(this.scroll, "div", "mod-spacer");
    this.canvas = el(this.spacer, "canvas", "modlab-heatmap");
    this.canvas.tabIndex = 0;
    ownKeys(this.canvas);
    this.canvas.setAttribute("role", "img");
    this.tip = el(frame, "div", "mod-tip");
    this.tip.hidden = true;
    this.look = el(this.box, "p", "mod-note mod-look");
    this.live = el(this.box, "div", "mod-unseen");
    this.live.setAttribute("aria-live", "polite");
    this.scroll.addEventListener("scroll", () => store.update());
    this.canvas.addEventListener("pointermove", (e) => this.hover(e));
    this.canvas.addEventListener("pointerleave", () => { if (!store.locked) store.point(-1); });
    this.canvas.addEventListener("click", (e) => this.click(e));
    this.canvas.addEventListener("wheel", (e) => {
      if (!e.ctrlKey && !e.metaKey) return; // the wheel alone scrolls the notebook
      e.preventDefault();
      this.zoom(Math.exp(-clamp(e.deltaY, -60, 60) / 120), e.clientX - this.canvas.getBoundingClientRect().left);
    }, { passive: false });
    this.canvas.addEventListener("keydown", (e) => {
      const factor = { "+": 1.5, "=": 1.5, "-": 1 / 1.5, 0: 0 }[e.key];
      if (factor !== undefined && !e.ctrlKey && !e.metaKey) { e.preventDefault(); e.stopPropagation(); return this.zoom(factor); }
      if (!store.key(e)) return;
      const { token, layer, head } = store.pointer;
      this.live.textContent = token < 0 ? "" : store.describe(token, layer, head).join(", ");
    });
    this.canvas.addEventListener("blur", () => { if (!store.locked) store.point(-1); });
    // Also fires when a cell that was hidden gets its size.
    this.observer = new ResizeObserver(() => store.update());
    this.observer.observe(this.scroll);
  }

  destroy() { this.observer.disconnect(); }

  // What the cells mean; another model may route something else.
  drawKey() {
    const { store } = this, { words } = store;
    this.title.textContent = words.title;
    this.look.textContent = `Look for ${store.several ? `${words.gate}s` : "layers"} that keep everything and for those that keep next to nothing.`;
    this.key.replaceChildren();
    const always = store.keepFirst ? [["always", "always kept"]] : [];
    const dense = store.routed < store.numLayers ? [["dense", "dense layer"]] : [];
    for (const [name, text] of [["runs", words.kept], ["skips", words.left], ...always, ...dense]) {
      const sample = el(this.key, "i", "mod-key-" + name);
      if (name === "runs") this.sample = sample;
      el(this.key, "span", "", text);
    }
  }

  // Sizes in CSS pixels; null while the widget is hidden.
  layout() {
    const { T, lanes } = this.store, width = this.scroll.clientWidth;
    if (width < 120) return null;
    const left = 58, right = 50, top = 4, h = Math.round(clamp(TALL / lanes.length, 3, 22)), view = width - left - right;
    const least = Math.min(view / T, 7), w = clamp(this.scale ?? this.usual(view / T), least, Math.max(WIDEST, least));
    const bottom = top + lanes.length * h;
    return { width, left, right, top, bottom, height: bottom + 34, w, h, view, full: w * T, least };
  }

  // Pixels of a token as long as nobody zooms, where all would have `each`.
  usual(each) { return clamp(each, 7, 26); }

  // Make tokens so many times as wide (0: as narrow as shows all), the one at `x` staying where it is.
  zoom(factor, x = null) {
    const m = this.layout();
    if (!m) return;
    const { cursor } = this.store, from = this.scroll.scrollLeft;
    const at = (cursor + 0.5) * m.w - from, seen = cursor >= 0 && at > 0 && at < m.view;
    const hold = x !== null ? clamp(x - m.left, 0, m.view) : seen ? at : m.view / 2;
    this.scale = factor ? clamp(m.w * factor, m.least, WIDEST) : m.least;
    this.anchor = { token: (hold + from) / m.w, x: hold };
    this.store.update();
  }

  cellAt(event) {
    const m = this.layout(), r = this.canvas.getBoundingClientRect();
    if (!m) return null;
    const x = event.clientX - r.left - m.left, y = event.clientY - r.top - m.top;
    const lane = this.store.lanes[Math.floor(y / m.h)], token = Math.floor((x + this.scroll.scrollLeft) / m.w);
    if (!lane || x >= m.view) return null;
    if (x < 0) return { ...lane, token: -1 };
    return token < this.store.T ? { ...lane, token } : null;
  }

  hover(event) {
    const cell = this.cellAt(event);
    this.canvas.style.cursor = cell && (cell.token >= 0 || cell.row >= 0) ? "pointer" : "default";
    if (!this.store.locked) this.store.point(cell ? cell.token : -1, cell ? cell.layer : -1, cell ? cell.head : 0);
  }

  click(event) {
    const cell = this.cellAt(event), store = this.store;
    if (!cell) return store.lock(false);
    if (cell.token >= 0 && store.choose(cell.token, cell.layer)) return;
    if (cell.token < 0) { // a layer's number: colour the text by it, or by all again
      if (cell.row >= 0) store.selectLayer(store.textLayer === cell.layer ? -1 : cell.layer);
      return;
    }
    const { token, layer, head } = store.pointer;
    if (store.locked && token === cell.token && layer === cell.layer && head === cell.head) store.lock(false);
    else store.selection.set({ token: cell.token, layer: cell.layer, head: cell.head, locked: true });
  }

  draw() {
    const { store } = this;
    if (this.tokens !== store.tokens) { // another text begins at its beginning, as wide as it likes
      if (this.tokens) { this.scale = undefined; this.scroll.scrollLeft = 0; }
      this.tokens = store.tokens;
    }
    const m = this.layout();
    if (!m) return;
    this.spacer.style.width = Math.max(m.width, m.left + m.right + m.full) + "px";
    this.spacer.style.height = m.height + "px";
    if (store.reveal && store.cursor >= 0) { // the keyboard cursor may have left the part in view
      const x = store.cursor * m.w, from = this.scroll.scrollLeft;
      if (x < from) this.scroll.scrollLeft = x;
      else if (x + m.w > from + m.view) this.scroll.scrollLeft = x + m.w - m.view;
    }
    store.reveal = false;
    if (this.anchor) { // only now is the spacer wide enough
      this.scroll.scrollLeft = this.anchor.token * m.w - this.anchor.x;
      this.anchor = null;
    }
    const g = sharp(this.canvas, m.width, m.height), { theme, T } = store, shift = this.scroll.scrollLeft;
    const first = Math.max(0, Math.floor(shift / m.w)), last = Math.min(T - 1, Math.floor((shift + m.view) / m.w));
    const end = Math.min(m.left + m.view, m.left + T * m.w - shift);
    this.zooms.hidden = m.view / T >= 26;
    (this.raster ||= new Raster(store)).paint(this.canvas, m, first, last, shift);
    g.save();
    g.beginPath();
    g.rect(m.left, 0, m.view, m.height);
    g.clip();
    this.drawAlways(g, m, first, last, shift);
    this.drawForced(g, m, first, last, shift);
    this.drawAxis(g, m, first, last, shift);
    this.drawCursor(g, m, shift);
    g.restore();
    this.drawLabels(g, m);
    if (this.stamp !== store.stamp) {
      this.stamp = store.stamp;
      this.drawKey();
      this.drawLegend();
    }
    this.drawTip(m, shift, end);
    this.canvas.dataset.kept = store.keepRatio.toFixed(4);
    this.canvas.dataset.theme = theme.dark ? "dark" : "light";
    this.canvas.dataset.threshold = number(store.threshold);
    this.canvas.dataset.state = store.preview ? "preview" : "measured";
    this.canvas.setAttribute("aria-label",
      `Routing heatmap, ${T} tokens by ${store.numLayers} layers, ${store.routed} of them routed` +
      `${store.several ? `, ${store.R} ${store.words.gate}s` : ""}. At threshold ${number(store.threshold)} ` +
      `${percent(store.keepRatio)} of the tokens are kept in the routed layers. Arrow keys move over the cells, Enter locks, ` +
      "Escape clears, plus and minus zoom, 0 shows all.");
  }

  drawAxis(g, m, first, last, shift) {
    const { theme } = this.store;
    const step = [1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000, 2000, 5000, 10000].find((s) => s * m.w >= 46) || 20000;
    g.fillStyle = theme.faint;
    g.strokeStyle = theme.line;
    g.font = `11px ${theme.font}`;
    g.textBaseline = "top";
    for (let t = Math.ceil(first / step) * step; t <= last; t += step) {
      const x = m.left + (t + 0.5) * m.w - shift;
      if (x > m.left + m.view - 14 && t > 0) continue; // its number would be cut
      g.fillRect(Math.round(x), m.bottom + 2, 1, 4);
      g.textAlign = t === 0 && m.w < 20 ? "left" : "center";
      g.fillText(t.toLocaleString("en"), t === 0 && m.w < 20 ? x - m.w / 2 : x, m.bottom + 8);
    }
  }

  // The first tokens of a text are kept whatever their gate: hatched where the gate alone would not keep them.
  drawAlways(g, m, first, last, shift) {
    const { store } = this;
    g.strokeStyle = css(store.theme.groundRgb);
    g.lineWidth = 1.5;
    for (let t = first; t <= Math.min(last, store.keepFirst - 1); t++)
      for (const [lane, { row }] of store.lanes.entries()) {
        if (row < 0 || !store.kept(row, t) || store.gate(row, t) >= store.p(row)) continue;
        const x = m.left + t * m.w - shift, y = m.top + lane * m.h + 1, w = m.w - 1, h = m.h - 2;
        g.save();
        g.beginPath();
        g.rect(x, y, w, h);
        g.clip();
        g.beginPath();
        for (let d = -h; d < w; d += 5) { g.moveTo(x + d, y + h); g.lineTo(x + d + h, y); }
        g.stroke();
        g.restore();
      }
  }

  // Flipped cells: a ring, so that they show without colour.
  drawForced(g, m, first, last, shift) {
    const { store } = this;
    for (const i of store.forced.keys()) {
      const t = i % store.T, row = Math.floor(i / store.T), lane = store.lanes.findIndex((l) => l.row === row);
      if (t < first || t > last) continue;
      const x = m.left + (t + 0.5) * m.w - shift, y = m.top + (lane + 0.5) * m.h, r = clamp(Math.min(m.w, m.h) / 2 - 1, store.several ? 2 : 3.5, 6);
      g.beginPath();
      g.arc(x, y, r, 0, 7);
      g.fillStyle = css(store.theme.groundRgb);
      g.fill();
      g.strokeStyle = store.theme.ink;
      g.lineWidth = 2;
      g.stroke();
    }
  }

  drawCursor(g, m, shift) {
    const { store } = this, t = store.cursor, { layer, head } = store.pointer;
    if (t < 0 || t >= store.T) return;
    const x = m.left + t * m.w - shift;
    g.strokeStyle = store.theme.accent;
    g.lineWidth = store.locked ? 2 : 1;
    const wide = Math.max(m.w, 3);
    g.strokeRect(x - 0.5, m.top - 1, wide, m.bottom - m.top + 2);
    if (layer < 0 || store.pointer.token !== t) return;
    g.lineWidth = 2.5;
    g.strokeStyle = store.theme.ink;
    g.strokeRect(x - 0.5, m.top + store.lane(layer, head) * m.h, wide, m.h);
  }

  drawLabels(g, m) {
    const { store } = this, { theme } = store, placed = [];
    const chosen = (layer) => store.textLayer === layer || store.pointer.layer === layer;
    g.textBaseline = "middle";
    // Where not every layer has room for its number, the one pointed at comes first, then routed ones.
    for (const wanted of [chosen, (layer) => store.rowsOf[layer].length > 0, () => true])
      for (let layer = 0; layer < store.numLayers; layer++) {
        const count = store.rowsOf[layer].length, y = m.top + (store.laneFrom[layer] + Math.max(1, count) / 2) * m.h;
        if (!wanted(layer) || placed.some((other) => Math.abs(other - y) < 12)) continue;
        placed.push(y);
        g.fillStyle = count ? theme.ink : theme.faint;
        g.font = `${chosen(layer) ? "bold " : ""}11px ${theme.font}`;
        g.textAlign = "right";
        g.fillText(String(layer), m.left - 8, y);
        g.textAlign = "left";
        g.fillText(count ? percent(store.layerRatio(layer)) : "dense", m.width - m.right + 8, y);
      }
    g.fillStyle = theme.faint;
    g.textBaseline = "top";
    g.font = `11px ${theme.font}`;
    g.fillText("token", m.left, m.bottom + 21);
    g.textAlign = "left";
    g.fillText("kept", m.width - m.right + 8, m.bottom + 8);
    g.save();
    g.translate(12, (m.top + m.bottom) / 2);
    g.rotate(-Math.PI / 2);
    g.textAlign = "center";
    g.fillText("layer", 0, -4);
    g.restore();
  }

  // The distribution of the gates in the colours of the cells: thin under p, full from p on.
  drawLegend() {
    const { store } = this, { theme, levels } = store, { low, high, bins } = levels, p = store.threshold;
    const width = 240, height = 36, left = 42, span = 160, base = 22, most = Math.max(...bins, 1);
    const g = sharp(this.legend, width, height), x = (v) => left + levels.at(v) * span, says = (v) => (store.byRatio ? chance(v) : v.toFixed(1));
    bins.forEach((count, i) => {
      const tall = count ? Math.max(2, Math.sqrt(count / most) * (base - 6)) : 0, at = (i + 0.5) / 50;
      g.fillStyle = at >= levels.at(p) ? css(ramp(at, theme.dark)) : theme.line;
      g.fillRect(left + (i / 50) * span, base - tall, span / 50 - 0.5, tall);
    });
    this.sample.style.background = `linear-gradient(90deg, ${store.colour(0.4 * high + 0.6 * low)}, ${store.colour(high)})`;
    g.fillStyle = theme.line;
    g.fillRect(left, base, span, 1);
    g.font = `11px ${theme.font}`;
    g.fillStyle = theme.faint;
    g.textBaseline = "top";
    g.textAlign = "center";
    g.fillText(says(low), x(low), base + 3);
    g.fillText(says(high), x(high), base + 3);
    g.textBaseline = "middle";
    g.textAlign = "right";
    g.fillText("gate", left - 10, base - 10);
    this.legend.setAttribute("aria-label", `Gates from ${says(low)} to ${says(high)}`);
    if (p < low || p > high) return;
    g.fillStyle = theme.ink;
    g.fillRect(x(p) - 0.75, 2, 1.5, base - 1);
    g.textBaseline = "top";
    g.textAlign = "center";
    if (Math.abs(x(p) - x(low)) > 18 && Math.abs(x(p) - x(high)) > 18) g.fillText("p", x(p), base + 3);
  }

  drawTip(m, shift, end) {
    const { store, tip } = this, { token, layer, head } = store.pointer, x = m.left + (token + 0.5) * m.w - shift;
    tip.hidden = token < 0 || layer < 0 || x < m.left || x > end;
    if (tip.hidden) return;
    tip.replaceChildren();
    store.describe(token, layer, head).forEach((line, i) => el(tip, "div", i ? "" : "mod-tip-token", line));
    const room = m.width - m.right, size = tip.getBoundingClientRect();
    tip.style.left = (x + 14 + size.width > room ? Math.max(0, x - 14 - size.width) : x + 14) + "px";
    tip.style.top = clamp(m.top + (store.lane(layer, head) + 1) * m.h + 4, 0, Math.max(0, m.height - size.height)) + "px";
  }
}

VIEWS.heatmap = { scene: Store, parts: () => [Heatmap] };
