// What is selected, shared by all views of one text on the page, in whatever cell they are. Each widget runs its own
// copy of this script, so the meeting point hangs on the window.

const SELECTIONS = (globalThis[Symbol.for("modlab.selections.1")] ??= new Map());

class Selection extends EventTarget {
  constructor() {
    super();
    this.token = this.layer = this.textLayer = -1; // the cell pointed at; the layer that colours the text
    this.head = 0; // which of the layer's gates the cell is
    this.textHead = -1; // which of its gates colours the text, -1 for all of them
    this.locked = false;
  }

  set(change) {
    if (Object.keys(change).every((name) => this[name] === change[name])) return;
    Object.assign(this, change);
    this.dispatchEvent(new Event("change"));
  }
}

// The selection of all views with this group's name; "" has one to itself.
function selectionOf(group) {
  if (!group) return new Selection();
  if (!SELECTIONS.has(group)) SELECTIONS.set(group, new Selection());
  return SELECTIONS.get(group);
}
