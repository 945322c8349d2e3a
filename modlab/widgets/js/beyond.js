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
    const p = Math.max(...ps), { beyond } = this.scene.model.get("summary").trained || {};
    this.box.hidden = !untrained(this.scene, p);
    this.box.textContent = this.box.hidden ? "" : `Threshold ${chance(p)} ${beyond}`;
  }
}

function untrained(scene, p) {
  const { largest } = scene.model.get("summary").trained || {};
  return largest !== undefined && p > largest * (1 + 1e-6);
}
