// What a threshold costs and buys: K/V bytes and loss against p, with a marker at the current p.
// uses: store

class Curve {
  constructor(store, parent) {
    this.store = store;
    this.box = el(parent, "section", "mod-curve");
    const head = el(this.box, "div", "mod-head");
    this.title = el(head, "h3", "", "What a threshold costs and buys");
    if (store.job) this.measure = button(head, "Measure the curve", "run the text at ten thresholds", () => store.job.ask({ type: "curve" }));
    this.plots = el(this.box, "div", "mod-plots");
    for (const name of ["points", "runs"]) store.listen("change:" + name, () => store.update());
    this.observer = new ResizeObserver(() => store.update());
    this.observer.observe(this.plots);
  }

  destroy() { this.observer.disconnect(); }

  draw() {
    const { store } = this, { model } = store, swept = model.get("points").length > 0;
    const points = [...(swept ? model.get("points") : model.get("runs") || [])].sort((a, b) => a.p - b.p);
    const width = this.plots.clientWidth, key = [width, store.stamp, model.get("runs")?.length, points.length, store.summary.run].join();
    if (width < 120 || key === this.drawnFor) return;
    this.drawnFor = key;
    this.plots.replaceChildren();
    this.title.textContent = swept ? "What a threshold costs and buys" : "Your runs so far";
    if (this.measure) this.measure.hidden = swept;
    if (points.length < 2) {
      el(this.plots, "p", "mod-note", "Every release of the slider at another threshold adds a point here; Measure the curve runs the text at ten.");
      return;
    }
    const each = width >= 560 ? (width - 24) / 2 : width;
    this.plot(points, each, "kv_bytes", "KV cache", byteText, true);
    this.plot(points, each, "loss", "loss, nats a token", (v) => v.toFixed(3), false);
  }

  plot(points, width, key, title, format, fromZero) {
    const { store } = this, p = store.threshold;
    const height = 190, left = 64, right = 14, top = 30, bottom = 38;
    const values = points.map((d) => d[key]);
    let low = fromZero ? 0 : Math.min(...values), high = Math.max(...values);
    const margin = (high - low || Math.abs(high) || 1) * 0.08;
    if (!fromZero) low -= margin;
    high += margin;
    const from = Math.min(points[0].p, p), to = Math.max(points[points.length - 1].p, p);
    const x = (v) => left + ((v - from) / (to - from || 1)) * (width - left - right);
    const y = (v) => height - bottom - ((v - low) / (high - low)) * (height - top - bottom);
    const svg = node(this.plots, "svg", { width, height, role: "img", class: "modlab-curve" });
    node(svg, "text", { x: left, y: 14, class: "mod-plot-title" }, title);
    for (const v of (fromZero ? byteTicks : ticks)(low, high, 4)) {
      node(svg, "line", { x1: left, x2: width - right, y1: y(v), y2: y(v), class: "mod-grid" });
      node(svg, "text", { x: left - 8, y: y(v) + 4, "text-anchor": "end", class: "mod-tick" }, fromZero ? byteText(v) : number(v));
    }
    for (const v of ticks(from, to, 6))
      node(svg, "text", { x: x(v), y: height - bottom + 16, "text-anchor": "middle", class: "mod-tick" }, number(v));
    node(svg, "text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle", class: "mod-tick" }, "threshold p");
    node(svg, "polyline", { points: points.map((d) => `${x(d.p)},${y(d[key])}`).join(" "), class: "mod-line" });
    for (const d of points) {
      const dot = node(svg, "circle", { cx: x(d.p), cy: y(d[key]), r: 3, class: "mod-dot" });
      node(dot, "title", {}, `p ${number(d.p)}: ${format(d[key])}`);
    }
    node(svg, "line", { x1: x(p), x2: x(p), y1: top - 6, y2: height - bottom, class: "mod-marker" });
    const at = interpolate(points, p, key);
    if (at !== null) node(svg, "circle", { cx: x(p), cy: y(at), r: 5, class: "mod-here" });
    const about = points.some((d) => d.p === p) ? "" : "≈ ";
    const says = at === null ? `p ${number(p)} lies outside the sweep` : `p ${number(p)}: ${about}${format(at)}`;
    node(svg, "text", { x: width - right, y: 14, "text-anchor": "end", class: "mod-here-text" }, says);
    svg.setAttribute("aria-label", `${title} against threshold. ${says}`);
  }
}

VIEWS.curve = { scene: Store, parts: () => [Curve] };
