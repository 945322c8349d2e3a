// One token through the depth: which layers it ran, the gate of each, what it left in the cache.
// uses: store

class TokenPath {
  constructor(store, parent) {
    this.store = store;
    this.box = el(parent, "section", "mod-path");
    const head = el(this.box, "div", "mod-head");
    el(head, "h3", "", "One token through the layers");
    const steps = el(head, "span", "mod-zooms");
    button(steps, "◀", "the token before", () => this.step(-1));
    button(steps, "▶", "the next token", () => this.step(1));
    this.says = el(this.box, "p", "modlab-path-says");
    this.says.setAttribute("aria-live", "polite");
    this.plot = el(this.box, "div", "mod-path-plot");
    this.plot.tabIndex = 0;
    ownKeys(this.plot);
    this.plot.setAttribute("role", "group");
    this.plot.setAttribute("aria-label", "The path of the chosen token; left and right arrow change the token, up and down the layer");
    this.plot.addEventListener("keydown", (e) => store.key(e));
    this.observer = new ResizeObserver(() => store.update());
    this.observer.observe(this.plot);
  }

  destroy() { this.observer.disconnect(); }

  step(by) {
    const { store } = this, t = store.cursor < 0 ? 0 : clamp(store.cursor + by, 0, store.T - 1);
    store.reveal = true;
    store.selection.set({ token: t, locked: true });
  }

  draw() {
    const { store } = this, width = this.plot.clientWidth, t = store.cursor, { layer } = store.pointer;
    const key = [store.stamp, width, t, layer, store.locked].join();
    if (width < 120 || key === this.drawnFor) return;
    this.drawnFor = key;
    this.box.dataset.token = t;
    this.plot.replaceChildren();
    this.says.textContent = t < 0 ? "Point at a token in the text or the heatmap: its way through the layers shows here." : this.sentence(t);
    this.says.classList.toggle("mod-note", t < 0);
    this.drawWay(t, width, layer);
  }

  sentence(t) {
    const { store } = this, dense = store.numLayers - store.routed, layers = dense + store.held[t];
    const { token_bytes: bytes, stored_bytes: stored } = store.summary, ran = number(Number(layers.toFixed(1)));
    const left = `${byteText(dense * bytes + store.held[t] * stored)} of ${byteText(store.numLayers * bytes)}`;
    const loss = t > 0 && Number.isFinite(store.losses[t]) ? ` Its loss was ${store.losses[t].toFixed(2)} nats.` : "";
    if (store.words.runs)
      return `${store.name(t)}, token ${t.toLocaleString("en")}, ran all ${store.numLayers} layers and stays in the cache of ${ran} `
        + `when it is not recent, ${left}.${loss}`
        + (store.preview ? " (preview)" : "");
    const kept = bytes ? `left keys and values in ${ran} of them, ${left}` : "left keys and values in all of them";
    return `${store.name(t)}, token ${t.toLocaleString("en")}, ran ${ran} of ${store.numLayers} layers and ${kept}.${loss}` +
      (store.preview ? " (preview)" : "");
  }

  drawWay(t, width, chosen) {
    const { store } = this, { theme, numLayers } = store;
    const left = 58, right = 50, each = (width - left - right) / numLayers, box = clamp(each * 0.56, 3, 20);
    // Where every token runs every layer there is no way to draw.
    const all = store.words.runs, gateTop = 8, gateBase = 58, way = 86, cache = all ? 76 : 116, height = cache + 30;
    const svg = node(this.plot, "svg", { width, height, role: "img", class: "modlab-path" });
    svg.setAttribute("aria-label", t < 0 ? "No token chosen" : this.sentence(t));
    for (const [y, text] of [[gateBase - 22, "gate"], ...(all ? [] : [[way + 4, "runs"]]), [cache + 4, "K/V left"], [height - 4, "layer"]])
      node(svg, "text", { x: left - 8, y, "text-anchor": "end", class: "mod-tick" }, text);
    const { levels } = store, near = levels.logarithmic; // close to 0 or 1: as high as their colours go
    for (const [v, y] of near ? [["high", gateTop], ["low", gateBase]] : [[1, gateTop], [0, gateBase]]) {
      node(svg, "line", { x1: left, x2: width - right, y1: y, y2: y, class: "mod-grid" });
      node(svg, "text", { x: width - right + 6, y: y + 4, class: "mod-tick" }, String(v));
    }
    const x = (i) => left + (i + 0.5) * each, gateY = (v) => gateBase - (near ? clamp(levels.at(v), 0, 1) : v) * (gateBase - gateTop);
    let path = `M ${left - 4} ${way}`;
    const everyLabel = [1, 2, 4, 5, 10, 20].find((n) => n * each >= 18) || 40;
    for (let i = 0; i < numLayers; i++) {
      const rows = store.rowsOf[i], dense = !rows.length, share = t < 0 ? 0 : store.share(i, t), kept = share > 0;
      if (i % everyLabel === 0 || i === chosen)
        node(svg, "text", { x: x(i), y: height - 4, "text-anchor": "middle", class: i === chosen ? "mod-plot-title" : "mod-tick" }, String(i));
      if (t < 0 || kept) path += ` L ${x(i)} ${way}`;
      else path += ` L ${x(i) - each / 2} ${way} Q ${x(i)} ${way - 26} ${x(i) + each / 2} ${way}`; // passes by
      if (t < 0) continue;
      const group = node(svg, "g", { class: "mod-station" });
      rows.forEach((row, head) => { // the gates of one layer share its width
        const gate = store.gate(row, t), y = gateY(gate), on = store.kept(row, t), part = box / rows.length;
        const bar = { x: x(i) - box / 2 + head * part, y, width: part, height: Math.max(1, gateBase - y) };
        node(group, "rect", { ...bar, class: on ? "" : "mod-hollow", fill: on ? store.colour(gate) : "none" });
      });
      if (!dense) {
        const p = store.p(rows[0]);
        node(group, "line", { x1: x(i) - box / 2 - 3, x2: x(i) + box / 2 + 3, y1: gateY(p), y2: gateY(p), class: "mod-level" });
      }
      const ink = dense ? theme.faint : theme.accent;
      if (!all) node(group, "rect", { x: x(i) - box / 2, y: way - box / 2, width: box, height: box, rx: 3,
        ...(kept ? { fill: ink } : { class: "mod-hollow", "stroke-dasharray": "2 2" }) });
      const stays = store.summary.token_bytes ? share : 1;
      node(group, "rect", { x: x(i) - box / 2, y: cache - 6, width: box, height: 12, rx: 1, class: "mod-hollow" });
      const filled = { x: x(i) - box / 2, y: cache + 6 - 12 * stays, width: box, height: 12 * stays, rx: 1 };
      if (stays) node(group, "rect", { ...filled, fill: theme.ink });
      if (i === chosen) node(group, "rect", { x: x(i) - each / 2, y: 2, width: each, height: height - 18, class: "mod-chosen" });
      const text = dense ? `layer ${i}: dense, every token runs` : store.describe(t, i, -1)[2];
      node(group, "title", {}, text);
      const hit = node(group, "rect", { x: x(i) - each / 2, y: 0, width: each, height, fill: "transparent" });
      hit.addEventListener("click", () => store.selection.set({ layer: i, head: 0, locked: true }));
    }
    if (!all) svg.prepend(node(svg, "path", { d: path + ` L ${width - right + 4} ${way}`, class: "mod-way" }));
  }
}

VIEWS.path = { scene: Store, parts: () => [TokenPath] };
