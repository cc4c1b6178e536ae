"""Breakpoints: what each sort stops at, in every function and call; watches; and sentences for what cannot be."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from relax_llm.errors import InputError
from relax_llm.runtime.conditions import SizeCondition
from relax_llm.runtime.difference import difference, not_finite
from tests.runtime import dispatching
from tests.runtime.dispatching import DOWN, GATE

if TYPE_CHECKING:
    from collections.abc import Callable

    import relax_llm as rl
    from relax_llm.runtime.launch import Launch
    from relax_llm.runtime.stepper import Steps

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def _stops(steps: Steps) -> list[tuple[int, str]]:
    """Where a run stops: index, and what had become of the launch."""
    found = []
    while (launch := steps.run()) is not None:
        assert steps.stop is not None
        assert steps.stop.launch is launch is steps.current
        found.append((launch.index, launch.done))
    assert steps.stop is None
    assert steps.ended
    return found


def _prefill(runner: rl.Runner) -> Steps:
    return runner.steps("prefill", runner.start(), [1, 2, 3])


BEFORE: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    "a site": ({"site": DOWN}, [2], [2]),
    "a part of a fused site": ({"site": "layers.0.mlp.up_proj"}, [1], [4]),
    "a pattern": ({"site": "layers.1.*"}, [2, 3, 4], [1, 2, 3]),
    "a kernel": ({"kernel": "plain"}, [1, 2], []),
    "kernels": ({"kernel": "s*"}, [3], [1]),
    "an operator": ({"operator": "attention"}, [3], [1]),
    "a size": ({"where": "M=3"}, [0, 1, 2], []),
    "another size": ({"operator": "matmul", "where": "M < 3"}, [], [2, 4]),
    "sizes": ({"where": "seq = 1, kv_len <= 1"}, [], [0, 1, 2, 3, 4]),
    "a range of sizes": ({"operator": "attention", "where": "kv_len = 2..5 and seq != 1"}, [3], []),
    "a function": ({"function": "decode", "operator": "embedding"}, [], [0]),
    "a question": ({"where": lambda launch: launch.index == 3}, [3], [3]),
    "everything": ({}, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize("case", list(BEFORE))
def test_before_launches(runner: rl.Runner, case: str) -> None:
    said, prefill, decode = BEFORE[case]
    made = runner.breakpoints.add(**said)
    for _ in range(2):  # they hold in all calls
        assert _stops(_prefill(runner)) == [(index, "") for index in prefill]
        assert _stops(runner.steps("decode", runner.start(), 1)) == [(index, "") for index in decode]
    assert made.hits == 2 * (len(prefill) + len(decode))
    steps = _prefill(runner)
    assert len(list(steps)) == 5
    assert steps.logits[0] == _prefill(runner).finish()[0] == _prefill(runner).detach()[0]
    assert made.hits == 2 * (len(prefill) + len(decode))


def test_behind_launches(runner: rl.Runner) -> None:
    runner.breakpoints.add(after=lambda launch: launch.outputs[0].max() > 30, operator="matmul")
    steps = _prefill(runner)
    assert _stops(steps) == [(2, "run")]
    assert steps.logits[0] == dispatching.prefill(3, "plain", "plain", "single")


def test_the_first_that_is_no_number(runner: rl.Runner) -> None:
    runner.breakpoints.add(nan=True)
    assert _stops(_prefill(runner)) == []
    steps = _prefill(runner)
    launch = steps.step(2)
    assert launch is not None
    launch.inputs[0][0, 1, 2] = np.nan
    launch.inputs[0][0, 2, 3] = -np.inf
    launch = steps.run()
    assert launch is not None
    assert (launch.index, launch.done) == (1, "run")
    assert str(steps.stop) == (
        f"breakpoint 1, behind prefill[1] {GATE}: plain: the output has 1 NaN and 1 infinite of 12 numbers, the first "
        "at [0, 1, 2]"
    )
    assert _stops(steps) == [(2, "run"), (3, "run"), (4, "run")]


def test_differences_from_a_reference(runner: rl.Runner) -> None:
    def add(x: Any, weight: Any) -> Any:
        return x + weight

    runner.breakpoints.add(operator="matmul", differs=add)
    assert _stops(_prefill(runner)) == []
    with runner.force(DOWN, "triple"):
        steps = _prefill(runner)
        assert _stops(steps) == [(2, "run")]
    runner.breakpoints.clear()
    runner.breakpoints.add(site=DOWN, differs=lambda x, w: (x + w) * np.float32(1.001), bound=1e-2)
    assert _stops(_prefill(runner)) == []
    launch = _prefill(runner).run_until(site=DOWN, differs=lambda x, w: (x + w) * np.float32(1.1), bound=1e-2)
    assert launch is not None
    with pytest.raises(InputError, match=r"The reference of .* must return float32 of shape \(1, 3, 4\)"):
        _prefill(runner).run_until(site=DOWN, differs=lambda x, w: x[0])


def test_a_reference_sees_the_inputs_as_they_were(model: rl.Runner) -> None:
    """Kernels that work in place change theirs."""
    seen: list[Any] = []
    steps = model.steps("prefill", model.start(), IDS)
    launch = steps.run_until(operator="append")
    assert launch is not None
    before = [array.copy() for array in launch.inputs]
    output = launch.outputs[0]

    def reference(*inputs: Any) -> Any:
        seen.extend(inputs)
        return np.zeros_like(output)

    assert steps.run_until(operator="append", differs=reference) is launch
    assert any(not np.array_equal(now, was) for now, was in zip(launch.inputs, before, strict=True))
    for was, given in zip(before, seen, strict=True):
        np.testing.assert_array_equal(given, was)


def test_differences_from_what_was_recorded(runner: rl.Runner) -> None:
    recorded = {launch.site: _made(launch) for launch in _prefill(runner) if launch.operator == "matmul"}
    runner.breakpoints.add(operator="matmul", differs=recorded)
    runner.breakpoints.add(operator="matmul", function="prefill", differs={"layers.7": recorded[DOWN]})
    assert _stops(_prefill(runner)) == []
    recorded[DOWN][0, 2, 1] += 1
    steps = _prefill(runner)
    assert steps.run() is not None
    assert str(steps.stop).endswith(
        "the output differs in 1 of 12 numbers, most at [0, 2, 1]: 179, expected 180"
    )
    recorded[DOWN][0, 2, 1] -= 1
    steps = _prefill(runner)
    steps.run_until(site=DOWN)
    steps.run_until(site=DOWN, differs=(recorded[DOWN] * 2,))
    assert steps.current is not None
    assert steps.current.done == "run"


def _made(launch: Launch) -> Any:
    launch.run()
    return launch.outputs[0].copy()


def test_watching_a_cache(model: rl.Runner) -> None:
    (name,) = (cache.site for cache in model.artifact.manifest.caches)
    runner_breaks = model.breakpoints
    try:
        runner_breaks.watch(f"{name}.k_cache")
        state = model.start()
        steps = model.steps("prefill", state, IDS)
        launch = steps.run()
        assert launch is not None
        assert (launch.operator, launch.done) == ("append", "run")
        assert f"{name}.k_cache changed in " in str(steps.stop)
        assert steps.run() is None
        position = np.s_[:, :, 0, :, len(IDS)]
        runner_breaks.clear()
        runner_breaks.watch(f"{name}.k_cache", np.s_[:, :, 0, :, : len(IDS)])  # what is there already
        assert model.steps("decode", state, 7).run() is None
        runner_breaks.watch(f"{name}.k_cache", position)
        launch = model.steps("decode", state, 8).run()
        assert launch is None  # its place is the next one
        state.truncate(len(IDS))
        launch = model.steps("decode", state, 8).run()
        assert launch is not None
        assert launch.operator == "append"
    finally:
        runner_breaks.clear()


def test_watching_weights_outputs_and_memory_of_yours(runner: rl.Runner) -> None:
    runner.breakpoints.watch("down")
    runner.breakpoints.watch(DOWN)
    steps = _prefill(runner)
    assert _stops(steps) == [(2, "run")]  # computed, and then not changed while it is used
    mine = np.zeros(3)

    def meddles(x: Any, weight: Any) -> Any:
        mine[1] = 7
        weight[2] += 1
        return x

    runner.breakpoints.clear()
    of_weight = runner.breakpoints.watch("down")
    runner.breakpoints.watch(mine)
    steps = _prefill(runner)
    steps.replace(DOWN, meddles)
    launch = steps.run()
    assert launch is not None
    assert (launch.index, launch.done) == (2, "replaced")
    assert str(steps.stop).endswith("down changed in 1 of 4 numbers, first at [2]: 160 became 161")
    assert steps.run() is None
    launch.inputs[1][2] -= 1
    runner.breakpoints.remove(of_weight)
    mine[:] = 0
    steps = _prefill(runner)
    steps.replace(DOWN, meddles)
    assert steps.run() is not None
    assert str(steps.stop).endswith("the array changed in 1 of 3 numbers, first at [1]: 0 became 7")


def test_an_output_that_is_changed_while_it_is_used(runner: rl.Runner) -> None:
    runner.breakpoints.watch("embed")
    steps = _prefill(runner)
    steps.replace(GATE, lambda x, w: np.multiply(x, 2, out=x))
    assert steps.run() is not None
    assert str(steps.stop).endswith("the output of embed (embedding, launch 0) was computed")
    assert steps.run() is not None
    assert str(steps.stop).startswith(f"breakpoint 1, behind prefill[1] {GATE}: plain: the output of embed")
    assert str(steps.stop).endswith("changed in 12 of 12 numbers, first at [0, 0, 0]: 1 became 2")
    assert steps.run() is None


def test_what_a_person_changes_is_no_change(runner: rl.Runner) -> None:
    runner.breakpoints.watch("embed")
    steps = _prefill(runner)
    launch = steps.run()
    assert launch is not None
    launch.outputs[0][...] = 5
    assert steps.run() is None


def test_the_launch_at_which_a_run_stands_is_looked_at_too(runner: rl.Runner) -> None:
    """When it is made by going on; one that you made is yours."""
    steps = _prefill(runner)
    steps.step(3)
    launch = steps.run_until(after=lambda launch: launch.index == 2)
    assert launch is not None
    assert (launch.index, launch.done) == (2, "run")
    steps = _prefill(runner)
    launch = steps.step(3)
    assert launch is not None
    launch.run()
    assert steps.run_until(after=lambda launch: launch.index == 2) is None


def test_they_stop_whatever_goes_on(runner: rl.Runner) -> None:
    """`step` and `run_until` stop before what was asked for, as debuggers do."""
    runner.breakpoints.add(site=GATE)
    steps = _prefill(runner)
    launch = steps.step(4)
    assert launch is not None
    assert launch.index == 1
    assert str(steps.stop).startswith("breakpoint 1, before")
    launch = steps.step(2)
    assert launch is not None
    assert launch.index == 3
    assert steps.stop is None
    steps = _prefill(runner)
    launch = steps.run_until(operator="attention")
    assert launch is not None
    assert launch.index == 1
    launch = steps.run_until(operator="attention")
    assert launch is not None
    assert launch.index == 3
    assert str(steps.stop) == f"before {launch}: function prefill, operator attention"
    for count in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="step takes a positive whole number"):
            steps.step(count)  # type: ignore[arg-type]


def test_interrupting_from_another_thread(runner: rl.Runner) -> None:
    steps = _prefill(runner)
    waiting, going = threading.Event(), threading.Event()

    def slow(x: Any, w: Any) -> Any:
        waiting.set()
        going.wait(10)
        return x

    steps.replace(GATE, slow)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(steps.run()))
    thread.start()
    assert waiting.wait(10)
    steps.interrupt()
    going.set()
    thread.join(10)
    assert found[0].index == 2
    assert steps.run() is None


def test_the_collection(runner: rl.Runner) -> None:
    breaks = runner.breakpoints
    assert (len(breaks), repr(breaks)) == (0, "no breakpoints")
    first = breaks.add(site=DOWN, where="M>2")
    second = breaks.add(nan=True)
    assert list(breaks) == [first, second]
    _prefill(runner).run()
    assert str(breaks) == (f"1  site {DOWN}, M>2  (1 hit)\n2  a NaN or an infinity in an output  (0 hits)")
    breaks.remove(first)
    with pytest.raises(InputError, match="There is no breakpoint 1; there are: 2"):
        breaks.remove(1)
    breaks.remove(2)
    with pytest.raises(InputError, match="There is no breakpoint 7; there are none"):
        breaks.remove(7)
    assert breaks.add(kernel="plain").number == 3
    breaks.clear()
    assert not list(breaks)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown site": (
        {"site": "layers.9.mlp"},
        r"The model launches nothing at 'layers\.9\.mlp'; sites are named like embed",
    ),
    "a site of another layer": ({"site": "layers.9.mlp.down_proj"}, rf"named like {DOWN}\."),
    "an unknown operator": (
        {"operator": "norm"},
        r"operators there are append, attention, embedding, matmul",
    ),
    "an operator elsewhere": (
        {"site": DOWN, "operator": "attention"},
        r"launches no 'attention' at .*; operators there are matmul\.",
    ),
    "an unknown kernel": (
        {"site": DOWN, "kernel": "zip"},
        r"has no kernel 'zip' at .*; kernels there are double, plain, triple\.",
    ),
    "an unknown function": ({"function": "encode"}, r"no function 'encode'; there are: prefill, decode"),
    "a site of another function": ({"function": "p*", "site": "x"}, "prefill launches nothing at 'x'"),
    "a size of others": ({"operator": "attention", "where": "M=3"}, "launches has no size M"),
    "no condition": ({"where": "M is 3"}, r"'M is 3' is no condition on sizes; write M=17"),
    "an unknown size": ({"where": "rows=3"}, "no size 'rows' to ask for in 'rows=3'; there are: batch"),
    "a bound below 0": ({"differs": np.zeros(3), "bound": -1}, "bound must be a number of 0 or above"),
    "a bound that is none": ({"differs": np.zeros(3), "bound": "1"}, "bound must be a number"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_stop_anything_is_refused(runner: rl.Runner, case: str) -> None:
    said, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        runner.breakpoints.add(**said)
    assert len(runner.breakpoints) == 0


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            "layers.9.mlp",
            r"no weight, no cache and no site; weights and caches are named like down, gate, scale",
        ),
        (3, "A name or a NumPy array can be watched, not an object of type int"),
    ],
)
def test_what_cannot_be_watched(runner: rl.Runner, tensor: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runner.breakpoints.watch(tensor)


def test_a_part_that_is_not_there(runner: rl.Runner) -> None:
    runner.breakpoints.watch("down", np.s_[3, 4])
    with pytest.raises(InputError, match=r"down of shape \(4,\) has no part \(3, 4\) to watch"):
        _prefill(runner).run()


def test_replacing_at_sites_that_cannot(runner: rl.Runner) -> None:
    steps = _prefill(runner)
    acts: list[tuple[Callable[[], Any], str]] = [
        (lambda: steps.replace(DOWN, "zip"), "prefill has no kernel 'zip' at .*; kernels there are double"),
        (lambda: steps.replace(DOWN, 3), "name of a kernel or a function, not an object of type int"),  # type: ignore[arg-type]
        (lambda: next(steps).replace(3), "name of a kernel or by a function, not by an object"),  # type: ignore[arg-type]
    ]
    for act, message in acts:
        with pytest.raises(InputError, match=message):
            act()
    steps.replace("*", "triple")  # where there is such a kernel, and it is valid
    assert steps.finish()[0] == dispatching.prefill(3, "triple", "triple", "single")
    steps = runner.steps("decode", runner.start(), 1)
    steps.replace("*", "triple")
    assert steps.finish()[0] == dispatching.decode(1, "double", "double", "square")


def test_a_function_that_takes_something_else(runner: rl.Runner) -> None:
    steps = _prefill(runner)
    launch = steps.run_until(site=DOWN)
    assert launch is not None
    with pytest.raises(
        InputError,
        match=r"called with 2 arrays \(activation \[1, 3, 4\], weight \[4\]\), which it does not take",
    ):
        launch.replace(lambda x: x)
    launch.replace(np.add)  # has no signature
    assert steps.finish()[0] == dispatching.prefill(3, "plain", "plain", "single")


def test_steps_as_a_table(runner: rl.Runner) -> None:
    steps = _prefill(runner)
    assert repr(steps) == "<5 launches of prefill, not begun>"
    steps.step(2)
    assert steps.current is not None
    steps.current.skip()
    steps.step()
    rows = steps.launches
    assert [row.done for row in rows] == ["run", "skipped", "", "", ""]
    assert [row.kernel for row in rows] == ["lookup_all", "plain", "plain", "single", "copy"]
    assert [row.current for row in rows] == [False, False, True, False, False]
    assert rows[0].seconds is not None
    assert rows[1].seconds is rows[2].seconds is None
    lines = str(steps).splitlines()
    assert lines[0].split() == ["launch", "site", "operator", "kernel", "us"]
    assert lines[3].split() == [">", "2", DOWN, "matmul", "plain"]
    assert "<table>" in steps._repr_html_()
    steps.finish()
    assert repr(steps) == "<5 launches of prefill, ended>"
    assert [row.done for row in steps.launches] == ["run", "skipped", "run", "run", "run"]


def test_conditions_on_sizes() -> None:
    assert SizeCondition.parse("M==17")({"M": 17})
    assert not SizeCondition.parse("M==17")({"seq": 17})
    assert SizeCondition.parse(" batch >= 2,seq!=1 ")({"batch": 2, "seq": 3})
    assert SizeCondition.parse("kv_len=1..8").names == {"kv_len"}
    for text in ("", "M", "M=", "M=-1", "M=1..", "M<1..3", "M=1 or M=2", "=3", "M=1,,M=2"):
        with pytest.raises(InputError, match="is no condition on sizes"):
            SizeCondition.parse(text)


def test_differences_in_words() -> None:
    one = np.array([[1.0, 2.0], [np.nan, np.inf]], np.float32)
    assert difference([one], [one.copy()], 0) is None
    assert difference([np.zeros((0, 3))], [np.zeros((0, 3))], 0) is None
    other = one.copy()
    other[1] = 0
    assert difference([one, one], [one, other], 0.1) == (
        "output 1 differs in 2 of 4 numbers, most at [1, 0]: nan, expected 0"
    )
    assert not_finite([one[0]]) is None
    assert not_finite([one[0], one]) == "output 1 has 1 NaN and 1 infinite of 4 numbers, the first at [1, 0]"
    assert not_finite([np.array([1, 2])]) is None
