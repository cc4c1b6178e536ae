"""Traced runs: bitwise those of plain ones, with the kernels that ran, at the times at which they ran."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm.errors import ArtifactError
from relax_llm.runtime import vm
from relax_llm.runtime.choices import Rule
from relax_llm.runtime.tracing import clocked
from relax_llm.tracing.limits import Limits
from tests.runtime import dispatching
from tests.runtime.dispatching import ATTENTION, DOWN, GATE, make
from tests.runtime.libraries import Sums, build

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from relax_llm.tracing.trace import Trace, TracedCall

LIMITS = Limits(1e11, 1e10)


@pytest.fixture(scope="module")
def handmade(tmp_path_factory: pytest.TempPathFactory) -> rl.Artifact:
    """The model whose results tell which kernels ran."""
    return make(tmp_path_factory.mktemp("handmade") / "artifact")


@pytest.mark.parametrize("selection", ["dynamic", "pinned"])
@pytest.mark.parametrize("length", [1, 17, 300])
def test_bitwise_as_a_plain_run(model: rl.Runner, length: int, selection: Any) -> None:
    runner = rl.Runner(model.artifact, selection=selection)
    ids = np.random.default_rng(length).integers(0, runner.vocab_size, length)

    def run() -> Iterator[Any]:
        state = runner.start()
        yield runner.prefill(state, ids)
        yield runner.decode(state, 7)
        yield runner.prefill(state, ids[:3], output="all")
        yield runner.prefill(state, ids[:2], output="hidden")
        yield runner.decode(state, 8)

    plain = list(run())
    with runner.tracing(LIMITS) as trace:
        traced = list(run())
    for one, other in zip(plain, traced, strict=True):
        np.testing.assert_array_equal(one, other)
    functions = runner.artifact.manifest.functions
    assert [call.function for call in trace.calls] == ["prefill", "decode", "logits", "hidden", "decode"]
    for call in trace.calls:
        said = functions[call.function]
        assert [(one.site, one.symbol) for one in call.launches] == [(one.site, one.kernel) for one in said]
        assert [one.index for one in call.launches] == list(range(len(said)))


def test_times_follow_each_other(model: rl.Runner) -> None:
    with model.tracing(LIMITS) as trace:
        state = model.start()
        model.prefill(state, [1, 2, 3])
        model.decode(state, 4)
    end = 0
    for call in trace.calls:
        assert end <= call.begun
        end = call.begun
        for launch in call.launches:
            assert end <= launch.begun <= launch.ended
            end = launch.ended
        assert end <= call.ended
        end = call.ended
        inside = sum(launch.duration for launch in call.launches)
        assert call.outside == pytest.approx(call.duration - inside)
        assert 0 < call.outside < call.duration
    assert trace.duration == pytest.approx(sum(call.duration for call in trace.calls))
    assert trace.between == pytest.approx((trace.calls[1].begun - trace.calls[0].ended) / 1e9)
    assert trace.outside == pytest.approx(sum(call.outside for call in trace.calls))


def test_arithmetic_is_counted_by_the_rows_that_a_launch_has(model: rl.Runner) -> None:
    """Behind the last attention of a prefill there is one row for each sequence, however long the prompt is."""
    kernels = model.artifact.manifest.kernels
    with model.tracing(LIMITS) as trace:
        model.prefill(model.start(2), np.ones((2, 17), int))
    rows = []
    for launch in trace.launches:
        if launch.operator == "matmul":
            problem = kernels[launch.symbol].problem
            rows.append(launch.sizes["M"])
            # One multiplication and one addition for each weight and row, and little more.
            assert launch.flops == pytest.approx(2 * rows[-1] * problem["n"] * problem["k"], rel=0.01)
            assert launch.bytes >= 4 * problem["n"] * problem["k"]
            assert launch.gflops == pytest.approx(launch.flops / launch.duration / 1e9)
            assert launch.share(LIMITS) == pytest.approx(
                max(launch.flops / LIMITS.flops, launch.bytes / LIMITS.bytes) / launch.duration
            )
    assert rows[:-4] == [34] * (len(rows) - 4)
    assert rows[-4:] == [2] * 4
    (attention,) = (launch for launch in trace.launches if launch.operator == "attention")
    assert attention.sizes == {"batch": 2, "seq": 1, "kv_len": 17}


def served(call: TracedCall) -> tuple[str, str, str]:
    """The kernels of gate, down and attention, as the trace names them."""
    named = {(one.site, one.symbol): one.kernel for one in call.launches}
    return named[GATE, "add"], named[DOWN, "add"], named[ATTENTION, "scale"]


def ran(runner: rl.Runner, size: int) -> list[float]:
    """The results of a prefill and of some decodes behind it."""
    state = runner.start()
    results = [runner.prefill(state, [1] * size)]
    results += [runner.decode(state, 1) for _ in range(4)]
    return [float(result[0]) for result in results]


WAYS = ["by the plan", "forced", "another plan", "pinned", "counted", "taken back"]


@pytest.mark.parametrize("way", WAYS)
def test_kernels_are_those_that_ran(handmade: rl.Artifact, way: str) -> None:
    """What each added or multiplied tells which kernel it was; the trace must name the same."""
    runner = rl.Runner(handmade, selection="pinned" if way == "pinned" else "dynamic")
    contexts: dict[str, list[AbstractContextManager[Any]]] = {
        "forced": [runner.force(DOWN, "triple"), runner.force(ATTENTION, "cube")],
        "another plan": [runner.plan({GATE: "triple"})],
        "counted": [runner.counting()],
        "taken back": [runner.force(DOWN, "plain")],
    }
    for name, made in contexts.items():
        for context in made:
            if name == way:
                context.__enter__()
            elif hasattr(context, "_take_back"):
                context._take_back()
    with runner.tracing(LIMITS) as trace:
        results = [result for size in range(1, 10) for result in ran(runner, size)]
    if way == "taken back":
        runner.force(DOWN, None)  # what was is not what is forced afterwards
        runner.force(GATE, "plain")
    assert len(trace.calls) == len(results) == 45
    different = set()
    for call, result in zip(trace.calls, results, strict=True):
        compute = dispatching.prefill if call.function == "prefill" else dispatching.decode
        assert compute(1, *served(call)) == result, f"{way}: {call}"
        different.add(served(call))
    assert len(different) == 1 if way == "pinned" else len(different) > 2


def test_sizes_are_those_of_the_choice(handmade: rl.Artifact) -> None:
    runner = rl.Runner(handmade)
    with runner.tracing(LIMITS) as trace:
        runner.prefill(runner.start(3), np.ones((3, 4), int))
    assert {(one.operator, tuple(one.sizes.items())) for one in trace.launches} == {
        ("embedding", (("M", 12),)),
        ("matmul", (("M", 12),)),
        ("attention", (("batch", 3), ("seq", 4), ("kv_len", 4))),
        ("append", (("batch", 3), ("seq", 4), ("kv_len", 4))),
    }


def test_nothing_of_it_in_plain_runs(handmade: rl.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = rl.Runner(handmade)
    expected = ran(runner, 3)
    assert not runner._tracer._machines, "a plain run has no further machine"
    with pytest.raises(ZeroDivisionError), runner.tracing(LIMITS):
        raise ZeroDivisionError
    assert not runner._tracer.active
    monkeypatch.setattr(runner._tracer, "call", None)
    assert ran(runner, 3) == expected
    assert not any("clock" in name for _, name in runner.program.calls("decode"))


def test_traces_within_traces(handmade: rl.Artifact) -> None:
    runner = rl.Runner(handmade)
    with runner.tracing(LIMITS) as outer:
        ran(runner, 1)
        with runner.tracing(LIMITS) as inner:
            ran(runner, 2)
        ran(runner, 3)
    ran(runner, 4)
    assert [call.sizes["seq"] for call in outer.calls if call.function == "prefill"] == [1, 2, 3]
    assert [call.sizes["seq"] for call in inner.calls if call.function == "prefill"] == [2]
    assert inner.calls[0].begun < outer.calls[5].begun, "each has its own beginning"


def test_threads(handmade: rl.Artifact) -> None:
    runner = rl.Runner(handmade)
    with runner.tracing(LIMITS) as trace:
        threads = [threading.Thread(target=ran, args=(runner, 2), name=f"worker {i}") for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {call.thread[1] for call in trace.calls} == {f"worker {i}" for i in range(3)}
    assert len({call.thread[0] for call in trace.calls}) == 3
    assert len(trace.launches) == 3 * 5 * 5


def test_an_interrupted_call(handmade: rl.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ended is in the trace, the interrupt comes out as it is, and the runner goes on."""
    runner = rl.Runner(handmade)
    state = runner.start()
    runner.prefill(state, [1, 2])
    chosen = []

    def interrupted(rule: Rule, sizes: tuple[int, ...]) -> int:
        chosen.append(rule.symbol)
        if len(chosen) == 2:
            raise KeyboardInterrupt
        return 0

    with runner.tracing(LIMITS) as trace, runner.force(DOWN, "plain"):
        with monkeypatch.context() as patch:
            patch.setattr(Rule, "__call__", interrupted)
            with pytest.raises(KeyboardInterrupt):
                runner.decode(state, 1)
        runner.decode(state, 1)
    first, second = trace.calls
    assert [launch.index for launch in first.launches] == [0, 1]
    assert first.launches[-1].ended <= first.ended <= second.begun
    assert len(second.launches) == 5
    assert state.length == 3


def test_generation_is_traced(model: rl.Runner) -> None:
    with model.tracing(LIMITS) as trace:
        answer = model.generate([1, 2, 3], max_new_tokens=4, temperature=0)
    evaluated = ["prefill", *["decode"] * (len(answer.token_ids) - 1)]
    assert [call.function for call in trace.calls] == [name for one in evaluated for name in (one, "greedy")]


def test_a_library_without_a_clock(tmp_path: Path) -> None:
    runner = rl.Runner(make(tmp_path / "artifact", has_clock=False))
    expected = ran(runner, 2)
    with (
        pytest.raises(ArtifactError, match="has no clock in its library; compile it again"),
        runner.tracing(LIMITS),
    ):
        pytest.fail("it was traced")
    assert ran(runner, 2) == expected


def test_a_manifest_of_another_library(tmp_path: Path) -> None:
    functions = {**dispatching.FUNCTIONS, "decode": dispatching.FUNCTIONS["decode"][:-1]}
    runner = rl.Runner(make(tmp_path / "artifact", functions=functions))
    with (
        pytest.raises(ArtifactError, match="decode makes 5 launches, but the manifest says 4"),
        runner.tracing(),
    ):
        pytest.fail("it was traced")


@pytest.mark.parametrize("condition", [True, False])
def test_programs_with_branches(tmp_path: Path, condition: bool) -> None:
    """Jumps lead where they led, and only what was launched has a time."""
    machine = vm.VirtualMachine(build(Sums, tmp_path / "sums.so"))
    program, rows = clocked(machine.program, frozenset({"add"}), frozenset({"either"}))
    assert rows == {"either": 2}
    made = machine.executing(program)
    times = np.zeros((2, 2), np.int64)
    x = np.arange(4, dtype=np.float32)
    given = [vm.tensor(np.array(condition)), vm.tensor(x)]
    expected = vm.numpy(machine["either"](*given))
    result = vm.numpy(made["either"](*given, vm.tensor(times)))
    np.testing.assert_array_equal(result, expected)
    assert bool(times.any()) is condition
    assert (times[1] - times[0] >= 0).any()


def test_totals(model: rl.Runner) -> None:
    with model.tracing(LIMITS) as trace:
        state = model.start()
        model.prefill(state, [1, 2, 3])
        model.decode(state, 4)
    _check_totals(trace)


def _check_totals(trace: Trace) -> None:
    inside = sum(launch.duration for launch in trace.launches)
    for what in ("operator", "kernel", "site", "place"):
        found = trace.by(what)
        assert sum(total.launches for total in found) == len(trace.launches)
        assert sum(total.seconds for total in found) == pytest.approx(inside)
        assert sum(total.share for total in found) == pytest.approx(inside / trace.duration)
        assert sum(total.flops for total in found) == pytest.approx(sum(one.flops for one in trace.launches))
        assert [total.seconds for total in found] == sorted((total.seconds for total in found), reverse=True)
    assert {total.names for total in trace.by("operator")} == {(one.operator,) for one in trace.launches}
    assert {total.names for total in trace.by("site")} == {(one.site, one.operator) for one in trace.launches}
    (norms,) = (total for total in trace.by("operator") if total.names == ("norm",))
    every = [launch for launch in trace.launches if launch.operator == "norm"]
    least = sum(max(one.flops / LIMITS.flops, one.bytes / LIMITS.bytes) for one in every)
    assert norms.limit == pytest.approx(least / sum(one.duration for one in every))
