"""Choosing kernels while a model runs: forced, by another plan, pinned, and counted; and nothing of it when off."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm.artifact.manifest import Dispatcher, Manifest, Served
from relax_llm.errors import ArtifactError, InputError, PlanError
from relax_llm.plan.plan import Entry, Plan, Range
from relax_llm.plan.sizes import Box
from relax_llm.runtime import choices
from relax_llm.runtime.choices import Rule
from tests.artifact.checkpoints import GPT2, LLAMA, write
from tests.runtime import dispatching
from tests.runtime.dispatching import ATTENTION, DISPATCHERS, DOWN, FUNCTIONS, GATE, PLAN, make

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> rl.Artifact:
    """The model made by hand."""
    return make(tmp_path_factory.mktemp("model") / "artifact")


@pytest.fixture
def runner(artifact: rl.Artifact) -> rl.Runner:
    """Of it, new."""
    return rl.Runner(artifact)


def ran(runner: rl.Runner, prompt: int, steps: int = 0) -> list[tuple[str, str, str]]:
    """Which kernels served gate, down and attention in a prefill and in each decode behind it, by their results."""
    state = runner.start()
    found = [_served(runner.prefill(state, [1] * prompt), dispatching.prefill)]
    found += [_served(runner.decode(state, 1), dispatching.decode) for _ in range(steps)]
    return found


def _served(logits: Any, result: Callable[..., float]) -> tuple[str, str, str]:
    (value,) = set(logits.tolist())
    fitting = [
        (gate, down, attention)
        for gate in dispatching.ADD
        for down in dispatching.ADD
        for attention in dispatching.SCALE
        if result(1, gate, down, attention) == value
    ]
    assert len(fitting) == 1, f"{value} is not the result of one choice of kernels"
    return fitting[0]


PLAIN = {
    2: ("double", "double", "single"),
    3: ("plain", "plain", "single"),
    "decode": ("double", "double", "square"),
}
"""What the artifact's own plan does."""


def test_results_tell_kernels_apart() -> None:
    for result in (dispatching.prefill, dispatching.decode):
        values = [
            result(1, gate, down, attention)
            for gate in dispatching.ADD
            for down in dispatching.ADD
            for attention in dispatching.SCALE
        ]
        assert len(set(values)) == len(values)


def test_nothing_asked_for_is_nothing_in_the_way(runner: rl.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(runner, 3, 1) == [PLAIN[3], PLAIN["decode"]]
    assert ran(runner, 2) == [PLAIN[2]]
    assert not runner._control._functions, "a plain run has no second machine"
    runner.force(DOWN, "plain")
    runner.force(DOWN, None)
    with runner.counting(), runner.plan(PLAN), runner.force(DOWN, "plain"):
        pass
    monkeypatch.setattr(runner._control, "call", None)
    assert ran(runner, 3, 1) == [PLAIN[3], PLAIN["decode"]]


def test_the_plans_own_choices_give_the_plans_own_results(runner: rl.Runner) -> None:
    plain = [runner.prefill(runner.start(), [3] * size) for size in range(1, 12)]
    with runner.counting():
        counted = [runner.prefill(runner.start(), [3] * size) for size in range(1, 12)]
    with runner.plan(PLAN):
        planned = [runner.prefill(runner.start(), [3] * size) for size in range(1, 12)]
    np.testing.assert_array_equal(counted, plain)
    np.testing.assert_array_equal(planned, plain)


def test_a_forced_kernel_serves_what_it_is_valid_for(runner: rl.Runner) -> None:
    said = runner.force(DOWN, "triple")
    assert str(said) == f"triple serves M = 3..8 at {DOWN}; other sizes as planned"
    for size in range(1, 12):
        ((gate, down, _),) = ran(runner, size)
        assert gate == ("double" if size <= 2 else "plain")
        assert down == ("triple" if 3 <= size <= 8 else gate)
    assert ran(runner, 3, 1)[1] == PLAIN["decode"]


def test_a_kernel_for_every_size(runner: rl.Runner) -> None:
    said = runner.force(DOWN, "plain")
    assert repr(said) == str(said) == f"plain serves every size at {DOWN}"
    assert ran(runner, 2, 1) == [("double", "plain", "single"), ("double", "plain", "square")]


@pytest.mark.parametrize("sizes", [(1, 4), (4, 1), (2, 2)], ids=str)
def test_rows_are_sequences_times_tokens(runner: rl.Runner, sizes: tuple[int, int]) -> None:
    runner.force(DOWN, "triple")
    with runner.counting() as counts:
        logits = runner.prefill(runner.start(sizes[0]), np.ones(sizes, int))
    assert counts.site(DOWN) == {"triple": 1}
    assert counts.site(DOWN, M=4) == {"triple": 1}
    attention = "square" if sizes[1] == 1 else "single"
    assert set(logits.ravel().tolist()) == {dispatching.prefill(1, "plain", "triple", attention)}


def test_sizes_of_several_axes(runner: rl.Runner) -> None:
    """cube: kv_len >= 5, whatever seq; planned from kv_len = 7 for single tokens."""
    assert str(runner.force(ATTENTION, "cube")) == (
        f"cube serves kv_len >= 5 at {ATTENTION}; other sizes as planned"
    )
    assert [attention for _, _, attention in ran(runner, 3, 4)] == [
        "single",
        "square",
        "cube",
        "cube",
        "cube",
    ]
    assert ran(runner, 5)[0][2] == "cube"
    runner.force(ATTENTION, None)
    assert [attention for _, _, attention in ran(runner, 5, 2)] == ["single", "square", "cube"]


def test_taking_back(runner: rl.Runner) -> None:
    runner.force("layers.*", "plain")
    assert ran(runner, 2) == [("plain", "plain", "single")]
    runner.force(DOWN, None)
    assert ran(runner, 2) == [("plain", "double", "single")]
    runner.force("*", None)
    assert ran(runner, 2) == [PLAIN[2]]
    runner.force("*", None)
    assert not runner._control.active


@pytest.mark.parametrize(
    "site", [GATE, "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.*.up_proj", "layers.0.*"]
)
def test_a_fused_site_answers_to_its_parts(runner: rl.Runner, site: str) -> None:
    runner.force(site, "plain")
    assert ran(runner, 2) == [("plain", "double", "single")]
    runner.force("layers.0.mlp.gate_proj", None)
    assert ran(runner, 2) == [PLAIN[2]]


def test_a_pattern_takes_the_sites_that_have_the_kernel(runner: rl.Runner) -> None:
    assert str(runner.force("*", "triple")) == (
        f"triple serves M = 3..8 at 2 sites, {GATE} to {DOWN}; other sizes as planned"
    )
    assert ran(runner, 3) == [("triple", "triple", "single")]


def test_sites_are_told_apart_in_every_function(runner: rl.Runner) -> None:
    """prefill launches gate first, decode launches it last."""
    runner.force(GATE, "plain")
    assert ran(runner, 2, 1) == [("plain", "double", "single"), ("plain", "double", "square")]
    runner.force(GATE, None)
    runner.force(DOWN, "plain")
    assert ran(runner, 2, 1) == [("double", "plain", "single"), ("double", "plain", "square")]


def test_forcing_for_a_while(runner: rl.Runner) -> None:
    with runner.force(DOWN, "plain"):
        with runner.force("*", "triple") as inner:
            assert str(inner).startswith("triple serves")
            assert ran(runner, 3) == [("triple", "triple", "single")]
            assert ran(runner, 2) == [("double", "plain", "single")], "what triple is not valid for"
        assert ran(runner, 3) == [PLAIN[3]]
        assert ran(runner, 2) == [("double", "plain", "single")]
    assert ran(runner, 2) == [PLAIN[2]]
    with pytest.raises(ZeroDivisionError), runner.force(DOWN, "plain"):
        raise ZeroDivisionError
    assert not runner._control.active


def test_contexts_may_end_in_any_order(runner: rl.Runner) -> None:
    first, second = runner.force("*", "plain"), runner.force(DOWN, "double")
    first.__exit__()
    assert ran(runner, 3) == [("plain", "double", "single")]
    second.__exit__()
    second.__exit__()
    assert ran(runner, 3) == [PLAIN[3]]


def test_unknown_sites_and_kernels(runner: rl.Runner) -> None:
    for kernel in ("plain", None):
        with pytest.raises(
            InputError, match=r"No site matches 'layers\.7\.mlp\.down_proj'; .* like layers\.1"
        ):
            runner.force("layers.7.mlp.down_proj", kernel)
    with pytest.raises(InputError, match=r"No site matches 'nowhere'; sites are named like layers\.0"):
        runner.force("nowhere", "plain")
    with pytest.raises(
        InputError,
        match=r"No kernel 'fastest' can be forced at 'layers\.1\.mlp\.down_proj'; there are: plain \(every size\), "
        r"double \(M = 1\.\.4\), triple \(M = 3\.\.8\)\.",
    ):
        runner.force(DOWN, "fastest")
    with pytest.raises(InputError, match=r"there are: single .*; copy \(the only one for its append\)"):
        runner.force(ATTENTION, "plain")
    with pytest.raises(InputError, match=r"there are: lookup_all \(the only one for its embedding\)"):
        runner.force("embed", "plain")
    assert not runner._control.active


def _plan(kernel: str, *, sites: tuple[str, ...] = (GATE, DOWN), **changes: Any) -> Plan:
    """All rows of the sums by one kernel, as far as it goes."""
    last = {"double": 4, "triple": 8}.get(kernel)
    ranges = [Range(Box.of(M=(1, last)), kernel)]
    if last is not None:
        ranges += (Range(Box.of(M=(last + 1, None)), "plain"),)
    entry = Entry("add", "matmul", sites, "plain", ("M",), tuple(ranges))
    return Plan((replace(entry, **changes),))


def test_another_plan(runner: rl.Runner, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(_plan("double").to_json())
    for plan in (_plan("double"), path, str(path), {"layers.*.mlp.*": "double"}):
        with runner.plan(plan):
            assert ran(runner, 4, 1) == [("double", "double", "single"), PLAIN["decode"]]
            assert ran(runner, 5) == [("plain", "plain", "single")]
        assert ran(runner, 4) == [PLAIN[3]]


def test_plans_within_plans(runner: rl.Runner) -> None:
    with runner.plan(_plan("plain")):
        with runner.plan({DOWN: "triple"}):
            assert ran(runner, 3) == [("plain", "triple", "single")]
            assert ran(runner, 2) == [("plain", "plain", "single")], "the plan around serves what is left"
        with runner.plan(_plan("double")):
            assert ran(runner, 3) == [("double", "double", "single")]
        with pytest.raises(ZeroDivisionError), runner.plan(_plan("double")):
            raise ZeroDivisionError
        assert ran(runner, 2) == [("plain", "plain", "single")]
    assert ran(runner, 2) == [PLAIN[2]]


def test_a_plan_for_some_sites(runner: rl.Runner) -> None:
    with runner.plan(_plan("double", sites=(DOWN,))):
        assert ran(runner, 3) == [("plain", "double", "single")]


def test_what_is_forced_stays_forced_under_another_plan(runner: rl.Runner) -> None:
    runner.force(DOWN, "triple")
    with runner.plan(_plan("double")):
        assert ran(runner, 3) == [("double", "triple", "single")]
        assert ran(runner, 2) == [("double", "double", "single")]


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a kernel that is not there": (
        _plan("fastest"),
        PlanError,
        rf"gives {GATE.replace('+', '.')} the kernel 'fastest', which is not in the artifact; there are: plain ",
    ),
    "sizes it is not valid for": (
        Plan((Entry("add", "matmul", (DOWN,), "plain", ("M",), (Range(Box.of(M=(1, None)), "double"),)),)),
        PlanError,
        rf"gives {DOWN} the kernel 'double' for every size; it is valid for M = 1\.\.4",
    ),
    "sizes before it is valid": (
        Plan(
            (
                Entry(
                    "add",
                    "matmul",
                    (DOWN,),
                    "plain",
                    ("M",),
                    (Range(Box.of(M=(1, 8)), "triple"), Range(Box.of(M=(9, None)), "plain")),
                ),
            )
        ),
        PlanError,
        r"'triple' for M = 1\.\.8; it is valid for M = 3\.\.8",
    ),
    "a site of another model": (
        _plan("plain", sites=("layers.9.mlp.down_proj",)),
        PlanError,
        r"has the matmul of 'layers\.9\.mlp\.down_proj', but the artifact has no such site",
    ),
    "another operator at a site": (_plan("plain", operator="norm"), PlanError, "the norm of 'layers.0"),
    "another layout": (
        _plan("plain", layout="tiled"),
        PlanError,
        r"reads the weight of layers\.0.* tiled, but the artifact stores it plain; compile with this plan",
    ),
    "other sizes": (
        Plan((Entry("add", "matmul", (DOWN,), "plain", ("N",), (Range(Box.of(N=(1, None)), "plain"),)),)),
        PlanError,
        rf"chooses at {DOWN} by N, but the artifact by M",
    ),
    "a choice where there is none": (
        Plan((Entry("embedding_4", "embedding", ("embed",), "", ("M",), (Range(Box(), "other"),)),)),
        PlanError,
        "gives embed the kernel 'other', but the artifact has only 'lookup_all' there",
    ),
    "a file that is not there": ("missing.json", PlanError, "missing.json"),
    "a site that is not there": ({"nowhere": "plain"}, InputError, "No site matches 'nowhere'"),
    "a kernel of a mapping": ({DOWN: "fastest"}, InputError, "No kernel 'fastest' can be forced"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_plans_that_cannot_be_followed(runner: rl.Runner, case: str) -> None:
    plan, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message), runner.plan(plan):
        pytest.fail("the plan was taken")
    assert not runner._control.active
    assert ran(runner, 3) == [PLAIN[3]]


def test_pinned(artifact: rl.Artifact) -> None:
    runner = rl.Runner(artifact, selection="pinned")
    for size in (1, 2, 3, 9):
        assert set(ran(runner, size, 5)) == {("plain", "plain", "single")}
    whole, pieces = runner.start(), runner.start()
    runner.prefill(whole, [1, 2, 3, 1, 2])
    for token in [1, 2, 3, 1]:
        runner.decode(pieces, token)
    with runner.force(DOWN, "triple"):
        assert ran(runner, 3, 1) == [("plain", "triple", "single"), ("plain", "plain", "single")]
    with runner.plan(_plan("double")):
        assert ran(runner, 3) == [("double", "double", "single")]
    assert set(ran(runner, 3, 1)) == {("plain", "plain", "single")}


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("selection", ["dynamic", "pinned"])
def test_results_do_not_depend_on_how_tokens_are_divided(
    selection: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    """Bitwise, whole models: every division in two calls, token by token, and several at once.

    In f32 so it is also where sizes choose, for those kernels sum in one order.
    """
    runner = rl.Runner(rl.compile(write(tmp_path / "checkpoint", config)), selection=selection)
    ids = np.random.default_rng(0).integers(0, runner.vocab_size, 40)
    expected = runner.prefill(runner.start(), ids, output="all")
    for cut in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 39):
        state = runner.start()
        first = runner.prefill(state, ids[:cut], output="all")
        second = runner.prefill(state, ids[cut:], output="all")
        np.testing.assert_array_equal(np.concatenate([first, second]), expected, err_msg=f"cut at {cut}")
    state = runner.start()
    one_by_one = [runner.decode(state, int(token)) for token in ids]
    np.testing.assert_array_equal(one_by_one, expected)
    batch = runner.prefill(runner.start(3), np.stack([ids] * 3), output="all")
    np.testing.assert_array_equal(batch, np.stack([expected] * 3))


def test_tokens_that_are_served_by_the_kernels_of_one(runner: rl.Runner) -> None:
    """As long as no kernel at any site is another: `scale` has one for one query, `add` one for up to 2 rows."""
    found = [runner.tokens_alike]
    with runner.force(ATTENTION, "single"):
        found.append(runner.tokens_alike)
        with runner.force(DOWN, "plain"):
            found.append(runner.tokens_alike)
            with runner.force(GATE, "plain"):
                found.append(runner.tokens_alike)
            with runner.plan({GATE: "triple"}):
                found.append(runner.tokens_alike)
    assert found == [1, 2, 2, None, 2]
    assert runner.tokens_alike == 1
    assert rl.Runner(runner.artifact, selection="pinned").tokens_alike is None


@pytest.mark.parametrize(
    ("axes", "ranges", "expected"),
    [
        (("M",), [({"M": [1, None]}, 0)], None),
        (("M",), [({"M": [1, 8]}, 0), ({"M": [9, None]}, 1)], 8),
        (("M",), [({"M": [1, 4]}, 0), ({"M": [5, 8]}, 0), ({"M": [9, 9]}, 1), ({}, 0)], 8),
        (("M",), [({"M": [2, 2]}, 1), ({}, 0)], 1),
        (("batch", "seq"), [({"batch": [2, None], "seq": [3, None]}, 1), ({}, 0)], None),
        (("batch", "seq"), [({"batch": [1, 3], "seq": [7, None]}, 1), ({}, 0)], 6),
        (("seq", "kv_len"), [({"kv_len": [1, 512]}, 0), ({}, 1)], None),
        (("seq", "kv_len"), [({"seq": [4, None], "kv_len": [513, None]}, 1), ({}, 0)], 3),
    ],
)
def test_tokens_alike(axes: tuple[str, ...], ranges: list[Any], expected: int | None) -> None:
    place = choices.Place("site", "symbol", "operator", axes, (("one", Box()), ("other", Box())), (), None)
    parts = [place.part(Box.from_json(sizes), index) for sizes, index in ranges]
    assert choices.tokens_alike(place, parts) == expected


def test_pinned_where_nothing_serves_every_size(tmp_path: Path) -> None:
    dispatchers = {**DISPATCHERS, "scale": replace(DISPATCHERS["scale"], pinned="")}
    artifact = make(tmp_path / "artifact", dispatchers=dispatchers)
    with pytest.raises(ArtifactError, match=rf"No kernel at {ATTENTION} is valid for every size"):
        rl.Runner(artifact, selection="pinned")
    assert ran(rl.Runner(artifact), 3) == [PLAIN[3]]


@pytest.mark.parametrize("selection", ["", "fast", None, ["pinned"]])
def test_selections_that_are_none(artifact: rl.Artifact, selection: Any) -> None:
    with pytest.raises(InputError, match='selection must be "dynamic" or "pinned"'):
        rl.Runner(artifact, selection=selection)


def test_counts(runner: rl.Runner) -> None:
    with runner.counting() as counts:
        ran(runner, 3, 4)
    ran(runner, 3)
    assert counts.kernel("plain") == 2
    assert counts.kernel("plain", M=3) == 2
    assert counts.kernel("plain", M=1) == 0
    assert counts.kernel("double") == 8
    assert counts.kernel("single") == 1
    assert [counts.kernel("square", kv_len=length) for length in range(3, 9)] == [0, 1, 1, 1, 0, 0]
    assert counts.kernel("cube") == 1
    assert counts.kernel("lookup_all") == counts.kernel("copy") == 5
    assert counts.kernel("triple") == 0
    assert counts.launches() == 25
    assert counts.launches(operator="matmul") == 10
    assert counts.launches(site="layers.*.up_proj", kernel="d*") == 4
    assert counts.site(DOWN) == {"plain": 1, "double": 4}
    assert counts.site("layers.0.mlp.gate_proj", M=1) == {"double": 4}
    assert [line.split() for line in str(counts).splitlines()] == [
        line.split()
        for line in (
            "operator   kernel      sizes                                 sites  launches",
            "append     copy        batch = 1, seq = 1..3, kv_len = 3..7      1         5",
            "attention  cube        batch = 1, seq = 1, kv_len = 7            1         1",
            "attention  single      batch = 1, seq = 3, kv_len = 3            1         1",
            "attention  square      batch = 1, seq = 1, kv_len = 4..6         1         3",
            "embedding  lookup_all  M = 1..3                                  1         5",
            "matmul     double      M = 1                                     2         8",
            "matmul     plain       M = 3                                     2         2",
        )
    ]
    assert repr(counts) == str(counts)
    rows = json.loads(counts.to_json())
    assert {"site": DOWN, "operator": "matmul", "kernel": "double", "sizes": {"M": 1}, "launches": 4} in rows
    assert sum(row["launches"] for row in rows) == 25


def test_counts_of_nothing(runner: rl.Runner) -> None:
    with runner.counting() as counts:
        pass
    assert counts.launches() == 0
    assert counts.rows == ()
    assert str(counts).split() == ["operator", "kernel", "sizes", "sites", "launches"]


def test_counts_within_counts(runner: rl.Runner) -> None:
    with runner.counting() as outer:
        ran(runner, 3)
        with runner.counting() as inner, runner.force(DOWN, "triple"):
            ran(runner, 3)
        ran(runner, 3)
    assert (outer.launches(), inner.launches()) == (15, 5)
    assert (outer.kernel("triple"), inner.kernel("triple")) == (1, 1)


def test_a_model_without_a_choice(tmp_path: Path) -> None:
    runner = rl.Runner(make(tmp_path / "artifact", dispatchers={}), selection="pinned")
    with runner.counting() as counts:
        assert ran(runner, 3) == [PLAIN[3]]
    assert counts.kernel("add", M=3) == 2
    with pytest.raises(InputError, match=r"there are: add \(the only one for its matmul\)"):
        runner.force(DOWN, "plain")


def test_an_interrupted_choice(runner: rl.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt comes out as it is, state and runner are as before, and what was launched is counted."""
    state = runner.start()
    runner.prefill(state, [1, 2])
    called = []

    def interrupted(rule: Rule, sizes: tuple[int, ...]) -> int:
        called.append(rule.symbol)
        if len(called) == 2:
            raise KeyboardInterrupt
        return 0

    with runner.counting() as counts:
        with monkeypatch.context() as patch:
            patch.setattr(Rule, "__call__", interrupted)
            with pytest.raises(KeyboardInterrupt):
                runner.decode(state, 1)
        assert counts.launches() == 1
        assert counts.site(ATTENTION) == {"single": 1}
        assert state.length == 2
        runner.decode(state, 1)
    assert state.length == 3
    assert counts.launches() == 1 + 5
    assert ran(runner, 3, 1) == [PLAIN[3], PLAIN["decode"]]


def test_threads_with_runners_of_their_own(artifact: rl.Artifact) -> None:
    """What one runner is told is nothing to another, though their launches ask one function of the process."""
    kernels = ["plain", "double", "triple", "plain"]
    runners = [rl.Runner(artifact) for _ in kernels]
    for runner, kernel in zip(runners, kernels, strict=True):
        runner.force("layers.*.mlp.*", kernel)
    found: dict[int, set[tuple[str, str, str]]] = {}

    def work(index: int) -> None:
        found[index] = {ran(runners[index], 4)[0] for _ in range(50)}

    _in_threads(work, len(kernels))
    assert [found[index] for index in range(len(kernels))] == [
        {(kernel, kernel, "single")} for kernel in kernels
    ]


def test_threads_of_one_runner(runner: rl.Runner) -> None:
    """Each call runs wholly with a kernel forced or wholly without."""
    found: set[tuple[str, str, str]] = set()

    def work(index: int) -> None:
        for _ in range(50):
            if index:
                found.update(ran(runner, 3))
            else:
                with runner.force("layers.*.mlp.*", "triple"):
                    found.add(ran(runner, 3)[0])

    with runner.counting() as counts:
        _in_threads(work, 3)
    assert ("triple", "triple", "single") in found
    assert found <= {("triple", "triple", "single"), PLAIN[3]}
    assert counts.launches() == 3 * 50 * 5
    assert ran(runner, 3) == [PLAIN[3]]


def _in_threads(work: Callable[[int], None], count: int) -> None:
    failures: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_a_manifest_of_another_library(tmp_path: Path) -> None:
    functions = {**FUNCTIONS, "decode": FUNCTIONS["prefill"]}
    runner = rl.Runner(make(tmp_path / "artifact", functions=functions))
    for act in (lambda: runner.force(DOWN, "plain"), lambda: runner.counting().__enter__()):
        with pytest.raises(ArtifactError, match="decode calls other dispatchers than the manifest says"):
            act()
    assert not runner._control.active


DAMAGED: dict[str, Dispatcher] = {
    "ranges of an unknown kernel": replace(DISPATCHERS["add"], ranges=(Served("fastest", {}),)),
    "an unknown pinned kernel": replace(DISPATCHERS["add"], pinned="fastest"),
    "sizes that are none": replace(DISPATCHERS["add"], kernels=(Served("plain", {"M": ["a", "b"]}),)),
    "sizes in a wrong order": replace(DISPATCHERS["add"], kernels=(Served("plain", {"M": [5, 1]}),)),
    "sizes that are no pair": replace(DISPATCHERS["add"], kernels=(Served("plain", {"M": [5]}),)),
}


@pytest.mark.parametrize("case", list(DAMAGED))
def test_damaged_dispatchers(artifact: rl.Artifact, case: str) -> None:
    damaged = replace(
        artifact, manifest=replace(artifact.manifest, dispatchers={**DISPATCHERS, "add": DAMAGED[case]})
    )
    with pytest.raises(ArtifactError, match="the manifest's dispatcher add is not usable"):
        rl.Runner(damaged)


def test_dispatchers_come_back_from_the_manifest(artifact: rl.Artifact) -> None:
    assert Manifest.from_json(artifact.manifest.to_json(), "here") == artifact.manifest
    assert artifact.manifest.dispatchers == DISPATCHERS


def test_rules_say_the_first_that_fits_and_forget_what_is_old() -> None:
    rule = Rule("add", [((((3, 5)),), 1), (((1, 5000),), 0)])
    for _ in range(2):
        assert [rule((size,)) for size in range(1, 5001)] == [
            1 if 3 <= size <= 5 else 0 for size in range(1, 5001)
        ]
        assert len(rule._known) <= choices._REMEMBERED
    with pytest.raises(ArtifactError, match=r"No kernel of add serves the sizes \(5001,\)"):
        rule((5001,))


BARE = """
import sys
import relax_llm as rl

runner = rl.Runner(rl.load(sys.argv[1], for_this_machine=False))
with runner.counting() as counts, runner.force("layers.*.mlp.*", "triple"):
    runner.prefill(runner.start(), [1, 2, 3])
print(counts.kernel("triple"), [name for name in ("tvm", "torch", "transformers") if name in sys.modules])
"""


def test_without_the_compiler(artifact: rl.Artifact) -> None:
    command = [sys.executable, "-W", "error", "-c", BARE, str(artifact.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("2 []\n", "")
