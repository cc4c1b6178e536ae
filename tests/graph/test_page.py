"""The page of a graph: its data, that it needs nothing else, and that its script lays it out."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from relax_llm.artifact.artifact import Artifact
from relax_llm.artifact.listings import LISTINGS
from relax_llm.graph.data import as_data
from relax_llm.graph.graph import graph_of
from relax_llm.graph.page import SCRIPTS, asset, page, page_data
from tests.tracing.traces import HOSTILE

if TYPE_CHECKING:
    from pathlib import Path

    import relax_llm as rl
    from relax_llm.tracing.trace import Trace


class Elements(HTMLParser):
    """The elements of a page with their attributes, and what is in its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


def data_of(text: str) -> Any:
    """The data in a page."""
    return json.loads(Elements(text).scripts[0])


def unpacked(packed: str) -> str:
    return gzip.decompress(b64decode(packed)).decode()


@pytest.fixture(scope="module")
def text(runner: rl.Runner, trace: Trace) -> str:
    """The page of a decode, with times."""
    return page(graph_of(runner.artifact, "decode"), runner.artifact, trace)


@pytest.fixture(scope="module")
def unlisted(runner: rl.Runner) -> Artifact:
    """The artifact without its listings."""
    manifest = runner.artifact.manifest
    files = {name: file for name, file in manifest.files.items() if name != LISTINGS}
    return Artifact(runner.artifact.path, replace(manifest, files=files))


def test_it_needs_nothing_else(text: str) -> None:
    elements = Elements(text)
    for tag, attributes in elements.found:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not attributes.keys() & {"src", "href", "onclick", "onload"}
    policy = next(
        attributes["content"]
        for tag, attributes in elements.found
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    script = "".join(map(asset, SCRIPTS))
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|innerHTML|eval\(", script)
    assert "url(" not in asset("page.css")
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", script)


def test_its_data_is_the_graphs(runner: rl.Runner, text: str, unlisted: Artifact) -> None:
    found = graph_of(runner.artifact, "decode")
    data = data_of(text)
    assert data["graph"] == json.loads(json.dumps(as_data(found, runner.artifact)))
    assert [part["layer"] for part in data["parts"]] == ["", "", "layers.0", "layers.1", "", ""]
    assert len(data["times"]) == len(data["own"]) == len(data["graph"]["nodes"]) == len(found.nodes)
    assert data["limits"] == "100 GFLOP/s, 10.0 GB/s"
    without = data_of(page(found, unlisted))
    assert without["times"] is without["limits"] is None


def test_listings_are_those_of_the_artifact(runner: rl.Runner) -> None:
    artifact = runner.artifact
    data = page_data(graph_of(artifact, "prefill"), artifact)
    assert data["no_listings"] == ""
    assert data["functions"].keys() == {node["symbol"] for node in data["graph"]["nodes"]}
    for symbol, functions in data["functions"].items():
        assert functions[0]["name"] == symbol
        kernels = artifact.listings.index.kernels.get(symbol, {})
        assert {one["name"] for one in functions[1:]} == set(kernels.values())
        for one in functions:
            listing = artifact.listing(one["name"])
            forms = {form["title"]: form for form in one["forms"]}
            assert unpacked(forms["TIR"]["text"]) == listing.tir
            assert ("Source" in forms) == (listing.source is not None)
            if one["name"] not in artifact.listings.index.kernels:
                assert unpacked(forms["LLVM IR"]["text"]) == listing.llvm
                assert unpacked(forms["Assembly"]["text"]) == listing.assembly
                assert forms["Assembly"]["lines"] == listing.assembly.count("\n") + 1


def test_an_artifact_without_listings(unlisted: Artifact) -> None:
    data = page_data(graph_of(unlisted, "decode"), unlisted)
    assert data["functions"] == {}
    assert "has no listings of its kernels; compile the artifact again" in data["no_listings"]


def test_names_that_want_to_be_more(unlisted: Artifact) -> None:
    """What a manifest says ends no element and begins none."""
    found = graph_of(unlisted, "decode")
    first = found.nodes[0]
    node = replace(first, group="", launch=replace(first.launch, site=f"</script>{HOSTILE}"))
    manifest = replace(unlisted.manifest, architecture=HOSTILE)
    text = page(replace(found, nodes=(node, *found.nodes[1:])), Artifact(unlisted.path, manifest))
    elements = Elements(text)
    assert [tag for tag, _ in elements.found].count("script") == 2
    assert json.loads(elements.scripts[0])["graph"]["nodes"][0]["site"] == f"</script>{HOSTILE}"
    assert "alert" not in elements.scripts[1]


def test_the_marks_of_the_template_are_all_filled(text: str) -> None:
    for mark in ("TITLE", "FACTS", "STYLE", "DATA", "SCRIPT"):
        assert f"@{mark}@" not in text
    assert "<title>decode of " in text
    assert "@media" in text


LAYOUT = """
const Layout = require(process.argv[1]);
const page = JSON.parse(require("fs").readFileSync(0, "utf8"));
const layers = page.parts.map((part) => part.layer).filter(Boolean);
const shown = (open) => {
  const rows = Layout.rows(page, new Set(open));
  const wires = Layout.wires(page, rows);
  const count = Layout.lanes(wires);
  return { rows, wires, count };
};
const found = (query) => { const set = Layout.search(page, query); return set && [...set].sort((a, b) => a - b); };
console.log(JSON.stringify({
  folded: shown([]), first: shown([layers[0]]), all: shown(layers),
  searches: ["", "  ", "attention", "LAYERS.1 norm", "nothing like it", "tiled layers.0"].map(found),
  time: Layout.time(page, page.parts[2].nodes),
}));
"""

node = pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")


@pytest.fixture(scope="module")
def laid_out(text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The data of a page, and what the script makes of it without a browser."""
    data = data_of(text)
    file: Path = tmp_path_factory.mktemp("layout") / "layout.js"
    file.write_text(asset("layout.js"))
    done = subprocess.run(
        ["node", "-e", LAYOUT, str(file)], input=json.dumps(data), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return data, json.loads(done.stdout)


@node
@pytest.mark.parametrize("way", ["folded", "first", "all"])
def test_rows_and_wires(laid_out: tuple[Any, Any], way: str) -> None:
    """Every launch has a row, every tensor between rows a wire that ends at who reads it, and no lane two at once."""
    data, found = laid_out
    rows, wires = found[way]["rows"], found[way]["wires"]
    place = {}
    for number, row in enumerate(rows):
        if row["kind"] == "node":
            place[row["node"]] = number
        elif row["kind"] == "layer" and not row["open"]:
            place |= dict.fromkeys(row["nodes"], number)
    assert place.keys() == {one["index"] for one in data["graph"]["nodes"]}
    assert len({row["key"] for row in rows}) == len(rows)
    ends = {None: len(rows) - 1, **place}
    expected = set()
    for edge in data["graph"]["edges"]:
        source = 0 if edge["source"] is None else place[edge["source"]]
        if source != ends[edge["target"]]:
            expected.add((source, ends[edge["target"]], edge["kind"]))
    assert {(wire["from"], to, wire["kind"]) for wire in wires for to in wire["to"]} == expected
    assert all(to > wire["from"] for wire in wires for to in wire["to"]), "downwards"
    taken: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for wire in wires:
        assert sorted(wire["straight"] + wire["aside"]) == sorted(wire["to"])
        for to in wire["straight"]:
            between = rows[wire["from"] + 1 : to]
            assert all(row["kind"] == "layer" and row["open"] for row in between), "through no box"
        if wire["aside"]:
            assert wire["lane"] >= 0
            taken.setdefault((wire["kind"], wire["lane"]), []).append((wire["from"], max(wire["aside"])))
    for spans in taken.values():
        spans.sort()
        assert all(first[1] <= second[0] for first, second in pairwise(spans))
    lanes = {
        kind: 1 + max((lane for of, lane in taken if of == kind), default=-1)
        for kind in ("activation", "cache")
    }
    assert found[way]["count"] == lanes


@node
def test_residuals_and_caches_are_wires_of_their_own(laid_out: tuple[Any, Any]) -> None:
    data, found = laid_out
    nodes = data["graph"]["nodes"]
    rows = found["all"]["rows"]

    def operator(place: int) -> str:
        return str(nodes[rows[place]["node"]]["operator"])

    aside = {
        (operator(wire["from"]), operator(to), wire["kind"])
        for wire in found["all"]["wires"]
        for to in wire["aside"]
    }
    assert aside == {
        ("matmul", "matmul", "activation"),  # what is added again behind attention and the MLP
        ("embedding", "norm", "activation"),
        ("embedding", "matmul", "activation"),
        ("rope_table", "append", "activation"),
        ("append", "attention", "cache"),
    }


@node
def test_search_and_time(laid_out: tuple[Any, Any]) -> None:
    data, found = laid_out
    nodes = data["graph"]["nodes"]
    nothing, blank, attention, norms, none, tiled = found["searches"]
    assert nothing is blank is None
    assert attention == [
        one["index"] for one in nodes if "attention" in f"{one['site']} {one['symbol']} {one['operator']}"
    ]
    assert norms == [
        one["index"]
        for one in nodes
        if one["site"].startswith("layers.1.") and "norm" in f"{one['site']} {one['symbol']}"
    ]
    assert none == []
    assert {nodes[index]["operator"] for index in tiled} == {"matmul"}
    assert found["time"] == pytest.approx(
        sum(data["times"][index]["microseconds"] for index in data["parts"][2]["nodes"])
    )


@node
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_well_formed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(asset(name))
    done = subprocess.run(["node", "--check", tmp_path / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
