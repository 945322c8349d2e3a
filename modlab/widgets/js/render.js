// The two ways in: `render` for anywidget, `showPage` for a page of its own. What VIEW is made of its file has put into
// VIEWS (pictures/script.py puts the files together).

function show(model, parent) {
  const root = el(parent, "div", "modlab"), view = VIEWS[VIEW];
  if (!view) throw new Error(`there is no view ${VIEW}`);
  root.dataset.view = VIEW;
  const store = new view.scene(model, root);
  if (view.title) {
    const title = el(root, "header", "mod-title");
    el(title, "h2", "", view.title);
    const about = el(title, "span", "mod-about");
    store.views.push({ draw() { about.textContent = view.about?.(store) ?? ""; } });
  }
  store.views.push(...view.parts(model).flatMap((part) => build(part, store, root)));
  store.update();
  // Python may ask for it before the view has a place on the page; no observer tells of that in a cell out of sight.
  let later = 0;
  const seek = () => {
    clearTimeout(later);
    if (!model.get("sought")) return;
    if (!root.isConnected) { later = setTimeout(seek, 100); return; }
    root.scrollIntoView({ block: "start" });
    model.set("sought", false);
    store.save();
  };
  model.on("change:sought", seek);
  seek();
  // JupyterLab writes its theme on the body, and at some other time its colours arrive; a page of its own follows the
  // system. The ground has a transition (style.css), whose beginning tells that the colours are there.
  const follow = () => store.update();
  for (const name of ["transitionrun", "transitionend"])
    root.addEventListener(name, (event) => { if (event.target === root) follow(); });
  const watch = new MutationObserver(follow), scheme = matchMedia("(prefers-color-scheme: dark)");
  watch.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name", "data-jp-theme-light", "class"] });
  scheme.addEventListener("change", follow);
  return () => {
    clearTimeout(later);
    model.off("change:sought", seek);
    watch.disconnect();
    scheme.removeEventListener("change", follow);
    store.destroy();
  };
}

// A part is a class, or a row of columns of parts.
function build(part, store, parent) {
  if (!Array.isArray(part)) return [new part(store, parent)];
  const row = el(parent, "div", "mod-row");
  return part.filter((column) => column.length).flatMap((column) => {
    const box = el(row, "div", "mod-row-column");
    return column.flatMap((inner) => build(inner, store, box));
  });
}

function render({ model, el: parent }) {
  try {
    return show(model, parent);
  } catch (error) { // else the output would stay blank, and only the browser's console would know
    showError(parent, error);
    throw error;
  }
}

function showError(parent, error) {
  const box = el(parent, "div", "modlab-error", `This view could not be drawn: ${error.message}\n${error.stack || ""}`);
  box.setAttribute("role", "alert");
}

// anywidget's model for a page without Jupyter: values and change events, nobody to send to.
class PlainModel extends EventTarget {
  constructor(values) { super(); this.values = values; }
  get(name) { return this.values[name]; }
  set(name, value) {
    if (this.values[name] === value) return;
    this.values[name] = value;
    this.dispatchEvent(new Event("change:" + name));
  }
  on(event, handler) { this.addEventListener(event, handler); }
  off(event, handler) { this.removeEventListener(event, handler); }
  save_changes() {}
  send() {}
}

function showPage(parent, values, binary) {
  for (const name of binary) values[name] = Uint8Array.from(atob(values[name]), (c) => c.charCodeAt(0)).buffer;
  try {
    show(new PlainModel(values), parent);
  } catch (error) {
    showError(parent, error);
    throw error;
  }
}

export default { render };
