// A threshold beyond the largest one that the routers were trained for: said while it is chosen, in the words of Python.

class Beyond {
  constructor(scene, parent) {
    this.scene = scene;
    this.box = el(parent, "p", "mod-warning modlab-beyond");
    this.box.setAttribute("role", "status");
    this.box.hidden = true;
  }

  get shows() { return !this.box.hidden; }

  draw(ps) {
    const { largest, beyond } = this.scene.model.get("summary").trained || {}, p = Math.max(...ps);
    this.box.hidden = !beyond || p <= largest * (1 + 1e-6);
    this.box.textContent = this.box.hidden ? "" : `Threshold ${chance(p)} ${beyond}`;
  }
}
