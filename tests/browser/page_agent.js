// Runs in JupyterLab's page: counts kernel messages, so that 'idle' is a fact, and keeps errors that no cell shows.
// Needs window.jupyterapp (--LabApp.expose_app_in_browser). Evaluated once a notebook; the functions stay on window.

window.nbInstall = () => {
  if (window.__nb) return;
  const panel = window.jupyterapp.shell.currentWidget, sc = panel.sessionContext;
  const nb = window.__nb = {pending: new Map(), lastMessage: performance.now(), lastMutation: performance.now(),
    errors: [], statuses: [], run: null};
  const onMessage = (_, {msg, direction}) => {
    const type = msg.header.msg_type, parent = msg.parent_header || {};
    nb.lastMessage = performance.now();
    if (direction === 'send') {
      if (msg.channel === 'shell') nb.pending.set(msg.header.msg_id, type);
    } else if (msg.channel === 'iopub') {
      if (type === 'status' && msg.content.execution_state === 'idle') nb.pending.delete(parent.msg_id);
      // An exception in a widget callback reaches no cell: JupyterLab only puts it in its log console.
      if (type === 'error') nb.errors.push({parent: parent.msg_type, ename: msg.content.ename,
        evalue: msg.content.evalue, traceback: (msg.content.traceback || []).join('\n')});
    }
  };
  const hook = kernel => {
    if (!kernel || kernel === nb.kernel) return;
    nb.kernel = kernel; nb.pending.clear();
    kernel.anyMessage.connect(onMessage);
    kernel.statusChanged.connect((_, s) => { nb.statuses.push(s); nb.lastMessage = performance.now(); });
  };
  sc.kernelChanged.connect((_, change) => hook(change.newValue));
  hook(sc.session && sc.session.kernel);
  new MutationObserver(() => { nb.lastMutation = performance.now(); }).observe(panel.content.node,
    {childList: true, subtree: true, characterData: true, attributes: true});
};

window.nbState = () => {
  const nb = window.__nb, panel = window.jupyterapp.shell.currentWidget, now = performance.now();
  const running = panel.content.widgets.map((c, i) => [c, i]).filter(([c]) => c.model.type === 'code' &&
    (c.model.executionState === 'running' || (c.promptNode || c.node).textContent.includes('[*]')));
  return {run: nb.run, pending: nb.pending.size, kernel: nb.kernel ? nb.kernel.status : 'none',
    quiet: now - nb.lastMessage, still: now - nb.lastMutation,
    dead: nb.statuses.filter(s => ['autorestarting', 'dead'].includes(s)).length,
    loading: [...panel.content.node.querySelectorAll('.jp-OutputArea-output')]
      .some(n => n.textContent.trim() === 'Loading widget...'),
    running: running.map(([c, i]) => ({cell: i, source: c.model.sharedModel.getSource().slice(0, 200)})),
    dialog: [...document.querySelectorAll('.jp-Dialog')].map(d => d.innerText).join('\n')};
};

window.nbProblems = (broken) => {
  const panel = window.jupyterapp.shell.currentWidget, nb = window.__nb, found = [];
  const re = new RegExp(broken.join('|'));
  const area = n => { const r = n.getBoundingClientRect(); return r.width * r.height; };
  const hidden = n => { for (; n && n !== panel.node; n = n.parentElement)
    { const s = getComputedStyle(n); if (s.display === 'none' || s.visibility === 'hidden') return true; } return false; };
  const told = [];
  panel.content.widgets.forEach((cell, i) => {
    const m = cell.model;
    if (m.type !== 'code') return;
    const source = m.sharedModel.getSource(), may = (m.getMetadata('tags') || []).includes('raises-exception');
    if (source.trim() && m.executionCount === null) found.push({kind: 'not executed', cell: i, text: source.slice(0, 200)});
    for (let j = 0; j < m.outputs.length; j++) {
      const out = m.outputs.get(j).toJSON();
      if (out.output_type === 'error') {
        told.push(out.ename + out.evalue);
        if (!may) found.push({kind: 'cell error', cell: i, text: (out.traceback || []).join('\n') || out.ename + ': ' + out.evalue});
      }
      if (out.data && out.data['application/vnd.jupyter.widget-view+json']) {
        const view = cell.outputArea.widgets[j], text = view ? view.node.innerText : '';
        if (!view || !view.node.querySelector('.jp-OutputArea-output > .lm-Widget'))
          found.push({kind: 'widget not rendered', cell: i, text: text || 'no element of the widget is in the page'});
      }
    }
    const bad = cell.outputArea.node.innerText.match(re);
    if (bad) found.push({kind: 'broken output', cell: i, text: bad[0] + '\n' + cell.outputArea.node.innerText.slice(0, 1500)});
    // A custom widget that drew nothing at all. ipywidgets' own (class widget-...) may be empty on purpose;
    // the element of an anywidget carries no class but lm-Widget and what its own code adds.
    cell.outputArea.node.querySelectorAll('.jp-OutputArea-output .lm-Widget').forEach(n => {
      const known = [...n.classList].some(c => /^(jupyter-widgets|widget-|jp-|lm-)/.test(c) && c !== 'lm-Widget');
      if (!known && !n.querySelector('.lm-Widget') && area(n) === 0 && !hidden(n))
        found.push({kind: 'empty widget', cell: i, text: 'a custom widget has no size on the screen: ' + n.outerHTML.slice(0, 300)});
    });
  });
  nb.errors.filter(e => !told.includes(e.ename + e.evalue)).forEach(e =>
    found.push({kind: e.parent === 'comm_msg' ? 'widget callback error' : 'hidden error', cell: null,
                text: e.traceback || e.ename + ': ' + e.evalue}));
  document.querySelectorAll('.jp-Dialog').forEach(d => found.push({kind: 'dialog', cell: null, text: d.innerText}));
  nb.statuses.filter(s => ['autorestarting', 'dead'].includes(s)).slice(0, 1).forEach(s =>
    found.push({kind: 'kernel died', cell: null, text: 'kernel status: ' + s}));
  return found;
};

// Code in the kernel, outside of all cells.
window.nbPython = async code => {
  const future = window.__nb.kernel.requestExecute({code, store_history: false}), said = {text: '', error: ''};
  future.onIOPub = msg => {
    if (msg.header.msg_type === 'stream') said.text += msg.content.text;
    if (msg.header.msg_type === 'error') said.error = msg.content.traceback.join('\n');
  };
  await future.done;
  return said;
};
