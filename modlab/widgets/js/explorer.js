// The explorer: every view of one text over one store.

VIEWS.explorer = {
  scene: Store, title: "Routing explorer", about,
  parts: (model) => [Controls, Heatmap, TokenText, TokenPath, ...(model.get("can_run") || model.get("points").length ? [Curve] : [])],
};
