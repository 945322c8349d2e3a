// The cache itself, by layer, KV head and position, while text is generated: what is kept stays, all else fades.
// uses: heatmap text own_text controls plot

class CacheStore extends Store {
  constructor(model, root) {
    super(model, root);
    for (const name of ["written", "heads", "max_new_tokens"]) this.listen("change:" + name, () => this.update());
  }

  get written() { return this.model.get("written"); }

  // What a cache holds of a token that no router keeps: 1 for the latest one, 0 once it is no longer recent.
  fresh(t) {
    const recent = this.summary.recent || 0;
    return recent ? clamp(1 - (this.T - 1 - t) / recent, 0, 1) : 0;
  }
}

class CacheRaster extends Raster {
  cells(row, first, last, w, from, full, thin, colours, gap) {
    const { store } = this;
    super.cells(row, first, last, w, from, full, thin, colours, gap);
    for (let t = last; t >= first && store.fresh(t) > 0; t--) {
      if (store.kept(row, t)) continue;
      const a = Math.max(0, Math.round(t * w - from)), b = Math.round((t + 1) * w - from) - gap;
      full.fill(this.fading(store.fresh(t)), a, b);
      thin.fill(this.fading(store.fresh(t)), a, b);
    }
  }

  shares(row, w, from, full, thin, colours) {
    const { store } = this, end = Math.min(full.length, Math.ceil(store.T * w - from));
    super.shares(row, w, from, full, thin, colours);
    for (let x = end - 1; x >= 0; x--) {
      const fresh = store.fresh(Math.min(store.T - 1, Math.floor((x + from) / w)));
      if (!fresh) return;
      if (!full[x]) full[x] = thin[x] = this.fading(fresh);
    }
  }

  fading(fresh) { return pixel(this.store.theme.faintRgb, Math.round(30 + 190 * fresh)); }
}

class CachePicture extends Heatmap {
  constructor(store, parent) {
    super(store, parent);
    this.raster = new CacheRaster(store);
  }

  usual(each) { return Math.min(26, each); } // all of the text, however long it grows

  drawKey() {
    const { store } = this, recent = store.summary.recent || 0;
    super.drawKey();
    this.title.textContent = `What the cache holds, by layer${store.several ? " and KV head" : ""}`;
    if (recent) {
      el(this.key, "i", "mod-key-fading");
      el(this.key, "span", "", `fading: among the latest ${recent + 1}`);
    }
    this.look.textContent = `Look for ${store.several ? "heads" : "layers"} that stay full to the left, `
      + "and for those of which the right edge alone is left.";
  }
}

class CacheControls extends Controls {
  constructor(store, parent) {
    super(store, parent);
    const bar = this.badge.parentNode;
    this.go = button(bar, "Generate", "go on with the text", () => this.ask());
    this.go.classList.add("mod-main", "modlab-generate");
    const length = el(bar, "label", "mod-field", "new tokens ");
    this.length = el(length, "input", "modlab-new-tokens");
    Object.assign(this.length, { type: "number", min: 1, step: 1, value: store.model.get("max_new_tokens") });
    ownKeys(this.length);
    this.length.addEventListener("change", () => {
      if (this.length.checkValidity() && this.length.value) store.model.set("max_new_tokens", Number(this.length.value));
    });
    this.speed = figure(this.figures.box, "speed", "modlab-cache-speed");
    this.answer = figure(this.figures.box, "answer", "modlab-answer");
    this.answer.box.setAttribute("role", "status");
  }

  ask() { this.job.ask({ type: "generate", max_new_tokens: this.store.model.get("max_new_tokens") }); }

  draw() {
    super.draw();
    const { store } = this, { tokens_per_s: rate, first_s: first, tokens, prompt } = store.written, can = store.model.get("can_run");
    this.go.disabled = !can || this.job.running;
    this.length.disabled = !can;
    this.figures.loss.box.hidden = Boolean(tokens);
    this.speed.box.hidden = !tokens;
    this.drawAnswer();
    if (!tokens) return;
    this.speed.value.textContent = rate ? `${rate.toFixed(1)} tok/s` : "–";
    this.speed.more.textContent = `first token ${milliseconds(1000 * first)} · ${tokens.at(-1) - prompt} tokens written and read`;
  }

  // Where something is expected: whether it was found with what the cache still holds.
  drawAnswer() {
    const { store } = this, { found = null, text } = store.written, expect = store.model.get("expect");
    const state = store.preview ? "preview" : found === null ? "asking" : found ? "found" : "lost";
    this.answer.box.hidden = !expect;
    this.answer.box.dataset.answer = state;
    this.answer.value.textContent = { preview: "release to ask", asking: "…", found: "✓ found", lost: "✗ lost" }[state];
    const said = () => `wanted “${expect}”, written “${visible(text)}”`;
    this.answer.more.textContent = text === undefined ? `Generate asks for “${expect}”.` : said();
  }
}

// Bytes while text is written: what is allocated against what a dense cache would take.
class CacheBytes {
  constructor(store, parent) {
    this.store = store;
    this.box = el(parent, "section", "mod-curve");
    this.plots = el(this.box, "div", "mod-plots");
    this.look = el(this.box, "p", "mod-note mod-look");
    this.observer = new ResizeObserver(() => store.update());
    this.observer.observe(this.plots);
  }

  destroy() { this.observer.disconnect(); }

  draw() {
    const { store } = this, { written } = store, width = this.plots.clientWidth;
    const { tokens = [], kv_bytes: kv, dense_bytes: dense } = written;
    this.box.hidden = tokens.length < 2;
    const key = [width, store.theme.key].join();
    if (this.box.hidden || width < 120 || (key === this.drawnFor && written === this.drawnOf)) return;
    this.drawnFor = key;
    this.drawnOf = written; // another text may be as long
    this.plots.replaceChildren();
    const y = [0, Math.max(...dense, ...kv) * 1.08], x = [tokens[0], tokens.at(-1)], says = `${byteText(kv.at(-1))} of ${byteText(dense.at(-1))}`;
    const plot = new Plot(this.plots, "K/V bytes", { width, height: 128, left: 64, right: 14, top: 24, bottom: 36 }, x, y);
    plot.frame(byteTicks(...y, 3), byteText, ticks(...x, 5), (v) => v.toLocaleString("en"), "tokens in the cache");
    plot.line(tokens.map((n, i) => [n, dense[i]]), "mod-reference-line mod-hollow-line");
    plot.line(tokens.map((n, i) => [n, kv[i]]), "mod-line");
    plot.text(plot.end, 14, says, "mod-here-text", "end");
    plot.svg.setAttribute("aria-label", `K/V bytes: ${says} of a dense cache after ${x[1]} tokens`);
    this.look.textContent = "Look at how far the solid line stays under the dashed one, a dense cache's; it falls where what faded is swept out.";
  }
}

// Heads by the name that what they keep gives them; a click shows the figures behind the name, and colours the text.
class HeadNames {
  constructor(store, parent) {
    this.store = store;
    this.box = el(parent, "section", "modlab-heads");
    el(this.box, "h3", "", `What each ${store.several ? "KV head" : "layer"} keeps`);
    this.groups = el(this.box, "div", "mod-head-groups");
    el(this.box, "p", "mod-note mod-look",
      "Look for the few that keep everything. A name is a reading of this text: click one for the figures behind it."
      + (store.several ? " 6.2 is KV head 2 of layer 6; both are counted from 0." : ""));
    this.proof = el(this.box, "div", "modlab-head-proof");
    this.proof.setAttribute("aria-live", "polite");
  }

  chosen() {
    const { store } = this, { textLayer: layer, textHead: head } = store;
    if (layer < 0 || (store.several && head < 0)) return null;
    return store.model.get("heads").find((h) => h.layer === layer && h.head === Math.max(0, head)) || null;
  }

  draw() {
    const { store } = this, heads = store.model.get("heads"), chosen = this.chosen();
    if (heads === this.heads && chosen === this.shown) return;
    if (heads !== this.heads) { this.heads = heads; this.list(heads); }
    this.shown = chosen;
    for (const [head, chip] of this.chips) chip.setAttribute("aria-pressed", String(head === chosen));
    this.prove(chosen);
  }

  list(heads) {
    const { store } = this, groups = new Map();
    for (const head of heads) groups.set(head.name, [...(groups.get(head.name) || []), head]);
    this.chips = [];
    this.groups.replaceChildren();
    const first = (name) => name === "everything"; // what one is told to look for is not below the others
    for (const [name, members] of [...groups].sort((a, b) => first(b[0]) - first(a[0]) || b[1].length - a[1].length)) {
      const row = el(this.groups, "div", "mod-head-group");
      el(row, "b", "", name);
      el(row, "span", "mod-note", `${members.length} of ${heads.length}`);
      for (const head of members) {
        const where = store.several ? `${head.layer}.${head.head}` : String(head.layer);
        const says = `layer ${head.layer}${store.several ? `, KV head ${head.head}` : ""}: ${name}, keeps ${percent(head.share)}`;
        const chip = button(row, where, says, () => this.choose(head));
        chip.classList.add("mod-chip");
        this.chips.push([head, chip]);
      }
    }
  }

  choose(head) {
    const { store } = this, again = this.chosen() === head;
    store.selectLayer(again ? -1 : head.layer, again || !store.several ? -1 : head.head);
  }

  prove(head) {
    this.proof.replaceChildren();
    if (!head) return;
    el(this.proof, "p", "", `Layer ${head.layer}${this.store.several ? `, KV head ${head.head}` : ""}: ${head.name}. ${head.says}`);
    const table = el(this.proof, "table", "mod-table"), top = el(el(table, "thead"), "tr"), body = el(table, "tbody");
    for (const title of ["kind of token", "of the text", "of what it keeps"]) el(top, "th", "", title);
    for (const kind of head.kinds.slice(0, 4)) {
      const tr = el(body, "tr");
      el(tr, "td", "", kind.name);
      el(tr, "td", "", percent(kind.text));
      el(tr, "td", "", percent(kind.kept));
    }
    const told = (list, at) => list.map(([token, kept, all]) => `${visible(token)} ${at ? all - kept : kept}/${all}`).join("  ") || "nothing";
    for (const [title, list, at] of [["keeps most often", head.keeps, 0], ["drops most often", head.drops, 1]]) {
      const line = el(this.proof, "p", "mod-note", `${title}: `);
      el(line, "span", "mod-code", told(list, at));
    }
  }
}

VIEWS.cache = {
  scene: CacheStore, title: "The cache", about,
  parts: () => [OwnText, CacheControls, [[CachePicture, TokenText], [CacheBytes, HeadNames]]],
};
