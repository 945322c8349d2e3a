// What a full context's cache would take at the present decisions, and the buttons that find the threshold for a wanted
// keep ratio or cache size.

const MIB = 2 ** 20;

class Budget {
  constructor(store, parent) {
    this.store = store;
    const box = el(parent, "section", "mod-calibrate"), budget = store.model.get("budget");
    el(box, "h3", "", "Find the threshold for");
    const mib = this.field(box, "a KV cache of", "modlab-want-mib", budget.mib, "any", "MiB");
    this.context = this.field(box, "for", "modlab-want-context", budget.context, 1, "tokens");
    const fits = () => this.ask({ kv_mib: Number(mib.value), context: Number(this.context.value) });
    button(box, "Find", "find the threshold whose cache fits", fits).classList.add("modlab-calibrate-kv");
    const ratio = this.field(box, "or for", "modlab-want-ratio", 25, 1, "% kept");
    const keeps = () => this.ask({ keep_ratio: Number(ratio.value) / 100 });
    button(box, "Find", "find the threshold that keeps this share of the tokens", keeps).classList.add("modlab-calibrate-ratio");
    if (this.perLayer === undefined && store.model.get("layer_thresholds").length) {
      const label = el(box, "label", "mod-field");
      this.perLayer = el(label, "input", "modlab-each-layer");
      this.perLayer.type = "checkbox";
      label.append(" every layer keeps the same share");
    }
    this.place = el(parent, "div");
    this.says = el(parent, "p", "mod-note modlab-budget-says");
    this.says.setAttribute("aria-live", "polite");
    this.context.addEventListener("input", () => store.update());
    store.listen("change:budget", () => store.update());
    if (!store.model.get("can_run")) for (const part of box.querySelectorAll("input, button")) part.disabled = true;
  }

  field(box, name, cls, value, step, unit) {
    const label = el(box, "label", "mod-field", name), input = el(label, "input", cls);
    Object.assign(input, { type: "number", value, step, min: 0 });
    ownKeys(input);
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      box.querySelector(cls === "modlab-want-ratio" ? ".modlab-calibrate-ratio" : ".modlab-calibrate-kv").click();
    });
    el(label, "span", "", unit);
    return input;
  }

  ask(want) { this.store.job.ask({ type: "calibrate", per_layer: Boolean(this.perLayer?.checked), ...want }, this.place); }

  draw() {
    const { store } = this, { numLayers, routed } = store, { token_bytes: each, stored_bytes: held, index_bytes: index } = store.model.get("budget");
    const tokens = Math.max(0, Math.floor(Number(this.context.value)));
    const size = (layers) => `${number(Number(((layers * tokens) / MIB).toPrecision(3)))} MiB`;
    const elsewhere = store.model.get("budget").sample ? " Find looks at the sample that was given in Python, not at this text." : "";
    const stored = (held + index) * routed * store.stored(tokens), least = (held + index) * routed * store.stored(tokens, 0);
    this.says.hidden = !tokens;
    this.says.textContent = !each ? "This model skips MLPs only: its cache is as large as a dense one."
      : `With the share that this text keeps, a cache of ${tokens.toLocaleString("en")} tokens takes ${size(each * (numLayers - routed) + stored)}; `
        + `dense it takes ${size(each * numLayers)}, with all tokens ${store.words.past} in the routed layers `
        + `${size(each * (numLayers - routed) + least)}.` + elsewhere;
  }
}
