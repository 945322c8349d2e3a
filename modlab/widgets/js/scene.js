// What every widget has: its model, its root element, its parts, the theme, and at most one drawing a frame.
// `model` is anywidget's model, or a PlainModel on a page without Jupyter; both know get, set, on, off.

class Scene {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.views = [];
    this.handlers = [];
    this.theme = readTheme(root);
  }

  listen(event, handler) {
    this.model.on(event, handler);
    this.handlers.push([event, handler]);
  }

  destroy() {
    for (const [event, handler] of this.handlers) this.model.off(event, handler);
    for (const view of this.views) view.destroy?.();
  }

  // Draw all views once in the next frame, however often it is asked for.
  update() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.theme = readTheme(this.root);
      this.prepare();
      for (const view of this.views) view.draw();
    });
  }

  prepare() {}

  // Tell Python what changed here; a kernel that was shut down has nobody to tell.
  save() {
    try { this.model.save_changes(); } catch { /* the page stays usable */ }
  }
}
