"use strict";
// What is drawn where: from the graph and the layers that are open to rows, wires and lanes. No browser is needed.

const Layout = (() => {
  // One row for what comes in, each layer, each launch outside of layers or in an open one, and what goes out.
  function rows(page, open) {
    const found = [];
    const names = new Set(page.graph.edges.filter((edge) => edge.source === null).map((edge) => edge.name));
    for (const name of names) found.push({ kind: "input", key: `input ${name}`, name: name || "argument" });
    for (const part of page.parts) {
      if (part.layer) {
        const isOpen = open.has(part.layer);
        found.push({ kind: "layer", key: `layer ${part.layer}`, layer: part.layer, nodes: part.nodes, open: isOpen });
        if (!isOpen) continue;
      }
      part.nodes.forEach((index, place) =>
        found.push({
          kind: "node",
          key: `node ${index}`,
          node: index,
          layer: part.layer,
          last: place === part.nodes.length - 1,
        }),
      );
    }
    if (page.graph.edges.some((edge) => edge.target === null)) found.push({ kind: "output", key: "output", name: "result" });
    return found;
  }

  // For every launch the row that stands for it: its own, or that of its folded layer.
  function anchors(visible) {
    const places = new Map();
    visible.forEach((row, place) => {
      if (row.kind === "node") places.set(row.node, place);
      if (row.kind === "layer" && !row.open) row.nodes.forEach((index) => places.set(index, place));
    });
    return places;
  }

  // One wire for each tensor that leaves its row: from where, to which rows. Several tensors between the same two
  // rows are one wire.
  function wires(page, visible) {
    const places = anchors(visible);
    const rowOf = new Map(visible.map((row, place) => [row.key, place]));
    const found = new Map();
    page.graph.edges.forEach((edge, number) => {
      const from = edge.source === null ? rowOf.get(`input ${edge.name}`) : places.get(edge.source);
      const to = edge.target === null ? rowOf.get("output") : places.get(edge.target);
      if (from === undefined || to === undefined || from === to) return;
      const key = `${edge.kind} ${from} ${edge.source}`;
      if (!found.has(key)) {
        found.set(key, { key, kind: edge.kind, from, source: edge.source, to: [], edges: [], shape: edge.shape, dtype: edge.dtype });
      }
      const wire = found.get(key);
      wire.edges.push(number);
      if (!wire.to.includes(to)) wire.to.push(to);
    });
    return [...found.values()].map((wire) => routed(wire, visible));
  }

  // A tensor for the next row goes straight down; all else goes by a lane at the side.
  function routed(wire, visible) {
    const straight = [];
    const aside = [];
    for (const to of wire.to) {
      const between = visible.slice(Math.min(wire.from, to) + 1, Math.max(wire.from, to));
      const isNext = to > wire.from && between.every((row) => row.kind === "layer" && row.open);
      (isNext && wire.kind !== "cache" ? straight : aside).push(to);
    }
    return { ...wire, straight, aside, lane: -1 };
  }

  // Lanes so that no two wires lie on each other, short ones next to the rows.
  function lanes(all) {
    const count = { activation: 0, cache: 0 };
    for (const kind of Object.keys(count)) {
      const taken = [];
      const some = all.filter((wire) => wire.kind === kind && wire.aside.length);
      some.sort((a, b) => length(a) - length(b) || a.from - b.from);
      for (const wire of some) {
        const [top, bottom] = extent(wire);
        let lane = taken.findIndex((spans) => spans.every(([first, last]) => bottom <= first || last <= top));
        if (lane < 0) lane = taken.push([]) - 1;
        taken[lane].push([top, bottom]);
        wire.lane = lane;
      }
      count[kind] = taken.length;
    }
    return count;
  }

  function extent(wire) {
    const ends = [wire.from, ...wire.aside];
    return [Math.min(...ends), Math.max(...ends)];
  }

  function length(wire) {
    const [top, bottom] = extent(wire);
    return bottom - top;
  }

  // The launches that have every word of a query in their site, operator, problem or kernels.
  function search(page, query) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return null;
    const found = page.graph.nodes.filter((node, place) => {
      const choice = page.choices[page.own[place]];
      const kernels = choice.ranges.map((range) => range.kernel);
      const text = [node.site, node.operator, node.symbol, ...kernels].join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    return new Set(found.map((node) => node.index));
  }

  // Microseconds of some launches, as far as a trace knows them.
  function time(page, nodes) {
    if (!page.times) return null;
    const known = nodes.map((index) => page.times[index]).filter(Boolean);
    return known.length ? known.reduce((sum, one) => sum + one.microseconds, 0) : null;
  }

  return { rows, anchors, wires, lanes, search, time };
})();

if (typeof module !== "undefined") module.exports = Layout;
