// The widget that users see: slider, figures, heatmap, text and curve over one store; and the two ways in,
// `render` for anywidget and `showPage` for a page of its own.

class Controls {
  constructor(store, parent) {
    this.store = store;
    this.timer = this.patience = 0;
    this.sent = 0; // number of the last run asked for
    this.waiting = false;
    const bar = el(parent, "section", "mod-controls");
    const label = el(bar, "label", "mod-slider", "threshold p");
    this.slider = el(label, "input", "modlab-threshold");
    Object.assign(this.slider, { type: "range", min: 0.01, max: 0.99, step: 0.005 });
    this.slider.setAttribute("aria-label", "threshold p");
    ownKeys(this.slider);
    this.value = el(label, "output", "modlab-p");
    this.badge = el(bar, "span", "modlab-badge");
    this.badge.setAttribute("role", "status");
    this.how = el(parent, "p", "mod-note modlab-how");
    this.error = el(parent, "div", "modlab-error");
    this.error.setAttribute("role", "alert");
    this.error.hidden = true;
    this.figures = el(parent, "div", "mod-figures");
    this.kept = this.figure("kept in the routed layers", "modlab-kept");
    this.kv = this.figure("KV cache of this text", "modlab-kv");
    this.loss = this.figure("loss of this text", "modlab-loss");
    this.slider.addEventListener("input", () => store.model.set("threshold", Number(this.slider.value)));
    // "change" comes on release of the mouse, but after every press of an arrow key: wait for the last one.
    this.slider.addEventListener("change", () => { clearTimeout(this.timer); this.timer = setTimeout(() => this.run(), 250); });
    store.listen("change:status", () => this.answered());
    store.listen("change:threshold", () => store.update());
    this.answered();
  }

  destroy() { clearTimeout(this.timer); clearTimeout(this.patience); }

  figure(name, cls) {
    const box = el(this.figures, "div", "mod-figure");
    el(box, "div", "mod-name", name);
    return { value: el(box, "div", `mod-value ${cls}`), more: el(box, "div", "mod-more") };
  }

  // Ask Python for a real run: one at a time, the latest threshold next.
  run() {
    const { model } = this.store;
    if (!model.get("can_run")) return;
    if (this.waiting) { this.again = true; return; }
    this.again = false;
    this.waiting = true;
    this.late = false;
    this.sent = (model.get("status").id || 0) + 1;
    clearTimeout(this.patience);
    try {
      model.save_changes(); // so that Python knows p and does not send it back later, over a slider that moved on
      model.send({ type: "run", p: this.store.threshold, id: this.sent });
    } catch { // the kernel was shut down
      this.waiting = false;
      this.gone = true;
      return this.draw();
    }
    this.gone = false;
    this.patience = setTimeout(() => { this.late = true; this.draw(); }, 4000);
    this.draw();
  }

  answered() {
    const status = this.store.model.get("status");
    if (this.waiting && status.id === this.sent) clearTimeout(this.patience);
    this.late = false;
    if (status.state !== "running") {
      this.waiting = false;
      if (this.again) this.run();
    }
    this.error.hidden = !status.error;
    this.error.textContent = status.error || "";
    this.store.update();
  }

  draw() {
    const { store } = this, { model, summary } = store, p = store.threshold, preview = store.preview;
    const running = this.waiting || model.get("status").state === "running";
    if (document.activeElement !== this.slider || Math.abs(Number(this.slider.value) - p) > 0.0026) this.slider.value = p;
    this.value.textContent = !preview && summary.varies ? "per layer" : number(p);
    const state = running ? "running" : preview ? "preview" : "measured";
    this.badge.dataset.state = state;
    this.badge.textContent = { running: "running the model …", preview: "preview", measured: "measured" }[state];
    this.how.textContent = this.explain(running, preview);
    this.kept.value.textContent = percent(store.keepRatio);
    this.kept.more.textContent = `${store.R} of ${store.numLayers} layers are routed`;
    const kv = store.kvBytes();
    this.kv.value.textContent = (preview ? "≈ " : "") + byteText(kv);
    this.kv.more.textContent = `${byteText(summary.dense_bytes)} dense · ${(summary.dense_bytes / kv).toFixed(2)}x smaller` + (preview ? "" : ", allocated");
    this.loss.value.textContent = preview || summary.loss === null ? "–" : summary.loss.toFixed(3);
    this.loss.more.textContent = summary.loss === null ? "one token predicts nothing"
      : preview ? `${summary.loss.toFixed(3)} measured at p ${number(summary.p)}` : "nats a token, lower is better";
    this.figures.dataset.state = preview ? "preview" : "measured";
  }

  explain(running, preview) {
    const { store } = this, can = store.model.get("can_run"), at = number(store.summary.p);
    if (preview && this.gone) return "No kernel answers, so this stays a preview. Run the cell again for a live one.";
    if (running && this.late) return "Asked the kernel, no answer yet. It may be busy, or not running; until it answers this is a preview.";
    if (preview || running)
      return `Preview from the gates recorded at p ${at}; in a real run the gates of later layers change too. ` +
        (running ? "It is on its way." : can ? "Release the slider for one." : "That needs a notebook with the model.");
    return "Measured: the model ran this text with " + (store.summary.varies ? "the thresholds of its layers." : `p ${at}.`);
  }
}

const VIEWS = { explorer: [Controls, Heatmap, TokenText, Curve], heatmap: [Heatmap], text: [TokenText], curve: [Curve] };

function show(model, parent) {
  const root = el(parent, "div", "modlab"), view = model.get("view");
  const store = new Store(model, root);
  if (view === "explorer") {
    const title = el(root, "header", "mod-title");
    el(title, "h2", "", "Routing explorer");
    el(title, "span", "", [store.summary.model, `${store.T.toLocaleString("en")} tokens`].filter(Boolean).join(" · "));
  }
  const kinds = VIEWS[view].filter((kind) => kind !== Curve || view === "curve" || model.get("can_run") || model.get("points").length);
  store.views = kinds.map((kind) => new kind(store, root));
  store.update();
  // JupyterLab writes its theme on the body, and at some other time its colours arrive; a page of its own follows the
  // system. The ground has a transition (style.css), whose beginning tells that the colours are there.
  const follow = () => store.update();
  for (const name of ["transitionrun", "transitionend"])
    root.addEventListener(name, (event) => { if (event.target === root) follow(); });
  const watch = new MutationObserver(follow), scheme = matchMedia("(prefers-color-scheme: dark)");
  watch.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name", "data-jp-theme-light", "class"] });
  scheme.addEventListener("change", follow);
  return () => { watch.disconnect(); scheme.removeEventListener("change", follow); store.destroy(); };
}

function render({ model, el: parent }) {
  try {
    return show(model, parent);
  } catch (error) { // else the output would stay blank, and only the browser's console would know
    showError(parent, error);
    throw error;
  }
}

function showError(parent, error) {
  const box = el(parent, "div", "modlab-error", `This view could not be drawn: ${error.message}\n${error.stack || ""}`);
  box.setAttribute("role", "alert");
}

// anywidget's model for a page without Jupyter: values and change events, nobody to send to.
class PlainModel extends EventTarget {
  constructor(values) { super(); this.values = values; }
  get(name) { return this.values[name]; }
  set(name, value) {
    if (this.values[name] === value) return;
    this.values[name] = value;
    this.dispatchEvent(new Event("change:" + name));
  }
  on(event, handler) { this.addEventListener(event, handler); }
  off(event, handler) { this.removeEventListener(event, handler); }
  save_changes() {}
  send() {}
}

function showPage(parent, values) {
  for (const name of ["gates", "losses"]) values[name] = Uint8Array.from(atob(values[name]), (c) => c.charCodeAt(0)).buffer;
  try {
    show(new PlainModel(values), parent);
  } catch (error) {
    showError(parent, error);
    throw error;
  }
}

export default { render };
