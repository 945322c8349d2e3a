// How fast the model generates after this text, routed and dense: measured when asked for.
// uses: store job figures

class Speed {
  constructor(store, parent) {
    this.store = store;
    const { box, value, more } = figure(parent, "speed", "modlab-speed");
    this.value = value;
    this.more = more;
    this.ask = button(box, "Measure the speed", "time generate on this text", () => store.job.ask({ type: "speed" }));
    this.ask.classList.add("modlab-measure-speed");
    store.listen("change:speed", () => store.update());
  }

  draw() {
    const { store } = this, { routed, dense, p, tokens, device } = store.model.get("speed") || {};
    this.ask.disabled = store.job.running || !store.model.get("can_run");
    this.ask.textContent = routed ? "↻" : "Measure the speed";
    this.ask.title = routed ? "measure again: time generate on this text" : "time generate on this text";
    this.ask.setAttribute("aria-label", this.ask.title);
    this.value.hidden = !routed;
    if (!routed) {
      this.more.textContent = "tokens a second, time to the first token";
      return;
    }
    const ms = (key) => `${milliseconds(routed[key])}, dense ${milliseconds(dense[key])}`;
    this.value.textContent = `${number(Number((1000 / routed.next_ms).toPrecision(3)))} tok/s`;
    this.more.textContent = `${gain(dense.next_ms / routed.next_ms, "faster", "slower")}: a token ${ms("next_ms")} · first token ${ms("first_ms")}`
      + ` · after ${tokens.toLocaleString("en")} tokens, ${device}` + (p === store.threshold ? "" : `, at p ${chance(p)}`);
  }
}
