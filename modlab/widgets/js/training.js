// A training run while it goes: loss, keep ratio of every routed layer, and the buttons that start, pause and stop it.
// uses: figures plot

class Training {
  constructor(scene, parent) {
    this.scene = scene;
    const bar = el(parent, "section", "mod-controls");
    this.start = button(bar, "Start", "start training", () => this.send("start"));
    this.pause = button(bar, "Pause", "pause after the step in flight", () => this.send(this.state === "paused" ? "resume" : "pause"));
    this.stop = button(bar, "Stop", "end after the step in flight", () => this.send("stop"));
    this.start.classList.add("modlab-start", "mod-main");
    this.pause.classList.add("modlab-pause");
    this.stop.classList.add("modlab-stop");
    this.badge = el(bar, "span", "modlab-badge");
    this.badge.setAttribute("role", "status");
    this.bar = el(bar, "progress", "mod-job-bar");
    this.bar.setAttribute("aria-label", "training progress");
    this.text = el(parent, "p", "mod-note modlab-how");
    this.error = el(parent, "div", "modlab-error");
    this.error.setAttribute("role", "alert");
    this.figures = el(parent, "div", "mod-figures");
    this.loss = figure(this.figures, "training loss", "modlab-train-loss");
    this.kept = figure(this.figures, "kept in the routed layers", "modlab-train-kept");
    this.speed = figure(this.figures, "speed", "modlab-train-speed");
    const plots = this.plots = el(parent, "section", "mod-plots");
    this.observer = new ResizeObserver(() => scene.update());
    this.observer.observe(plots);
    for (const name of ["progress", "series"]) scene.listen("change:" + name, () => { this.asked = ""; scene.update(); });
  }

  destroy() { this.observer.disconnect(); clearTimeout(this.timer); }

  get state() { return this.scene.model.get("progress").state; }

  // A message that meets a busy kernel before JupyterLab has a thread for it waits for the cell's end; it is sent again
  // until the state changes. Its number tells Python which it has seen.
  send(type, id = Date.now(), times = 5) {
    clearTimeout(this.timer);
    try { this.scene.model.send({ type, id }); this.asked = type; } catch { this.asked = "gone"; }
    const { state } = this;
    if (this.asked === type && times) this.timer = setTimeout(() => { if (this.state === state) this.send(type, id, times - 1); }, 1500);
    this.scene.update();
  }

  draw() {
    const { model } = this.scene, progress = model.get("progress"), { state } = progress, can = model.get("can_run");
    const active = ["running", "paused", "stopping"].includes(state);
    this.start.hidden = active;
    this.start.disabled = !can || this.asked === "start";
    this.start.textContent = state === "ready" ? "Start" : "Train on";
    this.pause.hidden = this.stop.hidden = !active;
    this.pause.textContent = state === "paused" ? "Resume" : "Pause";
    this.pause.disabled = this.stop.disabled = !can || state === "stopping";
    this.badge.dataset.state = state === "running" ? "running" : active ? "preview" : "measured";
    this.badge.textContent = this.asked === "gone" ? "no kernel" : state;
    this.bar.hidden = state === "ready";
    if (Number.isFinite(progress.fraction)) this.bar.value = progress.fraction;
    this.text.textContent = progress.text;
    this.error.hidden = !progress.error;
    this.error.textContent = progress.error || "";
    const columns = model.get("columns"), data = this.read(columns), last = (name) => data[name]?.at(-1) ?? NaN;
    const shown = (v, format) => (Number.isFinite(v) ? format(v) : "–");
    this.loss.value.textContent = shown(last("loss"), (v) => v.toFixed(3));
    const held = (data.eval_loss || []).filter(Number.isFinite).pop();
    this.loss.more.textContent = Number.isFinite(held) ? `nats a token; held out ${held.toFixed(3)}` : "nats a token";
    this.kept.value.textContent = shown(last("keep_ratio"), percent);
    this.kept.more.textContent = shown(last("target"), (v) => `aims at ${percent(v)}`);
    this.speed.value.textContent = shown(last("tokens_per_s"), (v) => `${Math.round(v).toLocaleString("en")} tok/s`);
    this.speed.more.textContent = Number.isFinite(progress.left) ? `about ${spell(progress.left)} left` : "";
    const width = this.plots.clientWidth, key = [width, this.scene.theme.key].join(), series = model.get("series");
    if (width < 160 || (key === this.drawnFor && series === this.drawnOf)) return;
    this.drawnFor = key;
    this.drawnOf = series; // another run may have as many lines
    this.plots.replaceChildren();
    if (!data.step?.length) return el(this.plots, "p", "mod-note", "The curves begin with the first log line.");
    const each = width >= 640 ? (width - 24) / 2 : width, layers = columns.filter((name) => /^keep_\d+$/.test(name));
    this.plot(each, "loss, nats a token", data, [["loss", "", "mod-line"], ["eval_loss", "held out", "mod-line mod-held"]], null, (v) => number(v));
    const shade = (i) => css(ramp(layers.length > 1 ? 0.25 + (0.75 * i) / (layers.length - 1) : 0.8, this.scene.theme.dark));
    if (layers.length)
      this.plot(each, "kept by each routed layer", data, [
        ...layers.map((name, i) => [name, name.slice(5), "mod-thin", shade(i)]),
        ["keep_ratio", "mean", "mod-line"], ["target", "target", "mod-aim"]], [0, 1], percent);
  }

  // float32 [columns, rows] by name.
  read(columns) {
    const all = new Float32Array(bytes(this.scene.model.get("series"))), rows = columns.length ? all.length / columns.length : 0;
    return Object.fromEntries(columns.map((name, i) => [name, Array.from(all.subarray(i * rows, (i + 1) * rows))]));
  }

  plot(width, title, data, lines, range, format) {
    const steps = data.step, from = Math.min(...steps), to = Math.max(...steps);
    const values = lines.flatMap(([name]) => (data[name] || []).filter(Number.isFinite)), y = range || span(values, LEAST_LOSS);
    const plot = new Plot(this.plots, title, { width, height: 230, left: 52, right: 62, top: 28, bottom: 36 }, [from, to], y);
    plot.frame(ticks(...y, 4), format, to > from ? ticks(from, to, 5).filter(Number.isInteger) : [from], (v) => v.toLocaleString("en"), "step");
    const found = [];
    for (const [name, label, cls, stroke] of lines) {
      const at = steps.map((s, i) => [s, (data[name] || [])[i]]).filter(([, v]) => Number.isFinite(v));
      if (!at.length) continue;
      if (at.length === 1) plot.dot(...at[0], "", 3).setAttribute("fill", stroke || this.scene.theme.accent);
      plot.line(at, cls, stroke ? { stroke } : {});
      if (!label) continue;
      const last = at[at.length - 1][1], told = `${stroke ? `layer ${label}` : label}: ${format(last)}`;
      node(plot.line(at, "mod-near"), "title", {}, told);
      found.push([plot.up(last), label]);
    }
    const ends = roomFor(found, plot);
    // Names at the ends of the lines, so that none has to be told by its colour; pushed apart where they would meet.
    ends.sort((a, b) => a[0] - b[0]);
    ends.forEach((end, i) => { if (i) end[0] = Math.max(end[0], ends[i - 1][0] + 11); });
    for (let i = ends.length - 1, floor = plot.base + 4; i >= 0; i--) { ends[i][0] = Math.min(ends[i][0], floor); floor = ends[i][0] - 11; }
    for (const [at, label] of ends) plot.text(plot.end + 6, at + 4, label);
    plot.svg.setAttribute("aria-label", `${title}, up to step ${to}`);
    if (ends.length < found.length)
      el(this.plots, "p", "mod-note mod-look", "There is no room for all layers' names: point at a line for its own. "
        + `From the first layer to the last, lines get ${this.scene.theme.dark ? "brighter" : "darker"}.`);
  }
}

// Of the [height, name] of all lines those that are named: all where they have room one below the other; else mean and
// target, which come last, and of the layers those that do not meet a name.
function roomFor(ends, plot) {
  if (ends.length * 11 <= plot.base - plot.box.top + 15) return ends;
  const chosen = ends.slice(-2);
  for (const end of ends.slice(0, -2))
    if (chosen.every(([at], i) => Math.abs(at - end[0]) >= (i < 2 ? 22 : 11))) chosen.push(end); // mean and target may push each other
  return chosen;
}

const spell = (s) => (s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`);

VIEWS.training = { scene: Scene, title: "Training", about: (scene) => scene.model.get("summary").model, parts: () => [Training] };
