"""`relax-llm inspect` shows the graph of a function: as a page, in Graphviz's language, as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import relax_llm as rl
from relax_llm.graph.dot import dot
from relax_llm.graph.graph import graph_of

from .conftest import edit_manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Outcome


@pytest.fixture(scope="module")
def loaded(artifact: Path) -> rl.Artifact:
    return rl.load(artifact)


def _data(text: str) -> Any:
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def test_a_page(call: Callable[..., Outcome], artifact: Path, tmp_path: Path, loaded: rl.Artifact) -> None:
    file, traced = tmp_path / "graph.html", tmp_path / "trace.json"
    assert call("trace", artifact, "-n", 2, "-o", traced, "--limits", "100,10").code == 0
    done = call("inspect", artifact, "--graph", file, "--function", "prefill", "--trace", traced)
    assert (done.code, done.out) == (0, "")
    assert done.err.splitlines()[-1] == f"The graph of prefill is in {file}; open it in a browser."
    data = _data(file.read_text())
    assert data["graph"]["function"] == "prefill"
    assert len(data["graph"]["nodes"]) == len(loaded.manifest.functions["prefill"])
    assert all(time["launches"] == 1 for time in data["times"])


def test_in_the_language_of_graphviz(
    call: Callable[..., Outcome], artifact: Path, loaded: rl.Artifact
) -> None:
    assert call("inspect", artifact, "--dot").out == dot(graph_of(loaded, "decode"))
    assert call("inspect", artifact, "--dot", "--function", "hidden").out == dot(graph_of(loaded, "hidden"))


def test_as_json(call: Callable[..., Outcome], artifact: Path, loaded: rl.Artifact) -> None:
    graph = call("inspect", artifact, "--json").json["graph"]
    found = graph_of(loaded, "decode")
    assert [node["site"] for node in graph["nodes"]] == [node.launch.site for node in found.nodes]
    assert [(edge["source"], edge["target"]) for edge in graph["edges"]] == [
        (edge.source, edge.target) for edge in found.edges
    ]
    assert call("inspect", artifact, "--json", "--function", "hidden").json["graph"]["function"] == "hidden"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--trace", "trace.json"], "--trace goes with --graph FILE.html."),
        (
            ["--graph", "nowhere/graph.html"],
            "nowhere/graph.html cannot be written: there is no directory nowhere.",
        ),
        (["--graph", "graph.html", "--function", "train"], "There is no function 'train'; the functions are"),
        (["--dot", "--function", "train"], "There is no function 'train'; the functions are"),
        (
            ["--graph", "graph.html", "--trace", "missing.json"],
            "The trace missing.json cannot be read: No such",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(
    call: Callable[..., Outcome],
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("inspect", artifact, *flags)
    assert (done.code, done.out) == (2, "")
    assert expected in done.err
    assert not list(tmp_path.iterdir())


def test_a_trace_of_another_function(call: Callable[..., Outcome], artifact: Path, tmp_path: Path) -> None:
    file, traced = tmp_path / "graph.html", tmp_path / "trace.json"
    call("trace", artifact, "-n", 0, "-o", traced, "--limits", "100,10")
    done = call("inspect", artifact, "--graph", file, "--trace", traced)
    assert done.code == 2
    assert "The trace has no call of decode, but of prefill." in done.err
    assert not file.exists()


def test_an_artifact_that_cannot_run_here(
    call: Callable[..., Outcome], copy_of_artifact: Path, tmp_path: Path
) -> None:
    """Its kernels can be listed; its graph is in a library that cannot be loaded."""
    edit_manifest(copy_of_artifact, lambda manifest: manifest.update(target="s390x", features=[]))
    done = call("inspect", copy_of_artifact, "--json")
    assert done.code == 0
    assert "graph" not in done.json
    assert "There is no graph in this: " in done.err
    refused = call("inspect", copy_of_artifact, "--graph", tmp_path / "graph.html")
    assert refused.code == 2
    assert "was compiled for s390x" in refused.err
