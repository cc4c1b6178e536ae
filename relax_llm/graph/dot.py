"""A graph in the language of Graphviz: layers are clusters, tensors are labels of edges."""

from relax_llm.graph.graph import Edge, Graph, Node


def dot(graph: Graph) -> str:
    """The text of a .dot file."""
    lines = [
        f"digraph {_quoted(graph.function)} {{",
        '  node [shape=box, style=rounded, fontname="sans-serif", fontsize=10];',
        '  edge [fontname="sans-serif", fontsize=8];',
    ]
    for number, (layer, nodes) in enumerate(graph.parts):
        made = [f"n{node.index} [label={_label(node, layer)}];" for node in nodes]
        if layer:
            lines += [f"  subgraph cluster_{number} {{", f"    label={_quoted(layer)};"]
            lines += [f"    {line}" for line in made]
            lines.append("  }")
        else:
            lines += [f"  {line}" for line in made]
    for place, end in (("source", "argument"), ("target", "result")):
        names = dict.fromkeys(_end(edge, end) for edge in graph.edges if getattr(edge, place) is None)
        lines += [f"  {_quoted(name)} [shape=plain];" for name in names]
    for edge in graph.edges:
        source = _quoted(_end(edge, "argument")) if edge.source is None else f"n{edge.source}"
        target = _quoted(_end(edge, "result")) if edge.target is None else f"n{edge.target}"
        style = ", style=dashed" if edge.kind == "cache" else ""
        shape = _quoted(f"[{', '.join(edge.shape)}]")
        lines.append(f"  {source} -> {target} [label={shape}{style}];")
    return "\n".join([*lines, "}", ""])


def _end(edge: Edge, unnamed: str) -> str:
    return edge.name or unnamed


def _label(node: Node, layer: str) -> str:
    site = node.launch.site.removeprefix(f"{layer}.") if layer else node.launch.site
    return _quoted(f"{site}: {node.operator}", node.launch.kernel)


def _quoted(*lines: str) -> str:
    r"""Lines as one string of the language, in which a line ends with \n."""
    texts = [line.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") for line in lines]
    return '"' + "\\n".join(texts) + '"'
