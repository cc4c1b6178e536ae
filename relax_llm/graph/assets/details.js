"use strict";
// What is known of one launch: tensors, kernels and their ranges, times, and the listings of its code.

const Details = (() => {
  const { element, shape } = View;

  function table(header, rows) {
    const head = element("tr", {}, ...header.map((name) => element("th", { scope: "col" }, name)));
    const body = rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, cell))));
    return element("div", { className: "scroll" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)));
  }

  function facts(rows) {
    const parts = rows.filter(([, value]) => value).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
    return element("dl", {}, ...parts);
  }

  function section(title, ...children) {
    return element("section", {}, element("h3", {}, title), ...children);
  }

  function link(page, index, go) {
    const node = page.graph.nodes[index];
    const made = element("button", { type: "button", className: "link" }, `${node.site} (${node.operator})`);
    made.addEventListener("click", () => go(index));
    return made;
  }

  function origin(page, index, place, go) {
    const argument = page.graph.nodes[index].arguments[place];
    if (argument.role === "output" || argument.role === "size" || argument.role === "weight") return "";
    const same = page.graph.nodes[index].arguments.slice(0, place).filter((other) => other.role === argument.role).length;
    const coming = page.graph.edges.filter((edge) => edge.target === index && edge.kind === argument.role);
    const edge = argument.role === "cache" ? coming.find((one) => one.name === argument.name) : coming[same];
    if (!edge) return "";
    return edge.source === null ? "the caller" : link(page, edge.source, go);
  }

  function tensors(page, index, go) {
    const node = page.graph.nodes[index];
    const rows = node.arguments.map((argument, place) => [
      element("span", {}, View.text("role", argument.role), argument.name ? View.text("tensor", argument.name) : null),
      View.text("sizes", `${argument.role === "size" ? "" : shape(argument.shape)} ${argument.dtype}`),
      origin(page, index, place, go),
    ]);
    const readers = page.graph.edges.filter((edge) => edge.source === index).map((edge) => edge.target);
    const unique = [...new Set(readers)];
    const list = unique.map((reader) => element("li", {}, reader === null ? "the caller" : link(page, reader, go)));
    return section(
      "Tensors",
      table(["tensor", "shape and type", "written by"], rows),
      list.length ? element("p", {}, "Read by:") : null,
      list.length ? element("ul", {}, ...list) : null,
    );
  }

  function kernels(choice) {
    const ranges = table(["sizes", "kernel"], choice.ranges.map((range) => [range.sizes, range.kernel]));
    if (!choice.candidates.length) return section("Kernels", ranges);
    const considered = table(
      ["kernel", "valid for", "why"],
      choice.candidates.map((candidate) => [candidate.kernel, candidate.sizes, candidate.reason]),
    );
    return section("Kernels", ranges, element("details", {}, element("summary", {}, "All that were considered"), considered));
  }

  function time(page, index) {
    if (!page.times) return null;
    const known = page.times[index];
    if (!known) return section("Time", element("p", {}, "The trace has no launch of it."));
    const served = Object.entries(known.kernels).map(([name, count]) => `${name} (${count})`);
    return section(
      "Time",
      facts([
        ["median", View.microseconds(known.microseconds)],
        ["launches", String(known.launches)],
        ["at", known.sizes],
        ["by", served.join(", ")],
        ["arithmetic", `${known.gflops.toFixed(1)} GFLOP/s`],
        ["memory", `${known.gbytes.toFixed(1)} GB/s`],
        ["of limit", `${(100 * known.limit).toFixed(0)}% of ${page.limits}`],
      ]),
    );
  }

  // Listings are gzipped in the page, since there are megabytes of them.
  async function unpacked(packed) {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  function listing(title, entry) {
    if (entry.refusal) return element("p", { className: "note" }, `${title}: ${entry.refusal}`);
    const code = element("pre", { tabIndex: 0 });
    const made = element("details", { className: "listing" }, element("summary", {}, `${title} (${entry.lines} lines)`), code);
    made.addEventListener("toggle", async () => {
      if (made.open && !code.textContent) code.textContent = await unpacked(entry.text);
    });
    return made;
  }

  function code(page, node) {
    if (page.no_listings) return section("Code", element("p", { className: "note" }, page.no_listings));
    const parts = (page.functions[node.symbol] || []).flatMap(({ name, forms }) => [
      element("h4", {}, name),
      ...forms.map((form) => listing(form.title, form)),
    ]);
    return section("Code", ...(parts.length ? parts : [element("p", { className: "note" }, "There is no listing of it.")]));
  }

  function show(panel, page, index, go) {
    const node = page.graph.nodes[index];
    const choice = page.choices[page.own[index]];
    panel.replaceChildren(
      element("h2", { tabIndex: -1 }, View.chip(node.operator), ` ${node.site}`),
      facts([
        ["launch", `${page.graph.function}[${index}]`],
        ["calls", node.symbol],
        ["problem", choice.problem],
        ["weight", choice.layout ? `stored ${choice.layout}` : ""],
        ["flops", node.flops],
        ["bytes", node.bytes],
      ]),
      ...[time(page, index), kernels(choice), tensors(page, index, go), code(page, node)].filter(Boolean),
    );
    panel.scrollTop = 0;
  }

  return { show };
})();
