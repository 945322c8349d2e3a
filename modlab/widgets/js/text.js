// The text itself, coloured by how many routed layers keep each token, or by one layer's decision.
// uses: store

const CHUNK = 400; // tokens that are coloured together when they come into view

class TokenText {
  constructor(store, parent) {
    this.store = store;
    this.box = el(parent, "section", "mod-text-box");
    const head = el(this.box, "div", "mod-head");
    el(head, "h3", "", "The text");
    const label = el(head, "label", "mod-choice", "coloured by ");
    this.choice = el(label, "select");
    ownKeys(this.choice);
    this.choice.addEventListener("change", () => store.selectLayer(...this.choice.value.split(":").map(Number)));
    this.legend = el(head, "span", "mod-swatches");
    this.text = el(this.box, "div", "modlab-text");
    this.text.tabIndex = 0;
    ownKeys(this.text);
    this.text.setAttribute("role", "group");
    this.text.setAttribute("aria-label", "The traced text; arrow keys move from token to token");
    this.text.addEventListener("pointerover", (e) => { if (!store.locked) store.point(this.tokenOf(e)); });
    this.text.addEventListener("pointerleave", () => { if (!store.locked) store.point(-1); });
    this.text.addEventListener("click", (e) => this.click(this.tokenOf(e)));
    this.text.addEventListener("keydown", (e) => store.key(e));
    this.text.addEventListener("scroll", () => this.paint());
    this.note = el(this.box, "p", "mod-note");
    this.note.setAttribute("aria-live", "polite");
    this.observer = new ResizeObserver(() => this.paint());
    this.observer.observe(this.text);
    this.marked = null;
  }

  destroy() { this.observer.disconnect(); }

  tokenOf(event) { return event.target.dataset.t === undefined ? -1 : Number(event.target.dataset.t); }

  click(token) {
    const { store } = this, again = store.locked && store.cursor === token;
    if (token < 0 || again) return store.lock(false);
    store.reveal = true;
    const { layer, head } = store.pointer.token === token ? store.pointer : { layer: -1, head: 0 };
    store.selection.set({ token, layer, head, locked: true });
  }

  // Spans are made once for a text; a new run of the same text only recolours them.
  build() {
    const { store } = this;
    if (this.options !== String(store.layers)) {
      this.options = String(store.layers);
      this.choice.replaceChildren();
      this.option(-1, -1, `number of ${store.several ? `${store.words.gate}s` : "routed layers"} that keep it`);
      for (const [layer, rows] of store.rowsOf.entries()) {
        if (rows.length > 1) this.option(layer, -1, `layer ${layer}: number of its ${store.words.gate}s`);
        rows.forEach((row, head) => this.option(layer, rows.length > 1 ? head : -1, `${store.rowName(row)}: kept or ${store.words.past}`));
      }
      this.stamp = "";
    }
    if (this.built === store.tokens) return;
    const before = this.built || [], grown = before.length && before.every((piece, t) => piece === store.tokens[t]);
    this.built = store.tokens;
    if (!grown) { // else the text goes on
      this.chunks = [];
      this.spans = [];
      this.text.replaceChildren();
    }
    for (let start = this.spans.length; start < store.T; start += CHUNK) {
      const node = el(this.text, "span"), end = Math.min(store.T, start + CHUNK);
      for (let t = start; t < end; t++) {
        const piece = store.tokens[t], span = el(node, "span", "mod-token", piece);
        span.dataset.t = t;
        if (piece === "") span.classList.add("mod-empty");
        else if (piece.includes("\n")) span.classList.add("mod-newline");
        this.spans.push(span);
      }
      this.chunks.push({ node, start, end, stale: true });
    }
  }

  option(layer, head, text) { el(this.choice, "option", "", text).value = `${layer}:${head}`; }

  // Rows of the trace that colour the text.
  get rows() {
    const { store } = this, { textLayer: layer, textHead: head } = store, rows = store.rowsOf[layer] || [];
    return head >= 0 && head < rows.length ? [rows[head]] : rows;
  }

  draw() {
    const { store } = this;
    this.build();
    if (this.stamp !== store.stamp) { // recolouring is expensive: not for every token that the mouse passes
      this.stamp = store.stamp;
      this.choice.value = `${store.textLayer}:${store.textHead}`;
      for (const chunk of this.chunks) chunk.stale = true;
      this.paint();
      this.drawLegend();
    }
    const t = store.cursor, span = this.spans[t];
    if (this.marked) this.marked.classList.remove("mod-on", "mod-locked");
    this.marked = span || null;
    if (span) {
      span.classList.add("mod-on");
      span.classList.toggle("mod-locked", store.locked);
      if (store.locked || document.activeElement !== this.text) this.bring(span);
    }
    const frees = store.locked ? " · locked, Escape frees it" : "";
    this.note.textContent = span ? store.describe(t, store.textLayer, store.textHead).join(" · ") + frees
      : "Look for kinds of words that stay and kinds that go. Point at a token; a click locks it.";
  }

  // Scroll the text box, never the notebook.
  bring(span) {
    if (span.matches(":hover")) return;
    const a = span.getBoundingClientRect(), b = this.text.getBoundingClientRect();
    if (a.top < b.top) this.text.scrollTop -= b.top - a.top + 8;
    else if (a.bottom > b.bottom) this.text.scrollTop += a.bottom - b.bottom + 8;
  }

  share(t) { // 0..1
    const { store } = this, { rows } = this;
    return rows.length ? store.share(store.textLayer, t, rows) : store.count[t] / Math.max(1, store.R);
  }

  paint() {
    if (!this.chunks) return;
    const view = this.text.getBoundingClientRect();
    if (!view.height) return;
    for (const chunk of this.chunks) {
      if (!chunk.stale) continue;
      const r = chunk.node.getBoundingClientRect();
      if (r.bottom < view.top - 200 || r.top > view.bottom + 200) continue;
      for (let t = chunk.start; t < chunk.end; t++) colourSpan(this.spans[t], this.share(t), this.store.theme);
      chunk.stale = false;
    }
  }

  drawLegend() {
    const { store } = this, count = this.rows.length || store.R;
    const steps = count < 2 ? [[0, store.words.past], [1, "kept"]] : [[0, "0"], [0.5, ""], [1, `${count} of ${count}`]];
    this.legend.replaceChildren();
    for (const [share, text] of steps) {
      const sample = el(this.legend, "span", "mod-token mod-swatch", "a");
      colourSpan(sample, share, store.theme);
      if (text) el(this.legend, "span", "", text);
    }
  }
}

// None keeps it: no ground, a line under it. Else the more layers, the further from the ground of the page.
function colourSpan(span, share, theme) {
  span.classList.toggle("mod-none", share === 0);
  const x = 0.12 + 0.8 * share;
  const colour = share ? theme.groundRgb.map((c, k) => Math.round(c + x * (theme.accentRgb[k] - c))) : null;
  span.style.background = colour ? css(colour) : "";
  span.style.color = colour ? inkOn(colour) : "";
}

VIEWS.text = { scene: Store, parts: () => [TokenText] };
