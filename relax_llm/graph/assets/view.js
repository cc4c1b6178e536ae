"use strict";
// The graph in the document: rows as buttons, wires as lines beside and between them.

const View = (() => {
  const LANE = 13;
  const SVG = "http://www.w3.org/2000/svg";

  function element(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (value === null || value === undefined) continue;
      if (name in made && !name.startsWith("aria")) made[name] = value;
      else made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  const text = (kind, value) => element("span", { className: kind }, value);
  const shape = (sizes) => `[${sizes.join(", ")}]`;

  function microseconds(value) {
    return value >= 1000 ? `${(value / 1000).toFixed(2)} ms` : `${value.toFixed(1)} us`;
  }

  // A bar as long as a part of the longest time that is shown.
  function bar(value, most) {
    const width = Math.max(1, Math.round((100 * value) / most));
    return element("span", { className: "time" }, element("i", { style: `width: ${width}%` }), microseconds(value));
  }

  function chip(operator) {
    const made = text("operator", operator);
    made.dataset.operator = operator;
    return made;
  }

  function content(page, row, most) {
    if (row.kind === "node") {
      const node = page.graph.nodes[row.node];
      const outputs = node.arguments.filter((argument) => argument.role === "output");
      const time = Layout.time(page, [row.node]);
      const name = row.layer ? node.site.slice(row.layer.length + 1) : node.site;
      return [
        chip(node.operator),
        text("name", name || node.site),
        text("symbol", node.symbol === node.site ? "" : node.symbol),
        text("shape", outputs.map((output) => shape(output.shape)).join(" ")),
        time === null ? null : bar(time, most),
      ];
    }
    if (row.kind === "layer") {
      const time = Layout.time(page, row.nodes);
      return [
        text("fold", row.open ? "▾" : "▸"),
        text("name", row.layer),
        text("symbol", `${row.nodes.length} launches`),
        time === null ? null : row.open ? text("shape", microseconds(time)) : bar(time, most),
      ];
    }
    const edge = page.graph.edges.find((one) => (row.kind === "input" ? one.source === null : one.target === null));
    return [text("name", row.name), text("shape", edge ? `${shape(edge.shape)} ${edge.dtype}` : "")];
  }

  function draw(list, page, visible, state) {
    const times = visible.map((row) =>
      row.kind === "node" ? Layout.time(page, [row.node]) : row.kind === "layer" && !row.open ? Layout.time(page, row.nodes) : 0,
    );
    const most = Math.max(1e-9, ...times.map((time) => time || 0));
    const items = visible.map((row, place) => {
      const isButton = row.kind === "node" || row.kind === "layer";
      const inner = element(isButton ? "button" : "div", { className: "box" }, ...content(page, row, most));
      if (isButton) inner.type = "button";
      if (row.kind === "layer") inner.setAttribute("aria-expanded", String(row.open));
      if (row.kind === "node" && row.node === state.selected) inner.setAttribute("aria-current", "true");
      const item = element("li", { className: `row ${row.kind}` }, inner);
      item.dataset.key = row.key;
      item.dataset.place = place;
      if (row.kind === "layer" && row.open) item.classList.add("open");
      if (row.kind === "node" && row.layer) item.classList.add("inside");
      if (row.last && row.layer) item.classList.add("last");
      if (state.found) {
        const nodes = row.kind === "node" ? [row.node] : row.nodes || [];
        item.classList.add(nodes.some((index) => state.found.has(index)) ? "match" : "dim");
      }
      return item;
    });
    list.replaceChildren(...items);
  }

  function line(kind, wire, path, arrow) {
    const made = document.createElementNS(SVG, "path");
    made.setAttribute("d", path);
    made.setAttribute("class", `wire ${kind}`);
    if (arrow) made.setAttribute("marker-end", `url(#arrow-${kind})`);
    made.dataset.wire = wire.key;
    const title = document.createElementNS(SVG, "title");
    title.textContent = `${shape(wire.shape)} ${wire.dtype}${kind === "cache" ? ", a cache written in place" : ""}`;
    made.append(title);
    return made;
  }

  function marker(kind) {
    const made = document.createElementNS(SVG, "marker");
    const attributes = { id: `arrow-${kind}`, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 9, markerHeight: 9, markerUnits: "userSpaceOnUse", orient: "auto" };
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    const tip = document.createElementNS(SVG, "path");
    tip.setAttribute("d", "M0 0 L8 4 L0 8 z");
    tip.setAttribute("class", `tip ${kind}`);
    made.append(tip);
    return made;
  }

  // Lines from row to row. Rows are where the browser has put them.
  function connect(svg, list, wires, count) {
    list.style.setProperty("--left", `${(count.activation + 1) * LANE + 4}px`);
    list.style.setProperty("--right", `${(count.cache + 1) * LANE + 4}px`);
    const origin = list.getBoundingClientRect();
    const boxes = [...list.children].map((item) => {
      const box = item.firstElementChild.getBoundingClientRect();
      return { left: box.left - origin.left, right: box.right - origin.left, top: box.top - origin.top, bottom: box.bottom - origin.top };
    });
    const full = { left: Math.min(...boxes.map((box) => box.left)), right: Math.max(...boxes.map((box) => box.right)) };
    const spine = (full.left + full.right) / 2;
    const drawn = [marker("activation"), marker("cache")];
    const arrivals = new Map();
    for (const wire of wires) {
      const from = boxes[wire.from];
      for (const to of wire.straight) {
        drawn.push(line(wire.kind, wire, `M${spine} ${from.bottom} L${spine} ${boxes[to].top - 1}`, true));
        const label = document.createElementNS(SVG, "text");
        label.setAttribute("class", "label");
        label.setAttribute("x", spine + 9);
        label.setAttribute("y", (from.bottom + Math.min(boxes[to].top, from.bottom + 26)) / 2 + 4);
        label.textContent = shape(wire.shape);
        label.dataset.wire = wire.key;
        drawn.push(label);
      }
      const places = [...wire.aside].sort((a, b) => Math.abs(a - wire.from) - Math.abs(b - wire.from));
      places.forEach((to, number) => {
        const isTrunk = number === places.length - 1 || (to - wire.from) * (places[number + 1] - wire.from) < 0;
        drawn.push(line(wire.kind, wire, beside(wire, from, boxes[to], full, arrivals, isTrunk), true));
      });
    }
    svg.setAttribute("width", origin.width);
    svg.setAttribute("height", origin.height);
    svg.replaceChildren(...drawn);
  }

  // Out of a row's lower half, along the lane, into the upper half of another. The farthest row's line is the trunk,
  // from which those to nearer rows branch off.
  function beside(wire, from, to, full, arrivals, isTrunk) {
    const onRight = wire.kind === "cache";
    const x = onRight ? full.right + (wire.lane + 1) * LANE : full.left - (wire.lane + 1) * LANE;
    const key = `${onRight} ${to.top}`;
    const arrival = arrivals.get(key) || 0;
    arrivals.set(key, arrival + 1);
    const begin = onRight ? from.right : from.left;
    const end = onRight ? to.right : to.left;
    const y0 = from.top + 0.7 * (from.bottom - from.top);
    const y1 = Math.min(to.top + 8 + 6 * arrival, to.bottom - 4);
    const bend = Math.min(6, Math.abs(y1 - y0) / 2);
    const out = onRight ? 1 : -1;
    const down = y1 >= y0 ? 1 : -1;
    const trunk = `M${begin} ${y0} L${x - out * bend} ${y0} Q${x} ${y0} ${x} ${y0 + down * bend} L`;
    return `${isTrunk ? trunk : "M"}${x} ${y1 - down * bend} Q${x} ${y1} ${x - out * bend} ${y1} L${end + out} ${y1}`;
  }

  // Show which tensors a row takes and gives.
  function mark(svg, wires, place) {
    const near = new Set(wires.filter((wire) => wire.from === place || wire.to.includes(place)).map((wire) => wire.key));
    svg.classList.toggle("marked", near.size > 0);
    for (const part of svg.querySelectorAll("[data-wire]")) part.classList.toggle("near", near.has(part.dataset.wire));
  }

  return { element, text, shape, microseconds, chip, draw, connect, mark };
})();
