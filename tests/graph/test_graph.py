"""Which launch reads what another wrote: as the memory says while the model runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

import relax_llm as rl
from relax_llm.artifact.manifest import Argument, Launch
from relax_llm.errors import ArtifactError, InputError
from relax_llm.graph.data import as_data, choices, times
from relax_llm.graph.dot import dot
from relax_llm.graph.graph import Edge, Graph, Node, graph, graph_of
from relax_llm.runtime.program import (
    VOID,
    Argument as Given,
    Call,
    Function,
    Kind,
    Program,
    Return,
    Source,
)
from relax_llm.tracing.limits import Limits
from relax_llm.tracing.trace import Trace
from tests.artifact.checkpoints import GPT2, write
from tests.docs.markdown import ROOT
from tests.runtime import dispatching
from tests.tracing.traces import HOSTILE

if TYPE_CHECKING:
    from pathlib import Path

FUNCTIONS = ("prefill", "decode", "logits", "hidden")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, plainer_machine: None) -> rl.Runner:
    """As tests/runtime has it: the cache has it, too."""
    return rl.Runner(rl.compile(write(tmp_path_factory.mktemp("m") / "gpt2", {**GPT2, "n_positions": 400})))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_edges_are_what_memory_says(runner: rl.Runner, gpt2: rl.Runner, family: str, function: str) -> None:
    """Stepped through: what a launch reads lies where the launch that its edge names wrote last."""
    model = runner if family == "llama" else gpt2
    found = graph_of(model.artifact, function)
    ids: Any = 3 if function == "decode" else [3, 1, 2]
    state = model.start()
    model.prefill(state, [5, 6])
    written: dict[int, int] = {}
    expected: list[tuple[int | None, int, str]] = []
    for launch in model.steps(function, state, ids):
        for operand in launch.arguments:
            if operand.role == "size":
                continue
            at = operand.value.ctypes.data
            if operand.role == "activation":
                expected.append((written.get(at), launch.index, "activation"))
            elif operand.role == "cache":
                if at in written:
                    expected.append((written[at], launch.index, "cache"))
                if launch.operator == "append":
                    written[at] = launch.index
            elif operand.role == "output":
                written[at] = launch.index
    given = [(edge.source, edge.target, edge.kind) for edge in found.edges if edge.target is not None]
    assert given == expected
    last = found.edges[-1]
    assert (last.source, last.target) == (len(found.nodes) - 1, None)
    assert len(found.nodes) == len(model.artifact.manifest.functions[function])
    # One tensor comes from the caller; everything else was written by a launch before.
    assert {edge.name for edge in found.edges if edge.source is None} == {"token_ids"}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_parts(runner: rl.Runner, function: str) -> None:
    found = graph_of(runner.artifact, function)
    layers = [name for name, _ in found.parts if name]
    assert layers == ["layers.0", "layers.1"]
    order = [node.index for _, nodes in found.parts for node in nodes]
    assert sorted(order) == list(range(len(found.nodes)))
    place = {index: at for at, index in enumerate(order)}
    for edge in found.edges:
        if edge.source is not None and edge.target is not None:
            assert place[edge.source] < place[edge.target], "tensors go downwards"
    for name, nodes in found.parts:
        if name:
            assert len(nodes) == 8 + (function == "prefill")  # in each layer one choice of the last token
            assert all(node.launch.site.startswith(f"{name}.") for node in nodes)


def _node(index: int, group: str, site: str = "") -> Node:
    output = Argument("output", "", ("4",), "float32")
    return Node(index, group, Launch(site or f"{group}.x", "kernel", (output,)), "fused")


def test_layers_in_a_circle_stay_in_the_order_of_the_program() -> None:
    nodes = (_node(0, "a.0"), _node(1, "a.1"), _node(2, "a.0"))
    edges = tuple(Edge(one, one + 1, "activation", "", ("4",), "float32") for one in range(2))
    parts = Graph("f", nodes, edges).parts
    assert [(name, [node.index for node in some]) for name, some in parts] == [("a.0", [0, 2]), ("a.1", [1])]


def test_tensors_under_other_names(tmp_path: Path) -> None:
    """Tuples and reshapes pass on what they were given; memory that is allocated anew was written by nobody."""
    artifact = dispatching.make(
        tmp_path / "artifact",
        functions={
            name: tuple(
                Launch(
                    f"s{number}",
                    "copy",
                    (Argument("activation", "", ("4",), "f"), Argument("output", "", ("4",), "f")),
                )
                for number in range(3)
            )
            for name in ("prefill", "decode")
        },
    )
    names = (
        "copy",
        "vm.builtin.make_tuple",
        "vm.builtin.tuple_getitem",
        "vm.builtin.reshape",
        "vm.builtin.null_value",
    )

    def call(function: int, target: int, *registers: int, last: int | None = None) -> Call:
        given = [Given(Source.REGISTER, register) for register in registers]
        given += [] if last is None else [Given(Source.IMMEDIATE, last)]
        return Call(target, function, tuple(given))

    instructions = (
        call(0, VOID, 0, 1),  # launch 0: argument -> %1
        call(3, 2, 1, 0),  # %2 is %1, reshaped
        call(1, 3, 0, 2),  # %3 is (argument, %2)
        call(2, 4, 3, last=1),  # %4 is %2
        call(0, VOID, 4, 5),  # launch 1 reads what launch 0 wrote
        call(4, 1),  # %1 is let go
        call(0, VOID, 1, 6),  # launch 2 reads what nobody wrote
        Return(5),
    )
    table = (
        *(Function(Kind.PACKED, name) for name in names),
        Function(Kind.BYTECODE, "decode", 0, 8, 1, 7, ("x",)),
    )
    found = graph(artifact, Program(table, (), instructions), "decode")
    ends = [(edge.source, edge.target, edge.name) for edge in found.edges]
    assert ends == [(None, 0, "x"), (0, 1, ""), (None, 2, ""), (1, None, "")]


def test_refusals(runner: rl.Runner, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no function 'train'; the functions are decode, "):
        graph_of(runner.artifact, "train")
    short = {**dispatching.FUNCTIONS, "decode": dispatching.FUNCTIONS["decode"][:-1]}
    with pytest.raises(ArtifactError, match="launches other kernels in decode than the manifest says"):
        graph_of(dispatching.make(tmp_path / "short", functions=short), "decode")
    more = {**dispatching.FUNCTIONS, "decode": (*dispatching.FUNCTIONS["decode"], *short["decode"][:1])}
    with pytest.raises(ArtifactError, match="makes fewer launches in decode than the manifest says"):
        graph_of(dispatching.make(tmp_path / "more", functions=more), "decode")


def test_choices_are_the_plans(runner: rl.Runner) -> None:
    found = graph_of(runner.artifact, "prefill")
    known, own = choices(found, runner.artifact)
    for node, number in zip(found.nodes, own, strict=True):
        choice = known[number]
        assert choice["symbol"] == node.launch.kernel
        entries = [
            entry
            for entry in runner.artifact.plan.entries
            if node.launch.site in entry.sites and entry.operator == node.operator
        ]
        assert choice["problem"] in {entry.problem for entry in entries}
        (entry,) = (entry for entry in entries if entry.problem == choice["problem"])
        assert [part["kernel"] for part in choice["ranges"]] == [part.kernel for part in entry.ranges]
        assert [part["sizes"] for part in choice["ranges"]] == [str(part.sizes) for part in entry.ranges]
    assert len(known) < len(found.nodes)


def test_times_are_the_traces(runner: rl.Runner, trace: Trace) -> None:
    found = graph_of(runner.artifact, "decode")
    for node, time in zip(found.nodes, times(found, trace), strict=True):
        launches = [one for one in trace.launches if (one.function, one.index) == ("decode", node.index)]
        assert time is not None
        assert time["launches"] == len(launches) == 3
        assert time["microseconds"] == pytest.approx(sorted(one.duration for one in launches)[1] * 1e6)
        assert set(time["kernels"]) == {one.kernel for one in launches}
    attention = next(node.index for node in found.nodes if node.operator == "attention")
    time = times(found, trace)[attention]
    assert time is not None
    assert time["sizes"] == "batch = 1, seq = 1, kv_len = 4..6"


def test_traces_of_something_else(runner: rl.Runner, gpt2: rl.Runner, trace: Trace) -> None:
    with pytest.raises(InputError, match=r"The trace has no call of logits, but of decode, prefill\."):
        times(graph_of(runner.artifact, "logits"), trace)
    with pytest.raises(InputError, match="The trace is of another model: its launch 0 of decode is"):
        times(graph_of(gpt2.artifact, "decode"), trace)
    with pytest.raises(InputError, match=r"The trace has no call of decode\."):
        times(graph_of(gpt2.artifact, "decode"), Trace(Limits(1.0, 1.0)))


def test_data_is_json_of_the_documented_fields(runner: rl.Runner) -> None:
    found = graph_of(runner.artifact, "decode")
    data = json.loads(json.dumps(as_data(found, runner.artifact), allow_nan=False))
    for title, fields in (
        ("field of `graph`", data),
        ("field of a node", data["nodes"][0]),
        ("field of an edge", data["edges"][0]),
    ):
        table = (ROOT / "docs" / "tracing.md").read_text(encoding="utf-8").partition(f"| {title} |")[2]
        assert re.findall(r"^\| `(\w+)` \|", table.partition("\n\n")[0], re.MULTILINE) == list(fields)
    assert data["function"] == "decode"
    launches = runner.artifact.manifest.functions["decode"]
    assert [(node["index"], node["site"], node["symbol"]) for node in data["nodes"]] == [
        (index, launch.site, launch.kernel) for index, launch in enumerate(launches)
    ]
    assert [tuple(edge["shape"]) for edge in data["edges"]] == [edge.shape for edge in found.edges]


def test_dot(runner: rl.Runner) -> None:
    found = graph_of(runner.artifact, "decode")
    text = dot(found)
    assert len(re.findall(r"^ +n\d+ \[label=", text, re.MULTILINE)) == len(found.nodes)
    arrows = re.findall(
        r'^  (n\d+|"\w+") -> (n\d+|"\w+") \[label="([^"]*)"(, style=dashed)?\];$', text, re.MULTILINE
    )
    ends = [
        (
            '"token_ids"' if edge.source is None else f"n{edge.source}",
            '"result"' if edge.target is None else f"n{edge.target}",
            f"[{', '.join(edge.shape)}]",
            ", style=dashed" if edge.kind == "cache" else "",
        )
        for edge in found.edges
    ]
    assert arrows == ends
    assert text.count("subgraph cluster_") == 2
    assert text.count("{") == text.count("}")
    if program := shutil.which("dot"):
        done = subprocess.run([program, "-Tplain"], input=text, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert done.stdout.count("\nedge ") == len(found.edges)


def test_dot_of_names_that_want_to_be_more() -> None:
    sites = ['say "hello"', "back\\slash", "two\nlines", HOSTILE]
    nodes = tuple(_node(index, "", site) for index, site in enumerate(sites))
    text = dot(Graph('f" {', nodes, ()))
    assert 'digraph "f\\" {" {' in text
    assert 'n0 [label="say \\"hello\\": fused\\nkernel"];' in text
    assert 'n1 [label="back\\\\slash: fused\\nkernel"];' in text
    assert 'n2 [label="two lines: fused\\nkernel"];' in text
