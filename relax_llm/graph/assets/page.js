"use strict";
// The page: its state, and what keys and clicks do to it.

(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const at = (name) => document.getElementById(name);
  const list = at("rows");
  const svg = at("wires");
  const state = { open: new Set(), selected: null, found: null, query: "", near: null };
  let visible = [];
  let wires = [];

  const layers = page.parts.map((part) => part.layer).filter(Boolean);
  const layerOf = new Map(page.parts.flatMap((part) => part.nodes.map((index) => [index, part.layer])));

  // Layers with something that was searched for are open as long as it is searched for.
  function opened() {
    return state.found ? new Set([...state.open, ...[...state.found].map((index) => layerOf.get(index))]) : state.open;
  }

  function render() {
    const focused = document.activeElement && document.activeElement.closest("[data-key]");
    const key = focused && focused.dataset.key;
    visible = Layout.rows(page, opened());
    wires = Layout.wires(page, visible);
    const count = Layout.lanes(wires);
    View.draw(list, page, visible, state);
    View.connect(svg, list, wires, count);
    mark(state.near);
    if (key) focus(key);
  }

  function mark(key) {
    state.near = key;
    const place = visible.findIndex((row) => row.key === (key || `node ${state.selected}`));
    View.mark(svg, wires, place);
  }

  function focus(key) {
    const item = [...list.children].find((one) => one.dataset.key === key);
    if (item && item.firstElementChild.focus) item.firstElementChild.focus({ preventScroll: false });
    return item;
  }

  function toggle(layer, open) {
    if (open === undefined ? state.open.has(layer) : !open) state.open.delete(layer);
    else state.open.add(layer);
    render();
  }

  // Show a launch, wherever it is.
  function select(index) {
    state.selected = index;
    if (layerOf.get(index)) state.open.add(layerOf.get(index));
    at("details").hidden = false;
    document.body.classList.add("detailed");
    Details.show(at("panel"), page, index, go);
    location.replace(`#${index}`);
    render();
  }

  function go(index) {
    select(index);
    const item = focus(`node ${index}`);
    if (item) item.scrollIntoView({ block: "center" });
  }

  function close() {
    const index = state.selected;
    state.selected = null;
    at("details").hidden = true;
    document.body.classList.remove("detailed");
    location.replace("#");
    render();
    if (index !== null) focus(`node ${index}`);
  }

  function search(query) {
    state.query = query;
    state.found = Layout.search(page, query);
    at("found").textContent = state.found ? `${state.found.size} of ${page.graph.nodes.length} launches` : "";
    render();
    const first = list.querySelector(".node.match");
    if (first) first.scrollIntoView({ block: "nearest" });
  }

  function nextMatch() {
    const order = visible.filter((row) => row.kind === "node" && state.found && state.found.has(row.node)).map((row) => row.node);
    if (!order.length) return;
    const index = order[(order.indexOf(state.selected) + 1) % order.length];
    select(index);
    [...list.children].find((one) => one.dataset.key === `node ${index}`).scrollIntoView({ block: "center" });
  }

  function step(key) {
    const buttons = [...list.querySelectorAll("button.box")];
    const here = buttons.indexOf(document.activeElement);
    const last = buttons.length - 1;
    const there = { ArrowDown: here + 1, ArrowUp: here < 0 ? last : here - 1, Home: 0, End: last }[key];
    const button = buttons[Math.max(0, Math.min(last, there))];
    if (button) button.focus();
  }

  // Left folds the layer that the row is in, or is; right unfolds it.
  function fold(open) {
    const item = document.activeElement && document.activeElement.closest("[data-key]");
    const row = item && visible[Number(item.dataset.place)];
    if (!row || !row.layer) return;
    toggle(row.layer, open);
    if (!open) focus(`layer ${row.layer}`);
  }

  list.addEventListener("click", (event) => {
    const item = event.target.closest("[data-key]");
    const row = item && visible[Number(item.dataset.place)];
    if (row && row.kind === "layer") toggle(row.layer);
    if (row && row.kind === "node") select(row.node);
  });
  for (const name of ["mouseover", "focusin"]) {
    list.addEventListener(name, (event) => {
      const item = event.target.closest("[data-key]");
      mark(item ? item.dataset.key : null);
    });
  }
  list.addEventListener("mouseleave", () => mark(null));
  at("search").addEventListener("input", (event) => search(event.target.value));
  at("unfold").addEventListener("click", () => {
    state.open = new Set(layers);
    render();
  });
  at("fold").addEventListener("click", () => {
    state.open = new Set();
    render();
  });
  at("close").addEventListener("click", close);
  at("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const isTyping = event.target === at("search");
    if (event.key === "Escape") {
      if (isTyping || state.found) {
        at("search").value = "";
        search("");
        at("search").blur();
      } else if (state.selected !== null) close();
    } else if (isTyping) {
      if (event.key === "Enter") nextMatch();
    } else if (event.key === "/") {
      event.preventDefault();
      at("search").focus();
    } else if (["ArrowDown", "ArrowUp", "Home", "End"].includes(event.key) && !event.target.closest("#details")) {
      event.preventDefault();
      step(event.key);
    } else if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      fold(event.key === "ArrowRight");
    }
  });
  new ResizeObserver(() => {
    View.connect(svg, list, wires, Layout.lanes(wires));
    mark(state.near);
  }).observe(at("graph"));

  render();
  const named = Number(location.hash.slice(1));
  if (location.hash.length > 1 && page.graph.nodes[named]) go(named);
  document.body.dataset.ready = "true";
})();
