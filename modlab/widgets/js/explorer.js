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

// Whether routed layers store keys and values in eight bits: next to the title, too, where the skip has a choice.
class EightBits {
  constructor(store, parent) {
    this.store = store;
    this.label = el(parent.querySelector(".mod-title"), "label", "mod-form");
    this.box = el(this.label, "input", "modlab-eight-bits");
    this.box.type = "checkbox";
    ownKeys(this.box);
    this.label.append(" 8 bits a number");
    this.label.title = "Store keys and values in eight bits: half of the bytes, a little rounding";
    this.box.addEventListener("change", () => store.job.ask({ type: "eight bits", on: this.box.checked }));
  }

  draw() {
    const { summary, model, job } = this.store, can = model.get("can_run");
    this.label.hidden = !can || !summary.may_round;
    if (!job.running) this.box.checked = summary.eight_bits;
    this.box.disabled = job.running;
  }
}

VIEWS.explorer = {
  scene: Store, title: "Routing explorer", about,
  parts: (model) => {
    const can = model.get("can_run"), curve = can || model.get("points").length;
    return [Forms, EightBits, OwnText, ExplorerControls, [[Heatmap], curve ? [Curve] : []], [[TokenText], [TokenPath]], ...(can ? [Budget] : [])];
  },
};
