// Small helpers of all views: elements, numbers, colours, sharp canvases.

// anywidget hands bytes over as a DataView into a larger buffer; a typed array needs its own, aligned one.
function bytes(view) {
  return view.buffer ? view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength) : view;
}

const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const number = (x) => String(Number(x.toFixed(4)));
// A gate or threshold: four decimals, or three figures where these would say little.
const chance = (p) => (p && p < 0.01 ? String(Number(p.toPrecision(3))) : p > 0.99 && p < 1 ? `1 − ${Number((1 - p).toPrecision(2))}` : number(p));
const percent = (x) => (100 * x).toFixed((x >= 0.0995 && x < 0.995) || x === 1 || x === 0 ? 0 : 1) + " %"; // 0 and 100 are none and all
// How many times less it is than something else, or more: gain(2, "smaller", "larger").
const gain = (times, less, more) => (times >= 0.995 ? `${times.toFixed(2)}x ${less}` : `${(1 / times).toFixed(2)}x ${more}`);
const milliseconds = (v) => `${number(Number(v.toPrecision(3)))} ms`;
const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥");

function byteText(n) { // three figures, as 4.56 KiB, 45.6 KiB, 456 KiB: memory budgets are told in these units, too
  const power = [3, 2, 1].find((k) => n >= 999.5 * 1024 ** (k - 1)) || 0, x = n / 1024 ** power;
  return x.toFixed(power === 0 || x >= 99.95 ? 0 : x >= 9.995 ? 1 : 2) + " " + ["B", "KiB", "MiB", "GiB"][power];
}

// A child element with a class and text: el(parent, "div", "name", "text").
function el(parent, tag, name = "", text = "") {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text) node.textContent = text;
  parent.append(node);
  return node;
}

function button(parent, text, label, act) {
  const made = el(parent, "button", "mod-button", text);
  made.type = "button";
  if (label !== text) { made.title = label; made.setAttribute("aria-label", label); }
  made.addEventListener("click", act);
  return made;
}

// Viridis at x in 0..1, from the ground of the theme to its ink: dark colours are strong on light, bright ones on dark.
function ramp(x, dark) {
  const span = RAMP.length - 1, y = clamp(x, 0, 1);
  const at = (dark ? 0.12 + 0.88 * y : 0.97 - 0.97 * y) * span, i = Math.min(span - 1, Math.floor(at)), f = at - i;
  return RAMP[i].map((c, k) => Math.round(c + f * (RAMP[i + 1][k] - c)));
}

const css = (rgb) => `rgb(${rgb.join(",")})`;

// Black or white, whichever has the higher contrast on the colour (WCAG relative luminance).
function inkOn(rgb) {
  const [r, g, b] = rgb.map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

// The arrow keys are this element's: JupyterLab, which asks the focused element only, must not take them.
function ownKeys(node) { node.dataset.lmSuppressShortcuts = "true"; }

// Canvas cannot use CSS variables: read what the style sheet made of JupyterLab's theme.
function readTheme(root) {
  const style = getComputedStyle(root), read = (name) => style.getPropertyValue(name).trim();
  const surface = read("--mod-surface"); // not the background: that is still on its way for some frames
  const rgb = parseColour(surface), over = (name) => parseColour(read(name), surface);
  return {
    key: surface + read("--mod-ink") + read("--mod-accent"),
    dark: 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] < 128,
    ink: read("--mod-ink"), faint: read("--mod-faint"), line: read("--mod-line"), dense: read("--mod-dense"),
    accent: read("--mod-accent"), better: read("--mod-better"), worse: read("--mod-worse"),
    font: style.fontFamily, groundRgb: rgb, accentRgb: over("--mod-accent"), faintRgb: over("--mod-faint"),
  };
}

// Any CSS colour as [r, g, b], seen on a ground if it lets that through: a canvas knows them all.
const parsed = new Map();
function parseColour(text, ground = "#fff") {
  const key = text + ground;
  if (!parsed.has(key)) {
    const g = document.createElement("canvas").getContext("2d");
    for (const colour of [ground, text]) {
      g.fillStyle = colour;
      g.fillRect(0, 0, 1, 1);
    }
    parsed.set(key, [...g.getImageData(0, 0, 1, 1).data.slice(0, 3)]);
  }
  return parsed.get(key);
}

// A child of an SVG.
const SVG = "http://www.w3.org/2000/svg";
function node(parent, tag, attributes, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  parent.append(made);
  return made;
}

// Round numbers between low and high, about so many.
function ticks(low, high, about) {
  const raw = (high - low) / about, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((s) => s * power).find((s) => s >= raw), list = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-6; v += step) list.push(Number(v.toPrecision(10)));
  return list;
}

// The same for bytes: round in the unit that they are written in.
function byteTicks(low, high, about) {
  const unit = 1024 ** ([3, 2, 1].find((k) => high >= 999.5 * 1024 ** (k - 1)) || 0);
  return ticks(low / unit, high / unit, about).map((v) => v * unit);
}

// A canvas as sharp as the screen: sets its size in CSS pixels and returns a context that draws in them.
function sharp(canvas, width, height) {
  const scale = window.devicePixelRatio || 1, w = Math.round(width * scale), h = Math.round(height * scale);
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  canvas.style.width = width + "px";
  canvas.style.height = height + "px";
  const g = canvas.getContext("2d");
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.clearRect(0, 0, width, height);
  return g;
}

// Between the two points around p, straight; null outside of them.
function interpolate(points, p, key) {
  for (let i = 1; i < points.length; i++) {
    const a = points[i - 1], b = points[i];
    if (p >= a.p && p <= b.p) return b.p === a.p ? a[key] : a[key] + ((p - a.p) / (b.p - a.p)) * (b[key] - a[key]);
  }
  return null;
}
