// What a threshold costs and buys: K/V bytes, loss and far recall against p, with a marker at the current p.
// uses: store plot beyond

const LEAST_LOST = 0.01; // nats: less is no loss that a reader would notice

class Curve {
  constructor(store, parent) {
    this.store = store;
    this.box = el(parent, "section", "mod-curve");
    const head = el(this.box, "div", "mod-head");
    this.title = el(head, "h3", "", "What a threshold costs and buys");
    this.place = el(this.box, "div");
    const ask = () => store.job.ask({ type: "curve" }, this.place);
    if (store.job) this.measure = button(head, "Measure the curve", "run the text at some ten thresholds", ask);
    this.plots = el(this.box, "div", "mod-plots");
    for (const name of ["points", "runs", "job"]) store.listen("change:" + name, () => store.update());
    this.observer = new ResizeObserver(() => store.update());
    this.observer.observe(this.plots);
  }

  destroy() { this.observer.disconnect(); }

  draw() {
    const { store } = this, { model } = store, swept = model.get("points").length > 0;
    const points = [...(swept ? model.get("points") : model.get("runs") || [])].sort((a, b) => a.p - b.p);
    if (this.measure) {
      this.measure.hidden = swept;
      this.measure.disabled = store.job.running || !model.get("can_run");
    }
    const width = this.plots.clientWidth, key = [width, store.stamp, store.summary.run].join();
    const of = [model.get("points"), model.get("runs")]; // the lists, not their lengths: new points may be as many
    if (width < 120 || (key === this.drawnFor && of.every((list, i) => list === this.drawnOf[i]))) return;
    this.drawnFor = key;
    this.drawnOf = of;
    this.plots.replaceChildren();
    this.title.textContent = swept ? "What a threshold costs and buys" : "Your runs so far";
    if (points.length < 2) {
      el(this.plots, "p", "mod-note mod-look",
        "Every release of the slider at another threshold adds a point here; Measure the curve runs the text at some ten.");
      return;
    }
    const { summary } = store, far = points.every((d) => Number.isFinite(d.recall)), nats = (v) => v.toFixed(3);
    const wanted = [["kv_bytes", "KV cache", byteText, null], ["loss", "loss, nats a token", nats, reference(summary, "loss")]];
    if (far) wanted.push(["recall", "loss on repeated passages", nats, reference(summary, "recall")]);
    this.narrow = width < 560; // one below the other: the lowest has the scale of all
    wanted.forEach((what, i) => this.plot(points, this.narrow ? width : (width - 24) / 2, !this.narrow || i === wanted.length - 1, ...what));
    if (points.some((d) => untrained(store, d.p)))
      el(this.plots, "p", "mod-note modlab-untrained", "Hollow points: thresholds beyond the largest saving that the routers were trained for.");
    if (!far) return;
    el(this.plots, "p", "modlab-breaks", this.breaks(points));
    el(this.plots, "p", "mod-note mod-look", "Look for where the last curve leaves its dashed line: two passages of the text come "
      + "again after its end, and what the cache lost of them the mean loss hides. Bars: standard error; clearly: by more than two.");
  }

  // In one sentence: how small the cache may be until passages that come again are predicted worse, beyond the error.
  breaks(points) {
    const { summary, byRatio } = this.store, base = reference(summary, "recall");
    if (!base) return "";
    const worse = (d) => d.recall - base.value > Math.max(2 * (d.recall_stderr || 0), LEAST_LOST);
    const found = points.findIndex(worse), first = found < 0 ? points.length : found, held = points[first - 1];
    const kept = (d) => (byRatio ? `one in ${number(Number((1 / d.keep_ratio).toPrecision(2)))} kept` : `p ${chance(d.p)}`);
    const saving = (d) => (summary.dense_bytes / d.kv_bytes).toFixed(2), nats = (d) => `${(d.recall - base.value).toFixed(3)} nats`;
    const at = (d, smaller = "") => `${saving(d)}x${smaller} (${kept(d)})`;
    const all = points.slice(first).every(worse);
    if (!held) return `Repeated passages: clearly worse at ${all ? "every threshold here" : `${at(points[0])} already`}.`;
    const most = Math.max(...points.slice(0, first).map((d) => d.recall - base.value));
    const holds = `Repeated passages: up to ${at(held, " smaller")} ${most > 0.0005 ? `at most ${most.toFixed(3)} nats` : "no"} worse`;
    if (!points[first]) return `${holds}, and no more was measured.`;
    const breaks = `clearly worse ${all ? "from" : "at"} ${at(points[first])}${all ? " on" : ""}, by ${nats(points[first])} there`;
    if (saving(held) > 1) return `${holds}, ${breaks}.`;
    return `Repeated passages: ${breaks}. No smaller saving was measured.`; // "up to 1.00x no worse" says nothing
  }

  plot(points, width, scale, key, title, format, base) {
    const { store } = this, p = store.threshold, fromZero = key === "kv_bytes", error = (d) => d[`${key}_stderr`] || 0;
    const values = points.flatMap((d) => [d[key] - error(d), d[key] + error(d)]).concat(base ? [base.value] : []);
    const y = fromZero ? [0, Math.max(...values) * 1.08] : span(values, LEAST_LOSS);
    const share = (d) => Math.log2(1 / Math.max(d.keep_ratio, 1e-4)), ratio = store.byRatio && points.every((d) => d.keep_ratio);
    const across = ratio ? share : (d) => d.p, here = ratio ? share({ keep_ratio: store.keepRatio }) : p;
    const all = [...points.map(across), here], x = [Math.min(...all), Math.max(...all)];
    const plot = new Plot(this.plots, title, { width, left: 64, right: 14, ...this.size(scale) }, x, y), { svg } = plot;
    const below = scale ? ticks(...x, ratio ? 4 : 6) : [], name = ratio ? "kept: one token in" : "threshold p";
    const below1 = ratio ? (v) => number(Number((2 ** v).toPrecision(2))) : number;
    plot.frame((fromZero ? byteTicks : ticks)(...y, 3), fromZero ? byteText : number, below, below1, scale ? name : "");
    if (base) plot.level(base.value, base.name);
    plot.line(points.map((d) => [across(d), d[key]]), "mod-line");
    for (const d of points) {
      if (error(d)) plot.error(across(d), d[key], error(d));
      const beyond = untrained(store, d.p), told = `p ${chance(d.p)}: ${format(d[key])}${error(d) ? ` ± ${format(error(d))}` : ""}`;
      node(plot.dot(across(d), d[key], beyond ? "mod-dot mod-untrained" : "mod-dot", 3), "title", {}, beyond ? `${told}, beyond the training` : told);
    }
    node(svg, "line", { x1: plot.across(here), x2: plot.across(here), y1: 20, y2: plot.base, class: "mod-marker" });
    const at = interpolate(points, p, key);
    if (at !== null) plot.dot(here, at, "mod-here", 5);
    const about = points.some((d) => d.p === p) ? "" : "≈ ";
    const where = ratio ? `one in ${number(Number((2 ** here).toPrecision(2)))}` : `p ${number(p)}`;
    const saved = at && key === "kv_bytes" ? `, ${(store.summary.dense_bytes / at).toFixed(2)}x` : "";
    const says = at === null ? `${where} lies outside the sweep` : `${where}: ${about}${format(at)}${saved}`;
    plot.text(plot.end, 14, fromZero ? says : says.split(": ").at(-1), "mod-here-text", "end"); // once says where
    svg.dataset.curve = key;
    svg.setAttribute("aria-label", `${title} against threshold. ${says}` + (base ? `; ${base.name} ${format(base.value)}` : ""));
  }

  size(scale) {
    if (!this.narrow) return { height: 150, top: 30, bottom: 36 };
    return { height: scale ? 118 : 88, top: 24, bottom: scale ? 36 : 8 };
  }
}

// What a loss is compared with: the dense model's, else that of the same weights with everything kept.
function reference(summary, key) {
  for (const [name, text] of [["dense", "dense model"], ["open", "everything kept"]])
    if (Number.isFinite(summary[`${name}_${key}`])) return { value: summary[`${name}_${key}`], name: text };
  return null;
}

VIEWS.curve = { scene: Store, parts: () => [Curve] };
