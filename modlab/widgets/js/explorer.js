// The explorer: every view of one text over one store.
// uses: heatmap text path curve own_text controls budget

VIEWS.explorer = {
  scene: Store, title: "Routing explorer", about,
  parts: (model) => {
    const can = model.get("can_run"), curve = can || model.get("points").length;
    return [OwnText, Controls, ...(can ? [Budget] : []), Heatmap, TokenText, TokenPath, ...(curve ? [Curve] : [])];
  },
};
