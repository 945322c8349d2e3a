// What each operating point loses, against what it takes in memory and in time: two curves with one point, which is
// dragged along either. On the sweep of this machine its p is the threshold; on a real model's line it is read.
// uses: job plot beyond

const UNITS = { bytes: byteText, ms: milliseconds, share: percent, nats: (v) => v.toFixed(3) };
const TWO = 620; // CSS pixels from which on the two curves lie next to each other

class Frontier {
  constructor(scene, parent) {
    this.scene = scene;
    const { model } = scene, head = el(parent, "div", "mod-head");
    this.from = this.select(head, "modlab-frontier-from", "axes from", (value) => this.show(Number(value)));
    this.ofQuality = this.select(head, "modlab-frontier-quality", "lost:", (value) => model.set("quality", value));
    this.ofTime = this.select(head, "modlab-frontier-time", "time:", (value) => model.set("time", value));
    this.badge = el(head, "span", "modlab-badge");
    this.badge.setAttribute("role", "status");
    this.job = new Job(scene, parent);
    this.says = el(parent, "p", "modlab-frontier-says");
    this.says.setAttribute("aria-live", "polite");
    this.beyond = new Beyond(scene, parent);
    this.box = el(parent, "div", "mod-frontier");
    this.panels = [0, 1].map((i) => new FrontierPanel(this, this.box, i));
    this.note = el(parent, "p", "mod-note mod-look modlab-frontier-note");
    for (const name of ["threshold", "saving", "applied", "line", "quality", "time", "lines"])
      scene.listen("change:" + name, () => scene.update());
    this.observer = new ResizeObserver(() => scene.update());
    this.observer.observe(this.box);
  }

  destroy() { this.observer.disconnect(); this.job.destroy(); clearTimeout(this.timer); }

  select(parent, cls, name, act) {
    const label = el(parent, "label", "mod-choice", `${name} `), choice = el(label, "select", cls);
    ownKeys(choice);
    choice.addEventListener("change", () => { act(choice.value); this.scene.save(); });
    return { label, choice };
  }

  // Options are [value, text]; one alone is no choice.
  fill({ label, choice }, options, value) {
    const key = JSON.stringify(options);
    if (choice.dataset.options !== key) {
      choice.dataset.options = key;
      choice.replaceChildren(...options.map(([v, text]) => new Option(text, v)));
    }
    choice.value = value;
    label.hidden = options.length < 2;
  }

  show(index) {
    this.scene.model.set("line", index);
    this.scene.model.set("quality", "");
    this.scene.model.set("time", "");
  }

  get line() { const { model } = this.scene; return model.get("lines")[model.get("line")]; }
  get at() { return this.scene.model.get(this.line.dial); }
  get live() { return this.line.dial === "threshold" && this.scene.model.get("can_run"); }
  get quality() { return this.axis(this.line.qualities, "quality"); }
  get memory() { return this.line.costs.find((axis) => axis.unit !== "ms"); }
  get time() { return this.axis(this.line.costs.filter((axis) => axis.unit === "ms"), "time"); }

  axis(axes, trait) { return axes.find((axis) => axis.key === this.scene.model.get(trait)) || axes[0]; }

  choose(at) { this.scene.model.set(this.line.dial, this.legal(at)); }

  legal(at) {
    const { points } = this.line;
    return clamp(at, points[0].at, Math.min(points[points.length - 1].at, this.line.dial === "threshold" ? 0.9999 : Infinity));
  }

  // How the dial is called at a value.
  dialText(at) { return this.line.dial === "threshold" ? `p ${chance(at)}` : `${number(Number(at.toPrecision(3)))}x`; }

  // An arrow key goes a fifth of the way between two measured points, a page key to the next one.
  key(event) {
    const now = this.at, places = this.line.points.map((d) => d.at);
    const up = places.find((p) => p > now + 1e-9), down = places.findLast((p) => p < now - 1e-9);
    const step = (to, from) => (to === undefined ? now : now + (to - from) / 5);
    const right = () => step(up, places.findLast((p) => p <= now + 1e-9));
    const left = () => step(down, places.find((p) => p >= now - 1e-9));
    const go = {
      ArrowRight: right, ArrowUp: right, ArrowLeft: left, ArrowDown: left, PageUp: () => up ?? now, PageDown: () => down ?? now,
      Home: () => places[0], End: () => places[places.length - 1],
    }[event.key];
    if (!go) return;
    event.preventDefault();
    event.stopPropagation();
    const to = go();
    this.choose(places.includes(to) ? to : Number(to.toPrecision(4)));
    this.release();
  }

  release() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.scene.save();
      if (this.live) this.job.ask({ type: "set", p: this.scene.model.get("threshold") });
    }, 200);
  }

  draw() {
    const { model } = this.scene, { line, at, quality, memory, time } = this, lines = model.get("lines");
    this.fill(this.from, lines.map(({ name }, i) => [String(i), name]), String(model.get("line")));
    this.fill(this.ofQuality, line.qualities.map(({ key, title }) => [key, title]), quality.key);
    this.fill(this.ofTime, line.costs.filter((axis) => axis.unit === "ms").map(({ key, title }) => [key, title]), time?.key);
    this.job.draw();
    this.beyond.draw(line.dial === "threshold" ? [at] : [0]);
    const set = this.live && model.get("applied") === at;
    this.badge.dataset.state = set ? "measured" : "preview";
    this.badge.textContent = this.live ? (set ? "set in the model" : "not set yet") : line.dial === "saving" ? "as published" : "chosen";
    this.says.textContent = this.sentence();
    const note = [line.note, time?.note, time ? "" : "No time was measured for this."].filter(Boolean).join(" ");
    this.note.hidden = !note;
    this.note.textContent = note;
    const width = this.box.clientWidth, two = width >= TWO && Boolean(time);
    if (width < 160) return;
    this.panels[0].draw(memory, two ? (width - 20) / 2 : width);
    this.panels[1].draw(time, two ? (width - 20) / 2 : width);
  }

  // Every column at the dial: between its neighbours, straight.
  place() {
    const { line: { points }, at, quality, memory, time } = this, found = {}, end = points[at < points[0].at ? 0 : points.length - 1];
    const low = points.findIndex((d) => d.at >= at), b = points[low] || end, a = points[low - 1] || b;
    const f = b.at === a.at ? 0 : clamp((at - a.at) / (b.at - a.at), 0, 1);
    for (const key of ["keep_ratio", quality.key, memory.key, time?.key].filter(Boolean)) found[key] = a[key] + f * (b[key] - a[key]);
    return found;
  }

  sentence() {
    const { line, at, quality, memory, time } = this, here = this.place(), exact = line.points.some((d) => d.at === at);
    const told = [memory, time, quality].filter(Boolean).map(({ key, title, unit }) => `${title} ${UNITS[unit](here[key])}`);
    if (Number.isFinite(here.keep_ratio)) told.push(`keeps ${percent(here.keep_ratio)}`);
    return `${this.dialText(at)}: ${exact ? "" : "≈ "}${told.join(" · ")}${this.versus(here)}.`;
  }

  versus(here) {
    const { line, quality, memory, time } = this, base = line.references.find((d) => d.name.startsWith("dense")), gains = [];
    if (!base) return "";
    for (const [axis, ...words] of [[memory, "smaller", "larger"], [time, "faster", "slower"]])
      if (axis && Number.isFinite(base[axis.key])) gains.push(gain(base[axis.key] / here[axis.key], ...words));
    const lost = here[quality.key] - base[quality.key];
    if (base[quality.key]) gains.push(`${lost < 0 ? "−" : "+"}${UNITS[quality.unit](Math.abs(lost))}`);
    return gains.length ? `; against ${base.name}: ${gains.join(", ")}` : "";
  }
}

// One of the two curves: what is lost over one cost.
class FrontierPanel {
  constructor(frontier, parent, index) {
    this.frontier = frontier;
    this.first = index === 0;
    this.box = el(parent, "div", "mod-frontier-panel");
    this.box.addEventListener("pointerdown", (e) => {
      if (e.button !== 0 || !e.target.closest("svg")) return;
      this.dragging = true;
      this.box.setPointerCapture(e.pointerId);
      this.drag(e);
      e.preventDefault();
      this.handle?.focus({ preventScroll: true });
    });
    this.box.addEventListener("pointermove", (e) => { if (this.dragging) this.drag(e); });
    this.box.addEventListener("pointerup", () => { if (this.dragging) { this.dragging = false; frontier.release(); } });
  }

  // The place on the line nearest to the mouse.
  drag(event) {
    const r = this.box.getBoundingClientRect(), mx = event.clientX - r.left, my = event.clientY - r.top, { x, y, cost, lost } = this.frame;
    let best = null;
    const look = (px, py, at) => { const d = (px - mx) ** 2 + (py - my) ** 2; if (!best || d < best.d) best = { d, at }; };
    this.frontier.line.points.forEach((b, i, points) => {
      const bx = x(b[cost]), by = y(b[lost]), a = points[i - 1];
      if (!a) return look(bx, by, b.at);
      const ax = x(a[cost]), ay = y(a[lost]), dx = bx - ax, dy = by - ay;
      const f = clamp(((mx - ax) * dx + (my - ay) * dy) / (dx * dx + dy * dy || 1), 0, 1);
      look(ax + f * dx, ay + f * dy, f === 1 ? b.at : Number((a.at + f * (b.at - a.at)).toPrecision(4)));
    });
    if (best) this.frontier.choose(best.at);
  }

  draw(axis, width) {
    const { frontier } = this, { line, at, quality } = frontier, { theme } = frontier.scene;
    this.box.hidden = !axis;
    const key = axis && [width, at, axis.key, quality.key, theme.key].join();
    if (!axis || (key === this.drawnFor && line === this.drawnLine)) return;
    this.drawnFor = key;
    this.drawnLine = line; // the object, not its name: new lines may have the names of those before
    const focused = this.handle && document.activeElement === this.handle;
    this.box.replaceChildren();
    this.box.style.width = `${width}px`;
    const cost = axis.key, lost = quality.key, here = frontier.place(), form = UNITS[axis.unit], { points } = line;
    const references = line.references.filter((d) => Number.isFinite(d[cost]) && Number.isFinite(d[lost]));
    const height = 290, left = 56, right = 22, top = 18, bottom = 46, all = [...points, ...references];
    const least = line.dial === "threshold" ? LEAST_LOSS : 0.02;
    const [x0, x1] = span(all.map((d) => d[cost])), [y0, y1] = span(all.map((d) => d[lost]), least);
    const x = (v) => left + ((v - x0) / (x1 - x0)) * (width - left - right);
    const y = (v) => height - bottom - ((v - y0) / (y1 - y0)) * (height - top - bottom);
    this.frame = { x, y, cost, lost };
    const svg = node(this.box, "svg", { width, height, class: "modlab-frontier" }), middle = { "text-anchor": "middle" };
    for (const v of ticks(y0, y1, 5)) {
      node(svg, "line", { x1: left, x2: width - right, y1: y(v), y2: y(v), class: "mod-grid" });
      node(svg, "text", { x: left - 8, y: y(v) + 4, "text-anchor": "end", class: "mod-tick" }, quality.unit === "share" ? percent(v) : number(v));
    }
    for (const v of (axis.unit === "bytes" ? byteTicks : ticks)(x0, x1, Math.max(3, Math.floor(width / 130))))
      node(svg, "text", { x: x(v), y: height - bottom + 18, ...middle, class: "mod-tick" }, form(v));
    const title = `${axis.title.split(":")[0]}  (left is better)`;
    node(svg, "text", { x: (left + width - right) / 2, y: height - 6, ...middle, class: "mod-plot-title" }, title);
    node(svg, "text", { x: left - 48, y: 11, class: "mod-plot-title" }, `${quality.title}  (down is better)`);
    node(svg, "polyline", { points: points.map((d) => `${x(d[cost])},${y(d[lost])}`).join(" "), class: "mod-line" });
    const labelled = [];
    for (const d of points) {
      const px = x(d[cost]), py = y(d[lost]), dot = node(svg, "circle", { cx: px, cy: py, r: 4, class: "mod-dot" });
      node(dot, "title", {}, `${frontier.dialText(d.at)}: ${quality.title} ${UNITS[quality.unit](d[lost])}, ${axis.title} ${form(d[cost])}`);
      if (labelled.some(([a, b]) => Math.abs(a - px) < 44 && Math.abs(b - py) < 14)) continue;
      labelled.push([px, py]);
      node(svg, "text", { x: px + 8, y: py - 8, class: "mod-tick" }, frontier.dialText(d.at));
    }
    for (const d of references) {
      const px = x(d[cost]), py = y(d[lost]), end = px > width - 160;
      node(svg, "path", { d: `M ${px} ${py - 6} l 6 6 l -6 6 l -6 -6 z`, class: "mod-reference" });
      node(svg, "text", { x: px + (end ? -10 : 10), y: py + 4, "text-anchor": end ? "end" : "start", class: "mod-here-text" }, d.name);
    }
    const hx = x(here[cost]), hy = y(here[lost]);
    node(svg, "line", { x1: hx, x2: hx, y1: hy, y2: height - bottom, class: "mod-marker" });
    node(svg, "line", { x1: left, x2: hx, y1: hy, y2: hy, class: "mod-marker" });
    const name = line.dial === "threshold" ? "chosen threshold p" : "chosen KV saving";
    // One stop of the Tab key: the point of the other curve is the same one.
    this.handle = node(svg, "circle", { cx: hx, cy: hy, r: 9, class: "mod-handle", tabindex: this.first ? 0 : -1, role: "slider", "aria-label": name,
      "aria-valuemin": points[0].at, "aria-valuemax": points[points.length - 1].at, "aria-valuenow": at, "aria-valuetext": frontier.sentence() });
    ownKeys(this.handle);
    this.handle.addEventListener("keydown", (e) => frontier.key(e));
    if (focused) this.handle.focus({ preventScroll: true });
  }
}

VIEWS.frontier = { scene: Scene, title: "What it costs and buys", about: (scene) => scene.model.get("summary").model, parts: () => [Frontier] };
