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

VIEWS.explorer = {
  scene: Store, title: "Routing explorer", about,
  parts: (model) => {
    const can = model.get("can_run"), curve = can || model.get("points").length;
    return [OwnText, ExplorerControls, [[Heatmap, TokenText], [...(curve ? [Curve] : []), TokenPath]], ...(can ? [Budget] : [])];
  },
};
