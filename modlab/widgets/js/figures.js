// The three figures of one text: what is kept, the bytes of its cache, its loss.

class Figures {
  constructor(store, parent) {
    this.store = store;
    this.box = el(parent, "div", "mod-figures");
    this.kept = figure(this.box, "kept in the routed layers", "modlab-kept");
    this.kv = figure(this.box, "KV cache of this text", "modlab-kv");
    this.loss = figure(this.box, "loss, nats a token", "modlab-loss");
  }

  draw() {
    const { store } = this, { summary, preview } = store, kv = store.kvBytes();
    this.kept.value.textContent = percent(store.keepRatio);
    this.kept.more.textContent = `${store.routed} of ${store.numLayers} layers are routed`
      + (store.several ? `, ${store.R} ${store.words.gate}s` : "");
    this.kv.value.textContent = (preview ? "≈ " : "") + byteText(kv);
    this.kv.more.textContent = `${byteText(summary.dense_bytes)} dense · ${gain(summary.dense_bytes / kv, "smaller", "larger")}`
      + (preview ? "" : ", allocated") + (summary.recent ? `, the latest ${summary.recent + 1} in it` : "")
      + (summary.bits ? ", keys and values in " + summary.bits : "");
    const swept = preview && !store.model.get("layer_thresholds").length ? interpolate(store.model.get("points"), store.threshold, "loss") : null;
    this.loss.value.textContent = summary.loss === null || (preview && swept === null) ? "–"
      : preview ? "≈ " + swept.toFixed(3) : summary.loss.toFixed(3);
    this.loss.more.textContent = summary.loss === null ? "one token predicts nothing"
      : preview ? (swept === null ? "" : "by the curve · ")
        + `${summary.loss.toFixed(3)} measured at p ${summary.varies ? "of each layer" : chance(summary.p)}`
      : versus(summary);
    this.box.dataset.state = preview ? "preview" : "measured";
  }
}

// What routing costs: the loss against the dense model's, and against that of the same weights with everything kept.
function versus({ loss, dense_loss: dense, open_loss: open }) {
  const against = [[dense, "the dense model"], [open, "everything kept"]].filter(([base]) => base !== undefined);
  if (!against.length) return "lower is better";
  const apart = (base) => Math.abs(loss - base).toFixed(3), sign = (base) => (Number(apart(base)) ? (loss < base ? "−" : "+") : "");
  return against.map(([base, name]) => `${sign(base)}${apart(base)} against ${name}`).join(" · ");
}

// A box with a name, a large value next to it and a line that says more.
function figure(parent, name, cls) {
  const box = el(parent, "div", "mod-figure");
  el(box, "div", "mod-name", name);
  return { box, value: el(box, "div", `mod-value ${cls}`), more: el(box, "div", "mod-more") };
}

// Under the title of a view of one text.
const about = (store) => [store.summary.model, `${store.T.toLocaleString("en")} tokens`].filter(Boolean).join(" · ");
