// Loss against what it buys (bytes or milliseconds). The chosen point is dragged along the line; its p is the threshold.
// uses: job plot

const METRICS = {
  kv_bytes: ["KV cache", byteText],
  prefill_ms: ["time to the first token", milliseconds],
  decode_ms: ["time for a further token", milliseconds],
};

class Frontier {
  constructor(scene, parent) {
    this.scene = scene;
    const { model } = scene, head = el(parent, "div", "mod-head");
    const label = el(head, "label", "mod-choice", "loss against ");
    this.choice = el(label, "select");
    ownKeys(this.choice);
    this.metrics = { ...METRICS };
    for (const other of model.get("elsewhere")) this.metrics[other.metric] = [other.title, milliseconds, other.note];
    for (const [name, [title]] of Object.entries(this.metrics))
      if (model.get("points").every((d) => Number.isFinite(d[name]))) el(this.choice, "option", "", title).value = name;
    this.choice.value = model.get("metric");
    this.choice.addEventListener("change", () => model.set("metric", this.choice.value));
    this.badge = el(head, "span", "modlab-badge");
    this.badge.setAttribute("role", "status");
    this.job = new Job(scene, parent);
    this.says = el(parent, "p", "modlab-frontier-says");
    this.says.setAttribute("aria-live", "polite");
    this.plot = el(parent, "div", "mod-frontier");
    this.note = el(parent, "p", "mod-note modlab-frontier-note");
    for (const name of ["threshold", "applied", "metric", "points", "references"]) scene.listen("change:" + name, () => scene.update());
    this.plot.addEventListener("pointerdown", (e) => {
      if (e.button !== 0 || !e.target.closest("svg")) return;
      this.dragging = true;
      this.plot.setPointerCapture(e.pointerId);
      this.drag(e);
      e.preventDefault();
      this.handle?.focus({ preventScroll: true });
    });
    this.plot.addEventListener("pointermove", (e) => { if (this.dragging) this.drag(e); });
    this.plot.addEventListener("pointerup", () => { if (this.dragging) { this.dragging = false; this.release(); } });
    this.observer = new ResizeObserver(() => scene.update());
    this.observer.observe(this.plot);
  }

  destroy() { this.observer.disconnect(); this.job.destroy(); clearTimeout(this.timer); }

  get points() { return this.scene.model.get("points"); }

  // The place on the line nearest to the mouse.
  drag(event) {
    const r = this.plot.getBoundingClientRect(), mx = event.clientX - r.left, my = event.clientY - r.top, { x, y, metric } = this.frame;
    let best = null;
    const look = (px, py, p) => { const d = (px - mx) ** 2 + (py - my) ** 2; if (!best || d < best.d) best = { d, p }; };
    this.points.forEach((b, i) => {
      const bx = x(b[metric]), by = y(b.loss), a = this.points[i - 1];
      if (!a) return look(bx, by, b.p);
      const ax = x(a[metric]), ay = y(a.loss), dx = bx - ax, dy = by - ay;
      const f = clamp(((mx - ax) * dx + (my - ay) * dy) / (dx * dx + dy * dy || 1), 0, 1);
      look(ax + f * dx, ay + f * dy, Number((a.p + f * (b.p - a.p)).toFixed(3)));
    });
    if (best) this.scene.model.set("threshold", this.legal(best.p));
  }

  legal(p) { return clamp(p, Math.max(0.0001, this.points[0].p), Math.min(0.9999, this.points[this.points.length - 1].p)); }

  key(event) {
    const now = this.scene.model.get("threshold"), ps = this.points.map((d) => d.p);
    const to = {
      ArrowRight: now + 0.01, ArrowUp: now + 0.01, ArrowLeft: now - 0.01, ArrowDown: now - 0.01,
      PageUp: ps.find((p) => p > now + 1e-9) ?? now, PageDown: [...ps].reverse().find((p) => p < now - 1e-9) ?? now,
      Home: ps[0], End: ps[ps.length - 1],
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    this.scene.model.set("threshold", Number(this.legal(to).toFixed(4)));
    this.release();
  }

  release() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.scene.save();
      if (this.scene.model.get("can_run")) this.job.ask({ type: "set", p: this.scene.model.get("threshold") });
    }, 200);
  }

  draw() {
    const { model, theme } = this.scene, { points } = this, metric = model.get("metric"), p = model.get("threshold");
    const width = this.plot.clientWidth, references = model.get("references").filter((d) => Number.isFinite(d[metric]));
    this.job.draw();
    const set = model.get("applied");
    this.badge.dataset.state = set === p ? "measured" : "preview";
    this.badge.textContent = !model.get("can_run") ? "chosen" : set === p ? "set in the model" : "not set yet";
    if (width < 160) return;
    const [title, format, note] = this.metrics[metric], at = this.place(p, metric), exact = points.some((d) => d.p === p);
    this.says.textContent = `p ${number(p)}: ${exact ? "" : "≈ "}loss ${at.loss.toFixed(3)} nats a token, ${title} ${format(at[metric])}, `
      + `keeps ${percent(at.keep_ratio)}` + this.versus(at, metric, references);
    this.note.hidden = !note;
    this.note.textContent = note || "";
    const key = [width, p, metric, theme.key, points.length, JSON.stringify(references)].join();
    if (key === this.drawnFor) return;
    const focused = this.handle && document.activeElement === this.handle;
    this.drawnFor = key;
    this.plot.replaceChildren();
    const height = 330, left = 62, right = 26, top = 16, bottom = 46, all = [...points, ...references];
    const [x0, x1] = span(all.map((d) => d[metric])), [y0, y1] = span(all.map((d) => d.loss), LEAST_LOSS);
    const x = (v) => left + ((v - x0) / (x1 - x0)) * (width - left - right);
    const y = (v) => height - bottom - ((v - y0) / (y1 - y0)) * (height - top - bottom);
    this.frame = { x, y, metric };
    const svg = node(this.plot, "svg", { width, height, class: "modlab-frontier" });
    for (const v of ticks(y0, y1, 5)) {
      node(svg, "line", { x1: left, x2: width - right, y1: y(v), y2: y(v), class: "mod-grid" });
      node(svg, "text", { x: left - 8, y: y(v) + 4, "text-anchor": "end", class: "mod-tick" }, number(v));
    }
    const middle = { "text-anchor": "middle" }, named = { ...middle, class: "mod-plot-title" };
    for (const v of (metric === "kv_bytes" ? byteTicks : ticks)(x0, x1, Math.max(3, Math.floor(width / 130))))
      node(svg, "text", { x: x(v), y: height - bottom + 18, ...middle, class: "mod-tick" }, format(v));
    node(svg, "text", { x: (left + width - right) / 2, y: height - 6, ...named }, `${title}  (left is better)`);
    const turned = { transform: `translate(13 ${(height - bottom + top) / 2}) rotate(-90)` };
    const side = node(svg, "text", { ...turned, ...named }, "loss, nats a token  (lower is better)");
    side.setAttribute("aria-hidden", "true");
    node(svg, "polyline", { points: points.map((d) => `${x(d[metric])},${y(d.loss)}`).join(" "), class: "mod-line" });
    let labelled = [];
    for (const d of points) {
      const px = x(d[metric]), py = y(d.loss), dot = node(svg, "circle", { cx: px, cy: py, r: 4, class: "mod-dot" });
      node(dot, "title", {}, `p ${number(d.p)}: loss ${d.loss.toFixed(3)}, ${title} ${format(d[metric])}`);
      if (labelled.some(([a, b]) => Math.abs(a - px) < 40 && Math.abs(b - py) < 14)) continue;
      labelled.push([px, py]);
      node(svg, "text", { x: px + 8, y: py - 8, class: "mod-tick" }, `p ${number(d.p)}`);
    }
    for (const d of references) {
      const px = x(d[metric]), py = y(d.loss), end = px > width - 160;
      node(svg, "path", { d: `M ${px} ${py - 6} l 6 6 l -6 6 l -6 -6 z`, class: "mod-reference" });
      node(svg, "text", { x: px + (end ? -10 : 10), y: py + 4, "text-anchor": end ? "end" : "start", class: "mod-here-text" }, d.name);
    }
    const hx = x(at[metric]), hy = y(at.loss);
    node(svg, "line", { x1: hx, x2: hx, y1: hy, y2: height - bottom, class: "mod-marker" });
    node(svg, "line", { x1: left, x2: hx, y1: hy, y2: hy, class: "mod-marker" });
    this.handle = node(svg, "circle", { cx: hx, cy: hy, r: 9, class: "mod-handle", tabindex: 0, role: "slider", "aria-label": "chosen threshold p",
      "aria-valuemin": points[0].p, "aria-valuemax": points[points.length - 1].p, "aria-valuenow": p, "aria-valuetext": this.says.textContent });
    ownKeys(this.handle);
    this.handle.addEventListener("keydown", (e) => this.key(e));
    if (focused) this.handle.focus({ preventScroll: true });
  }

  versus(at, metric, references) {
    const base = references.find((d) => d.name.startsWith("dense"));
    if (!base) return ".";
    const loss = at.loss - base.loss;
    return `; against ${base.name}: ${(base[metric] / at[metric]).toFixed(2)}x ${metric === "kv_bytes" ? "smaller" : "faster"}, `
      + `loss ${loss < 0 ? "−" : "+"}${Math.abs(loss).toFixed(3)}.`;
  }

  // Every column at p: between its neighbours, straight.
  place(p, metric) {
    const { points } = this, found = {}, end = points[p < points[0].p ? 0 : points.length - 1];
    for (const name of ["loss", "keep_ratio", metric]) found[name] = interpolate(points, p, name) ?? end[name];
    return found;
  }
}

VIEWS.frontier = { scene: Scene, title: "What it costs and buys", about: (scene) => scene.model.get("summary").model, parts: () => [Frontier] };
