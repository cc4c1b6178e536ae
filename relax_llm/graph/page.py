"""A graph as one page that needs no network: the data, the style and the script are in it."""

import gzip
import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterable
from html import escape
from importlib import resources
from typing import Any

from relax_llm.artifact.artifact import Artifact
from relax_llm.artifact.listings import Listings
from relax_llm.errors import ArtifactError, InputError
from relax_llm.graph.data import as_data, choices, times
from relax_llm.graph.graph import Graph
from relax_llm.tracing.trace import Trace

SCRIPTS = ("layout.js", "view.js", "details.js", "page.js")
"""In the order in which they need each other; the first needs no browser."""

_DIGEST = re.compile(r"-[0-9a-f]{32}$")


def page(graph: Graph, artifact: Artifact, trace: Trace | None = None) -> str:
    """The text of the page.

    Args:
        graph: A function of the artifact.
        artifact: Where its kernels, their choices and their listings are.
        trace: Times to show beside the launches.

    Raises:
        InputError: The trace is of another function or another model.
    """
    manifest = artifact.manifest
    facts = [
        f"{manifest.architecture.rpartition('.')[2]}, {manifest.weight_format}, {manifest.target}",
        f"{len(graph.nodes)} launches",
    ]
    if trace is not None:
        facts.append(f"traced on a machine of {trace.limits}")
    parts = {
        "TITLE": escape(f"{graph.function} of {_model_name(artifact)}"),
        "FACTS": escape("; ".join(facts)),
        "STYLE": asset("page.css"),
        # JSON in a script element: nothing in it may end the element.
        "DATA": json.dumps(page_data(graph, artifact, trace)).replace("<", "\\u003c"),
        "SCRIPT": "\n".join(map(asset, SCRIPTS)),
    }
    pieces = asset("page.html").split("@")
    return "".join(parts[piece] if at % 2 else piece for at, piece in enumerate(pieces))


def page_data(graph: Graph, artifact: Artifact, trace: Trace | None = None) -> dict[str, Any]:
    """What the page's script is given; raises as `page` does."""
    traced = None if trace is None else times(graph, trace)
    found, own = choices(graph, artifact)
    functions, refusal = _functions(graph, artifact)
    return {
        "graph": as_data(graph, artifact),
        "parts": [{"layer": layer, "nodes": [node.index for node in nodes]} for layer, nodes in graph.parts],
        "choices": found,
        "own": own,
        "times": traced,
        "limits": None if trace is None else str(trace.limits),
        "functions": functions,
        "no_listings": refusal,
    }


def asset(name: str) -> str:
    """A file of the page."""
    return resources.files(__package__).joinpath("assets").joinpath(name).read_text(encoding="utf-8")


def _model_name(artifact: Artifact) -> str:
    """The directory's name, without what the cache adds to it."""
    return _DIGEST.sub("", artifact.path.resolve().name)


def _functions(graph: Graph, artifact: Artifact) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """The listings of what each launch calls and of the kernels that this may call; and why there are none."""
    try:
        listings = artifact.listings
        kernels = listings.index.kernels
    except ArtifactError as refusal:
        return {}, str(refusal)
    known: dict[str, dict[str, Any]] = {}

    def forms(symbol: str) -> dict[str, Any]:
        if symbol not in known:
            known[symbol] = {"name": symbol, "forms": list(_forms(listings, symbol))}
        return known[symbol]

    found = {}
    for symbol in dict.fromkeys(node.launch.kernel for node in graph.nodes):
        names = [symbol, *dict.fromkeys(kernels.get(symbol, {}).values())]
        found[symbol] = [forms(name) for name in names if name in listings.index.parameters]
    return found, ""


def _forms(listings: Listings, symbol: str) -> Iterable[dict[str, Any]]:
    listing = listings[symbol]
    if listing.source is not None:
        yield _form("Source", lambda: str(listing.source))
    yield _form("TIR", lambda: listing.tir)
    if symbol in listings.index.kernels:  # what a dispatcher has become is its kernels, which have theirs
        return
    yield _form("LLVM IR", lambda: listing.llvm)
    yield _form("Assembly", lambda: listing.assembly)


def _form(title: str, text: Callable[[], str]) -> dict[str, Any]:
    try:
        code = text()
    except (ArtifactError, InputError) as refusal:
        return {"title": title, "refusal": str(refusal)}
    packed = gzip.compress(code.encode(), mtime=0)
    return {"title": title, "lines": code.count("\n") + 1, "text": b64encode(packed).decode()}
