// Two scales in an SVG: grid, numbers, names. Curves and training draw on it.

const LEAST_LOSS = 0.1; // nats: a scale that spans less draws the noise of one text as a cliff

class Plot {
  // box: { width, height, left, right, top, bottom }; x and y: [low, high].
  constructor(parent, title, box, x, y) {
    this.box = box;
    this.x = x;
    this.y = y;
    this.svg = node(parent, "svg", { width: box.width, height: box.height, role: "img", class: "modlab-curve" });
    this.text(box.left, 14, title, "mod-plot-title");
  }

  get end() { return this.box.width - this.box.right; }
  get base() { return this.box.height - this.box.bottom; }

  across(v) { const { left } = this.box, [low, high] = this.x; return left + ((v - low) / (high - low || 1)) * (this.end - left); }
  up(v) { const { top } = this.box, [low, high] = this.y; return this.base - ((v - low) / (high - low || 1)) * (this.base - top); }

  text(x, y, text, cls = "mod-tick", anchor = "start") { return node(this.svg, "text", { x, y, class: cls, "text-anchor": anchor }, text); }

  // Lines across with their values, numbers below, and the name of the scale below.
  frame(values, format, below, formatBelow, name) {
    const { left } = this.box;
    for (const v of values) {
      node(this.svg, "line", { x1: left, x2: this.end, y1: this.up(v), y2: this.up(v), class: "mod-grid" });
      this.text(left - 8, this.up(v) + 4, format(v), "mod-tick", "end");
    }
    for (const v of below) this.text(this.across(v), this.base + 16, formatBelow(v), "mod-tick", "middle");
    if (name) this.text((left + this.end) / 2, this.box.height - 3, name, "mod-tick", "middle");
  }

  line(points, cls, more = {}) {
    const at = points.map(([x, y]) => `${this.across(x)},${this.up(y)}`).join(" ");
    return node(this.svg, "polyline", { points: at, class: cls, ...more });
  }

  dot(x, y, cls, r) { return node(this.svg, "circle", { cx: this.across(x), cy: this.up(y), r, class: cls }); }

  // A dashed line all across, with its name: what the curve is compared with.
  level(y, name) {
    node(this.svg, "line", { x1: this.box.left, x2: this.end, y1: this.up(y), y2: this.up(y), class: "mod-reference-line" });
    this.text(this.end, this.up(y) + 14, name, "mod-tick", "end");
  }

  // How far the value may be off: a bar up and down.
  error(x, y, by) {
    const at = this.across(x);
    node(this.svg, "line", { x1: at, x2: at, y1: this.up(y - by), y2: this.up(y + by), class: "mod-error-bar" });
  }
}

// The ends of a scale that holds the values with some room, and spans at least `least`.
function span(values, least = 0) {
  const low = Math.min(...values), high = Math.max(...values);
  const missing = Math.max(0, least - (high - low)) / 2, margin = Math.max(high - low, least, Math.abs(high) * 1e-6) * 0.08;
  return [low - missing - margin, high + missing + margin];
}
