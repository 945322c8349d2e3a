// The explorer: every view of one text over one store, slider and figures first, curves next to the heatmap.
// uses: heatmap text path curve own_text controls speed budget

class ExplorerControls extends Controls {
  constructor(store, parent) {
    super(store, parent);
    if (store.model.get("can_run")) this.speed = new Speed(store, this.figures.box);
  }

  draw() {
    super.draw();
    this.speed?.draw();
  }
}

// Which of several models shows: the switch is next to the title.
class Forms {
  constructor(store, parent) {
    this.store = store;
    this.label = el(parent.querySelector(".mod-title"), "label", "mod-form", "routed: ");
    this.choice = el(this.label, "select", "modlab-form");
    ownKeys(this.choice);
    this.choice.addEventListener("change", () => store.job.ask({ type: "form", form: this.choice.value }));
    for (const name of ["form", "forms"]) store.listen("change:" + name, () => store.update());
  }

  draw() {
    const { model, job } = this.store, forms = model.get("forms") || [];
    this.label.hidden = forms.length < 2;
    if (this.choice.options.length !== forms.length) this.choice.replaceChildren(...forms.map((name) => new Option(name, name)));
    if (!job.running) this.choice.value = model.get("form");
    this.choice.disabled = !model.get("can_run") || job.running;
  }
}

// How routed layers store keys and values: next to the title, too, where the skip has a choice.
class StoredIn {
  constructor(store, parent) {
    this.store = store;
    this.label = el(parent.querySelector(".mod-title"), "label", "mod-form", "stored in: ");
    this.choice = el(this.label, "select", "modlab-stored-in");
    ownKeys(this.choice);
    this.label.title = "In how many bits keys and values are stored: fewer take fewer bytes and round more";
    this.choice.addEventListener("change", () => store.job.ask({ type: "store in", dtype: this.choice.value }));
  }

  draw() {
    const { summary, model, job } = this.store, known = Object.entries(summary.stored_in || {});
    this.label.hidden = !model.get("can_run") || !known.length;
    if (this.choice.options.length !== known.length) this.choice.replaceChildren(...known.map(([dtype, words]) => new Option(words, dtype)));
    if (!job.running) this.choice.value = summary.kv_cache_dtype;
    this.choice.disabled = job.running;
  }
}

VIEWS.explorer = {
  scene: Store, title: "Routing explorer", about,
  parts: (model) => {
    const can = model.get("can_run"), curve = can || model.get("points").length;
    return [Forms, StoredIn, OwnText, ExplorerControls, [[Heatmap], curve ? [Curve] : []], [[TokenText], [TokenPath]], ...(can ? [Budget] : [])];
  },
};
