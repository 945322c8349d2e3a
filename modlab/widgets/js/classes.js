// How much each routed layer keeps of each class of tokens, and at each place of the text. Tables, so that screen
// readers read them and people copy them.

class Classes {
  constructor(scene, parent) {
    this.scene = scene;
    this.bins = el(parent, "section");
    this.says = el(parent, "p", "mod-note modlab-classes-says");
    this.says.setAttribute("aria-live", "polite");
    this.tables = el(parent, "section", "mod-class-tables");
    scene.listen("change:summary", () => { this.drawnFor = ""; scene.update(); });
  }

  draw() {
    const { model, theme } = this.scene;
    if (this.drawnFor === theme.key) return;
    this.drawnFor = theme.key;
    this.bins.replaceChildren();
    this.tables.replaceChildren();
    const layers = model.get("layers"), summary = model.get("summary");
    el(this.bins, "p", "", `${summary.tokens.toLocaleString("en")} tokens of ${summary.texts.toLocaleString("en")} texts; `
      + `the routed layers keep ${percent(summary.keep_ratio)} of them on average. `
      + "Numbers in the cells are per cent; few tokens make uncertain shares.");
    this.table("Kept, by class of token", "class", model.get("classes"), layers, summary.keep_ratio);
    this.table("Kept, by position in the text", "token", model.get("positions"), layers, summary.keep_ratio);
  }

  table(title, first, rows, layers, mean) {
    const { theme } = this.scene, box = el(this.tables, "section"), count = rows.reduce((sum, row) => sum + row.tokens, 0);
    el(box, "h3", "", title);
    const scroll = el(box, "div", "mod-wide"), table = el(scroll, "table", "mod-table mod-matrix"), head = el(el(table, "thead"), "tr");
    for (const name of [first, "tokens", "share", ...layers.map((l) => `layer ${l}`), "mean"]) {
      const th = el(head, "th", "", name);
      th.scope = "col";
    }
    const body = el(table, "tbody");
    for (const row of rows) {
      const tr = el(body, "tr");
      const name = el(tr, "th", "", row.name);
      name.scope = "row";
      if (row.examples) name.title = row.examples;
      el(tr, "td", "", row.tokens.toLocaleString("en"));
      el(tr, "td", "", count ? percent(row.tokens / count) : "–");
      const kept = [...row.kept, row.tokens ? row.kept.reduce((a, b) => a + b, 0) / row.kept.length : null];
      kept.forEach((value, i) => {
        const td = el(tr, "td", "mod-cell", value === null ? "–" : String(Math.round(100 * value)));
        if (value === null) return;
        const rgb = ramp(value, theme.dark);
        td.style.background = css(rgb);
        td.style.color = inkOn(rgb);
        const where = i < layers.length ? `layer ${layers[i]}` : "all routed layers";
        const which = first === "token" ? `tokens at ${row.name}` : `tokens of class ${row.name}`;
        const such = row.examples ? `, such as ${row.examples}` : "";
        const says = `${where} keeps ${percent(value)} of the ${row.tokens.toLocaleString("en")} ${which}${such}.`;
        td.title = says;
        td.addEventListener("pointerenter", () => { this.says.textContent = says; });
      });
    }
  }
}

VIEWS.classes = { scene: Scene, title: "Which tokens are kept", about: (scene) => scene.model.get("summary").model, parts: () => [Classes] };
