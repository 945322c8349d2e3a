// The cells of the heatmap as pixels of the screen: thousands of rectangles a frame would be too slow. Where tokens
// are narrower than a pixel and a half, a pixel shows how large a share of its tokens was kept.

class Raster {
  constructor(store) { this.store = store; }

  paint(canvas, m, first, last, shift) {
    const { store } = this, scale = canvas.width / m.width, rowHeight = Math.round(m.h * scale);
    const x0 = Math.round(m.left * scale), width = Math.round(m.view * scale), height = rowHeight * store.lanes.length;
    if (width < 1) return;
    if (!this.image || this.image.width !== width || this.image.height !== height) {
      this.image = new ImageData(width, height);
      this.pixels = new Uint32Array(this.image.data.buffer);
    }
    const put = () => canvas.getContext("2d").putImageData(this.image, x0, Math.round(m.top * scale));
    const key = [store.decided, store.theme.key, store.summary.run, m.w, shift, width, height].join();
    if (key === this.painted) return put(); // only the mark moved
    this.painted = key;
    this.pixels.fill(0);
    const colours = this.colours(), full = new Uint32Array(width), thin = new Uint32Array(width);
    const wide = rowHeight > 9 * scale ? Math.round(scale) : 1, line = Math.max(1, Math.round(Math.max(1.5, m.h * 0.14) * scale));
    const lineFrom = Math.floor((rowHeight - line) / 2), w = m.w * scale, from = shift * scale;
    for (const [lane, { layer, row, head }] of store.lanes.entries()) {
      // Low lines of one layer touch each other: what lies between two is between two layers.
      const above = rowHeight > 5 * scale || head === 0 ? wide : 0, below = rowHeight > 5 * scale ? wide : 0;
      full.fill(0);
      thin.fill(0);
      if (row < 0) {
        full.fill(this.dense, 0, clamp(Math.round(store.T * w - from) - 1, 0, width));
        thin.set(full);
      } else if (w >= 1.5) this.cells(row, first, last, w, from, full, thin, colours, w > 9 * scale ? Math.round(scale) : w >= 4 ? 1 : 0);
      else this.shares(row, w, from, full, thin, colours);
      const top = lane * rowHeight;
      for (let y = above; y < rowHeight - below; y++)
        this.pixels.set(y >= lineFrom && y < lineFrom + line ? thin : full, (top + y) * width);
    }
    put();
  }

  // A cell a token: `full` is a pixel row of kept cells, `thin` the row in the middle, where skipped ones show too.
  cells(row, first, last, w, from, full, thin, colours, gap) {
    const { store } = this, { T, cells, mask } = store, { place } = store.levels;
    for (let t = first, i = row * T + first; t <= last; t++, i++) {
      const a = Math.max(0, Math.round(t * w - from)), b = Math.round((t + 1) * w - from);
      if (!mask[i]) { thin.fill(this.faint, a, b); continue; }
      const colour = colours[(place[cells[i] & LEVEL] * 255) | 0];
      full.fill(colour, a, b - gap);
      thin.fill(colour, a, b - gap);
    }
  }

  // Many tokens a pixel: the colour of the mean gate of the kept ones, as strong as their share.
  shares(row, w, from, full, thin, colours) {
    const { store } = this, { T, cells, mask } = store, { place } = store.levels, base = row * T;
    const end = Math.min(full.length, Math.ceil(T * w - from));
    for (let x = 0; x < end; x++) {
      const a = Math.min(T - 1, Math.floor((x + from) / w)), b = Math.max(a + 1, Math.min(T, Math.floor((x + 1 + from) / w)));
      let kept = 0, sum = 0;
      for (let i = base + a; i < base + b; i++) if (mask[i]) { kept++; sum += place[cells[i] & LEVEL]; }
      if (!kept) { thin[x] = this.faint; continue; }
      const colour = colours[((sum / kept) * 255) | 0];
      full[x] = thin[x] = (colour & 0xffffff) | (Math.round(255 * (0.15 + 0.85 * kept / (b - a))) << 24);
    }
  }

  colours() {
    const { store } = this;
    if (this.coloured !== store.theme.key) {
      this.coloured = store.theme.key;
      this.table = Uint32Array.from({ length: 256 }, (_, i) => pixel(ramp(i / 255, store.theme.dark), 255));
      const { faintRgb } = store.theme;
      this.faint = pixel(faintRgb, 140); // as the legend's: 55 %
      this.dense = pixel(faintRgb, 41); // as --mod-dense: 16 %
    }
    return this.table;
  }
}

// [r, g, b] and alpha as one pixel of an ImageData; every machine with a browser is little-endian.
const pixel = ([r, g, b], alpha) => ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0;
