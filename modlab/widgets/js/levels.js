// The scale on which gates reach the browser: four decimals, and finer where gates or thresholds need it
// (pictures/page.py: gate_table). A cell's level is how many values of the table lie at or under its gate.

class Levels {
  // fine: values beyond the four decimals; logarithmic: whether gates differ by their order of magnitude.
  constructor(cells, fine, logarithmic) {
    this.table = new Float32Array(GRID + fine.length);
    for (let i = 0; i < GRID; i++) this.table[i] = (i + 1) / GRID;
    this.table.set(fine, GRID);
    this.table.sort();
    this.logarithmic = logarithmic;
    const counts = this.count(cells);
    this.spread(counts);
    this.all = new Shares(this.table, counts, (p) => this.of(p));
  }

  // How many of these cells have each level.
  count(cells) {
    const counts = new Uint32Array(this.table.length + 2);
    for (const cell of cells) counts[cell & LEVEL]++;
    return counts;
  }

  // Threshold and share of these cells alone.
  sharesOf(cells) { return new Shares(this.table, this.count(cells), (p) => this.of(p)); }

  // Where the colours begin and end, and how many gates lie where in between.
  spread(counts) {
    const { table } = this, some = counts.reduce((sum, n) => sum + n, 0) / 200;
    const from = (order, enough) => { let sum = 0; return order.find((k) => (sum += counts[k]) > enough) ?? 0; };
    const up = [...counts.keys()], down = [...up].reverse();
    if (this.logarithmic) {
      this.low = table[Math.max(0, from(up, some) - 1)];
      this.high = Math.max(table[Math.max(0, from(down, some) - 1)], this.low * 1.5);
    } else { // to the next tenth: most models use a part of 0..1 only
      this.low = Math.min(0.9, Math.floor(this.value(from(up, 0)) * 10) / 10);
      this.high = Math.max(this.low + 0.1, Math.ceil(this.value(from(down, 0)) * 10) / 10);
    }
    this.place = Float32Array.from(counts, (_, level) => clamp(this.at(this.value(level)), 0, 1));
    this.bins = new Uint32Array(50);
    counts.forEach((n, level) => { if (n) this.bins[Math.min(49, Math.floor(50 * this.place[level]))] += n; });
  }

  value(level) { return level ? this.table[level - 1] : 0; }

  // 0..1 between the ends of the colours.
  at(gate) {
    const f = this.logarithmic ? (v) => Math.log(Math.max(v, 1e-12) / Math.max(1 - v, 1e-12)) : (v) => v;
    return (f(gate) - f(this.low)) / (f(this.high) - f(this.low));
  }

  // The least level whose gates reach p, as `gate >= p` in float32 decides.
  of(p) {
    const { table } = this, wanted = Math.fround(p);
    let a = 0, b = table.length;
    while (a < b) { const m = (a + b) >> 1; if (table[m] < wanted) a = m + 1; else b = m; }
    return a + 1;
  }
}

// Which share of some gates reaches a threshold, and which threshold a share of them reaches.
class Shares {
  constructor(table, counts, levelOf) {
    this.table = table;
    this.levelOf = levelOf;
    this.above = counts.slice(); // gates of at least this level
    for (let k = this.above.length - 2; k >= 0; k--) this.above[k] += this.above[k + 1];
  }

  // Share of the gates that reach p.
  of(p) { return this.above[Math.min(this.levelOf(p), this.above.length - 1)] / Math.max(1, this.above[0]); }

  // The least p of the table that at most this share of the gates reaches.
  reachedBy(share) {
    const { above, table } = this;
    let a = 1, b = table.length;
    while (a < b) { const m = (a + b) >> 1; if (above[m] > share * above[0] + 0.5) a = m + 1; else b = m; }
    const found = Math.min(table[a - 1], 0.9999999), round = Math.round(found * GRID) / GRID;
    return Math.fround(round) === found ? round : found; // as four decimals are written
  }
}
