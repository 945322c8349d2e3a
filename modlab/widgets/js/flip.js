// Force a token through a layer, or past it, by a click, and see what that does to the loss and to the next token.
// uses: heatmap text job own_text figures

class FlipStore extends Store {
  constructor(model, root) {
    super(model, root);
    this.listen("change:flips", () => this.force());
    this.listen("change:effect", () => this.update());
    this.force();
  }

  force() {
    this.note = "";
    this.forced = new Map(this.model.get("flips").flatMap(([layer, t, keep]) => this.rowsOf[layer].map((row) => [row * this.T + t, keep])));
    this.stale = true;
    this.update();
  }

  choose(token, layer) {
    const head = this.selection.layer === layer ? this.selection.head : 0;
    this.selection.set({ token, layer, head });
    if (layer < 0) return false;
    if (!this.rowsOf[layer].length) { this.note = `Layer ${layer} is dense: it has no router, every token runs.`; this.update(); return true; }
    this.flip(layer, token, head);
    return true;
  }

  // Away from what the model decided on its own, or back to it; all gates of a layer go the way of the one clicked.
  flip(layer, token, head = 0) {
    const flips = this.model.get("flips"), others = flips.filter(([l, t]) => l !== layer || t !== token);
    const next = others.length < flips.length ? others : [...flips, [layer, token, !this.kept(this.rowsOf[layer][head], token)]];
    this.setFlips(next);
  }

  setFlips(flips) {
    this.model.set("flips", flips);
    this.force();
    this.ask();
  }

  // Several clicks in a row make one run.
  ask() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.job.ask({ type: "flips", flips: this.model.get("flips"), position: this.asked }), 150);
  }

  // The token whose followers are asked for: the one that was chosen, else the one flipped last; -1 for the last one.
  get asked() { return this.locked ? this.cursor : this.model.get("flips").at(-1)?.[1] ?? -1; }

  destroy() { clearTimeout(this.timer); super.destroy(); }
}

class FlipEffect {
  constructor(store, parent) {
    this.store = store;
    this.note = el(parent, "p", "mod-note modlab-how");
    this.job = store.job = new Job(store, parent);
    const box = el(parent, "div", "mod-figures");
    this.box = box;
    this.loss = figure(box, "loss of this text", "modlab-flip-loss");
    this.kv = figure(box, "KV cache of this text", "modlab-flip-kv");
    this.others = figure(box, "other decisions that changed", "modlab-flip-others");
  }

  destroy() { this.job.destroy(); }

  draw() {
    const { store } = this, effect = store.model.get("effect"), flips = store.model.get("flips");
    this.note.textContent = store.note || (store.model.get("can_run")
      ? "Click a cell (or press Enter on it) to force the token through the layer or past it; click it again to undo."
      : "Flipping cells needs a notebook with the model.");
    this.note.hidden = this.job.running;
    this.job.draw();
    const change = (x, unit) => (x > 0 ? "+" : x < 0 ? "−" : "±") + unit(Math.abs(x));
    this.loss.value.textContent = effect.loss === null ? "–" : effect.loss.toFixed(4);
    this.loss.more.textContent = effect.loss === null ? "one token predicts nothing" : flips.length
      ? `${change(effect.loss - effect.loss_before, (x) => x.toFixed(4))} nats a token, was ${effect.loss_before.toFixed(4)}`
      : "nats a token, nothing flipped";
    this.kv.value.textContent = byteText(effect.kv_bytes);
    this.kv.more.textContent = flips.length
      ? `${change(effect.kv_bytes - effect.kv_bytes_before, byteText)}, was ${byteText(effect.kv_bytes_before)}`
      : "allocated, nothing flipped";
    this.others.value.textContent = String(effect.others);
    this.others.more.textContent = "gates of later layers and tokens see another state";
    this.box.dataset.state = this.job.running ? "preview" : "measured";
  }
}

class FlipList {
  constructor(store, parent) {
    this.store = store;
    this.box = el(parent, "section", "modlab-flips");
  }

  draw() {
    const { store } = this, flips = store.model.get("flips"), key = JSON.stringify(flips);
    if (key === this.drawnFor) return;
    this.drawnFor = key;
    this.box.replaceChildren();
    el(this.box, "h3", "", flips.length ? `Flipped cells: ${flips.length}` : "No cell is flipped");
    for (const [layer, t, keep] of flips) {
      const text = `layer ${layer}, ${store.name(t)} (${t}): ${keep ? "kept" : store.words.past} ✕`;
      button(this.box, text, `undo: layer ${layer}, token ${t}`, () => store.flip(layer, t));
    }
    if (flips.length > 1) button(this.box, "Undo all", "Undo all", () => store.setFlips([]));
  }
}

// Loss of each token, after minus before: up and orange is worse, down and blue is better.
class FlipDeltas {
  constructor(store, parent) {
    this.store = store;
    this.box = el(parent, "section");
    const head = el(this.box, "div", "mod-head");
    el(head, "h3", "", "Change of each token's loss");
    this.most = el(head, "span", "mod-note");
    this.canvas = el(this.box, "canvas", "modlab-deltas");
    this.canvas.setAttribute("role", "img");
    this.canvas.addEventListener("pointermove", (e) => { if (!store.locked) store.point(this.at(e)); });
    this.canvas.addEventListener("pointerleave", () => { if (!store.locked) store.point(-1); });
    this.canvas.addEventListener("click", (e) => { store.reveal = true; store.selection.set({ token: this.at(e), locked: true }); });
    this.observer = new ResizeObserver(() => store.update());
    this.observer.observe(this.box);
  }

  destroy() { this.observer.disconnect(); }

  at(event) {
    const r = this.canvas.getBoundingClientRect();
    return clamp(Math.floor(((event.clientX - r.left - 58) / (r.width - 108)) * this.store.T), 0, this.store.T - 1);
  }

  draw() {
    const { store } = this, { theme, T } = store, width = this.box.clientWidth, height = 76, left = 58, right = 50;
    if (width < 120) return;
    const deltas = new Float32Array(bytes(store.model.get("deltas"))), g = sharp(this.canvas, width, height);
    let most = 0, where = -1;
    deltas.forEach((d, t) => { if (Math.abs(d) > most) { most = Math.abs(d); where = t; } });
    const w = (width - left - right) / T, mid = height / 2, size = Math.max(most, 1e-6);
    g.fillStyle = theme.line;
    g.fillRect(left, mid, width - left - right, 1);
    deltas.forEach((d, t) => {
      if (!d) return;
      const tall = (d / size) * (mid - 6);
      g.fillStyle = d > 0 ? theme.worse : theme.better;
      g.fillRect(left + t * w, mid - Math.max(tall, 0), Math.max(w - (w > 4 ? 1 : 0), 1), Math.abs(tall));
    });
    g.font = `11px ${theme.font}`;
    g.fillStyle = theme.faint;
    g.textAlign = "right";
    g.textBaseline = "middle";
    if (most) for (const [v, y] of [[most, 8], [-most, height - 8]]) g.fillText((v > 0 ? "+" : "−") + most.toFixed(2), left - 8, y);
    g.fillText("0", left - 8, mid);
    if (store.cursor >= 0) { g.strokeStyle = theme.accent; g.strokeRect(left + store.cursor * w - 0.5, 1, Math.max(w, 3), height - 2); }
    this.most.textContent = where < 0 ? "nothing changed"
      : `largest: ${store.name(where)}, token ${where}, ${deltas[where] > 0 ? "+" : "−"}${most.toFixed(3)} nats`;
    this.canvas.setAttribute("aria-label", "Change of each token's loss. " + this.most.textContent);
  }
}

// The likeliest next tokens, before (outlined) and after (filled).
class NextTokens {
  constructor(store, parent) {
    this.store = store;
    this.box = el(parent, "section", "modlab-next");
    store.selection.addEventListener("change", this.moved = () => {
      const at = store.locked ? store.cursor : -1;
      if (at !== this.position) { this.position = at; if (store.model.get("can_run")) store.ask(); }
    });
    this.position = -1;
  }

  destroy() { this.store.selection.removeEventListener("change", this.moved); }

  draw() {
    const { store } = this, effect = store.model.get("effect"), key = JSON.stringify([effect.next, effect.at]);
    if (key === this.drawnFor) return;
    this.drawnFor = key;
    this.box.replaceChildren();
    el(this.box, "h3", "", `What may follow ${store.name(effect.at)}, token ${effect.at}`);
    const most = Math.max(...effect.next.flatMap((row) => [row.before, row.after]), 1e-9);
    const table = el(this.box, "table", "mod-table"), top = el(el(table, "thead"), "tr"), body = el(table, "tbody");
    for (const name of ["next token", "before", "after", ""]) el(top, "th", "", name);
    for (const row of effect.next) {
      const tr = el(body, "tr");
      el(tr, "td", "mod-code", visible(row.token) || "(part of a character)");
      el(tr, "td", "", percent(row.before));
      el(tr, "td", "", percent(row.after));
      const bars = el(el(tr, "td", "mod-bars"), "div");
      el(bars, "i", "mod-before").style.width = (100 * row.before) / most + "%";
      el(bars, "i", "mod-after").style.width = (100 * row.after) / most + "%";
    }
    el(this.box, "p", "mod-note", "Lock a token in the text to see what may follow that one; else it is the one flipped last, or the text's last.");
  }
}

VIEWS.flip = {
  scene: FlipStore, title: "Flip a cell", about,
  parts: () => [OwnText, Heatmap, FlipEffect, FlipList, FlipDeltas, NextTokens, TokenText],
};
