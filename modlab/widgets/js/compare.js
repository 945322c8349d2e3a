// The same prompt continued at two thresholds, side by side; what differs is marked.
// uses: job figures beyond

class Compare {
  constructor(scene, parent) {
    this.scene = scene;
    const { model } = scene;
    const form = el(parent, "section", "mod-compare-form");
    const label = el(form, "label", "mod-prompt", "prompt");
    this.prompt = el(label, "textarea", "modlab-prompt");
    this.prompt.rows = 4;
    this.prompt.spellcheck = false;
    ownKeys(this.prompt);
    this.prompt.value = model.get("prompt");
    this.prompt.addEventListener("input", () => model.set("prompt", this.prompt.value));
    const bar = el(form, "div", "mod-controls");
    this.go = button(bar, "Generate", "Generate", () => this.ask());
    this.go.classList.add("modlab-generate", "mod-main");
    const length = el(bar, "label", "mod-field", "new tokens ");
    this.length = el(length, "input", "modlab-new-tokens");
    Object.assign(this.length, { type: "number", min: 1, step: 1, value: model.get("max_new_tokens") });
    ownKeys(this.length);
    this.length.addEventListener("change", () => {
      if (this.length.checkValidity() && this.length.value) model.set("max_new_tokens", Number(this.length.value));
    });
    this.beyond = new Beyond(scene, parent);
    this.job = new Job(scene, parent);
    el(parent, "p", "mod-note mod-look", "Look for the first token that differs, and for what the smaller cache is paid with after it.");
    this.sum = el(parent, "p", "modlab-compare-sum");
    this.sum.setAttribute("aria-live", "polite");
    const columns = el(parent, "section", "mod-columns");
    this.columns = [0, 1].map((i) => this.column(columns, i));
    for (const name of ["sides", "ps", "prompt", "max_new_tokens"]) scene.listen("change:" + name, () => scene.update());
    for (const part of parent.querySelectorAll("textarea, .modlab-generate, .modlab-new-tokens, .modlab-side-p"))
      part.disabled = !model.get("can_run");
  }

  destroy() { this.job.destroy(); }

  column(parent, i) {
    const { model } = this.scene, box = el(parent, "div", "mod-column");
    const label = el(box, "label", "mod-slider", "p"), slider = el(label, "input", "modlab-side-p");
    // Thresholds of real models lie close to 0 or 1: there the slider goes by order of magnitude.
    const close = model.get("ps").some((p) => p < 0.01 || p > 0.99);
    const from = close ? (p) => Math.log(p / (1 - p)) : (p) => p, to = close ? (z) => 1 / (1 + Math.exp(-z)) : (p) => p;
    Object.assign(slider, { type: "range", ...(close ? { min: -14, max: 14, step: 0.05 } : { min: 0.01, max: 0.99, step: 0.01 }) });
    slider.setAttribute("aria-label", `threshold p of the ${i ? "right" : "left"} side`);
    ownKeys(slider);
    slider.addEventListener("input", () => model.set("ps", model.get("ps").map((p, k) => (k === i ? to(Number(slider.value)) : p))));
    const value = el(label, "output", "modlab-p"), figures = el(box, "div", "mod-figures");
    const kv = figure(figures, "KV cache", "modlab-side-kv"), speed = figure(figures, "speed", "modlab-side-speed");
    const bar = el(kv.box, "div", "mod-bar"), filled = el(bar, "i"), text = el(box, "div", "modlab-side-text");
    text.tabIndex = 0;
    ownKeys(text);
    text.setAttribute("role", "group");
    return { slider, from, value, figures, kv, speed, bar, filled, text, note: el(box, "p", "mod-note") };
  }

  ask() {
    const { model } = this.scene;
    this.job.ask({ type: "generate", prompt: model.get("prompt"), ps: model.get("ps"), max_new_tokens: model.get("max_new_tokens") });
  }

  draw() {
    const { model } = this.scene, sides = model.get("sides"), ps = model.get("ps"), prompt = model.get("prompt");
    if (document.activeElement !== this.prompt && this.prompt.value !== prompt) this.prompt.value = prompt;
    this.job.draw();
    this.beyond.draw(ps);
    this.go.disabled = !model.get("can_run") || this.job.running;
    this.columns.forEach((column, i) => {
      if (document.activeElement !== column.slider) column.slider.value = column.from(ps[i]);
      column.value.textContent = chance(ps[i]);
      const side = sides[i], fresh = side && side.p === ps[i] && side.prompt === prompt;
      column.text.dataset.state = fresh || !side ? "measured" : "preview";
      if (side !== column.shown) { column.shown = side; this.write(column, side); this.count(column, side); }
      column.note.textContent = !side ? "Nothing generated yet."
        : `${side.pieces.length} tokens at p ${chance(side.p)}${side.done ? "" : " …"}`
          + (fresh ? "" : ". Generate again for the present settings.");
    });
    this.sum.textContent = this.sentence(sides);
  }

  write(column, side) {
    column.text.replaceChildren();
    if (!side) return;
    el(column.text, "span", "mod-given", side.prompt.slice(-200));
    side.pieces.forEach((piece, t) => {
      const span = el(column.text, side.same[t] ? "span" : "mark", side.same[t] ? "" : "mod-differs", piece);
      if (!side.same[t] && piece.includes("\n")) span.classList.add("mod-newline");
    });
    const differ = side.same.filter((s) => !s).length;
    column.text.setAttribute("aria-label", `Continuation at p ${chance(side.p)}, ${differ} of ${side.pieces.length} tokens differ`);
  }

  // What the side takes so far: bytes against those of a dense cache, and how fast it is written.
  count({ figures, kv, speed, bar, filled }, side) {
    figures.hidden = !side;
    if (!side) return;
    const { kv_bytes: stored, dense_bytes: dense, tokens_per_s: rate, first_s: first } = side;
    figures.dataset.state = side.done ? "measured" : "preview";
    kv.value.textContent = dense ? byteText(stored) : "–";
    kv.more.textContent = dense ? `of ${byteText(dense)} dense, ${gain(dense / stored, "smaller", "larger")}` : "";
    bar.hidden = !dense;
    filled.style.width = `${Math.min(100, (100 * stored) / (dense || 1))}%`;
    speed.value.textContent = rate ? `${rate.toFixed(1)} tok/s` : "–";
    speed.more.textContent = first ? `first token ${milliseconds(1000 * first)}` : "";
  }

  sentence(sides) {
    if (sides.length < 2) return "";
    const [a, b] = sides, count = Math.min(a.pieces.length, b.pieces.length);
    let first = 0;
    while (first < count && a.pieces[first] === b.pieces[first]) first++;
    const differ = a.same.filter((s) => !s).length;
    if (!differ && a.pieces.length === b.pieces.length) return `Both continuations are the same ${a.pieces.length} tokens.`;
    return `The first ${first} tokens agree; in all, ${differ} of ${a.pieces.length} on the left differ (marked).`;
  }
}

VIEWS.compare = { scene: Scene, title: "Side by side", about: (scene) => scene.model.get("summary").model, parts: () => [Compare] };
