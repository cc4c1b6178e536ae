"""Leaving steps in the middle: dropped, failed, closed, or to run on natively; and what is left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from relax_llm.errors import InputError
from relax_llm.runtime.choices import Rule
from tests.runtime import dispatching
from tests.runtime.dispatching import ATTENTION, DOWN, GATE

if TYPE_CHECKING:
    import relax_llm as rl

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


@pytest.mark.parametrize("how", ["dropped", "closed", "broken off", "failed", "interrupted"])
def test_abandoned_steps_give_their_memory_back_at_once(runner: rl.Runner, how: str) -> None:
    """Without the collector of garbage, which does not know how large tensors are."""
    expected = runner.prefill(runner.start(), [1, 2, 3])
    state = runner.start()
    gc.collect()
    gc.disable()
    try:
        gone = _abandoned(runner, state, how)
        assert gone() is None
    finally:
        gc.enable()
    assert state.length == 0
    np.testing.assert_array_equal(runner.steps("prefill", state, [1, 2, 3]).finish(), expected)
    np.testing.assert_array_equal(runner.prefill(runner.start(), [1, 2, 3]), expected)


def _abandoned(runner: rl.Runner, state: rl.State, how: str) -> weakref.ref[Any]:
    """What held the tensors of a call that was left in the middle."""
    steps = runner.steps("prefill", state, [1, 2, 3])
    gone = weakref.ref(steps._frame)

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt if how == "interrupted" else ZeroDivisionError

    if how == "broken off":
        for launch in steps:
            if launch.site == DOWN:
                break
        return gone
    steps.step(3)
    if how == "closed":
        steps.close()
        assert gone() is None
    if how in ("failed", "interrupted"):
        steps.replace(DOWN, fail)
        with contextlib.suppress(ZeroDivisionError, KeyboardInterrupt):
            steps.finish()
        assert steps.current is not None
        assert steps.current.done == ""
    return gone


def test_memory_does_not_grow(model: rl.Runner) -> None:
    """1,000 stepped decodes, some left in the middle, some natively from there."""
    state = model.start()
    model.prefill(state, IDS)

    def decodes(count: int) -> None:
        for turn in range(count):
            steps = model.steps("decode", state, 7)
            launch = steps.run_until(operator="attention")
            assert launch is not None
            assert launch.outputs
            if turn % 10 == 1:
                continue
            if turn % 10 == 2:
                steps.detach()
            else:
                steps.finish()
            state.truncate(len(IDS))

    decodes(100)
    gc.collect()
    objects, memory = len(gc.get_objects()), _resident()
    decodes(1000)
    gc.collect()
    assert len(gc.get_objects()) - objects < 500
    assert _resident() - memory < 4e6  # 4 KB a decode


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_native_from_everywhere(model: rl.Runner) -> None:
    """From before and behind every launch: nothing is made twice, and nothing is left out."""
    state = model.start()
    model.prefill(state, IDS)
    with model.counting() as plainly:
        expected = model.decode(state, 7)
    for index in range(len(model.artifact.manifest.functions["decode"])):
        for made in (False, True):
            state.truncate(len(IDS))
            steps = model.steps("decode", state, 7)
            with model.counting() as counts:
                launch = steps.step(index + 1)
                assert launch is not None
                if made:
                    launch.run()
                np.testing.assert_array_equal(steps.detach(), expected)
            assert sorted(map(str, counts.rows)) == sorted(map(str, plainly.rows))
            assert steps.ended
            assert steps.current is None
            np.testing.assert_array_equal(steps.detach(), expected)
            assert state.length == len(IDS) + 1
    state.truncate(len(IDS))
    np.testing.assert_array_equal(model.steps("decode", state, 7).detach(), expected)


def test_native_without_counting(model: rl.Runner) -> None:
    expected = model.prefill(model.start(), IDS)
    for index in range(len(model.artifact.manifest.functions["prefill"])):
        steps = model.steps("prefill", model.start(), IDS)
        steps.step(index + 1)
        np.testing.assert_array_equal(steps.detach(), expected)


def test_native_from_what_you_changed(runner: rl.Runner) -> None:
    steps = runner.steps("prefill", runner.start(), [1, 2, 3])
    launch = steps.run_until(site=DOWN)
    assert launch is not None
    launch.replace(lambda x, w: x + 3 * w)
    assert steps.detach()[0] == dispatching.prefill(3, "plain", "triple", "single")
    with runner.force(DOWN, "triple"), runner.plan({ATTENTION: "single"}), runner.counting() as counts:
        steps = runner.steps("prefill", runner.start(), [1, 2, 3])
        steps.step(2)
        assert steps.detach()[0] == dispatching.prefill(3, "plain", "triple", "single")
    assert counts.site(DOWN) == {"triple": 1}


def test_native_refuses_what_only_control_can_do(runner: rl.Runner) -> None:
    state = runner.start()
    steps = runner.steps("prefill", state, [1, 2, 3])
    steps.replace(DOWN, "triple")
    steps.step(2)
    with pytest.raises(
        InputError, match=r"layers\.1\.mlp\.down_proj .* is replaced under control only; finish\(\)"
    ):
        steps.detach()
    steps.step(2)
    assert steps.detach()[0] == dispatching.prefill(3, "plain", "triple", "single")
    steps = runner.steps("decode", state, 1)
    steps.close()
    with pytest.raises(InputError, match="were closed"):
        steps.detach()


def test_a_native_rest_that_is_interrupted(runner: rl.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    state = runner.start()
    with runner.counting(), monkeypatch.context() as patch:
        steps = runner.steps("prefill", state, [1, 2, 3])
        steps.step(2)
        patch.setattr(Rule, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            steps.detach()
    with pytest.raises(InputError, match="were closed"):
        steps.finish()
    assert state.length == 0
    assert runner.prefill(state, [1, 2, 3])[0] == dispatching.prefill(3, "plain", "plain", "single")


def test_stepped_launches_are_counted(model: rl.Runner) -> None:
    with model.counting() as plainly:
        model.prefill(model.start(), IDS)
    with model.counting() as counts:
        model.steps("prefill", model.start(), IDS).finish()
    assert sorted(map(str, counts.rows)) == sorted(map(str, plainly.rows))


def test_what_counts_as_a_launch(runner: rl.Runner) -> None:
    """What the library's kernels did for the run: not what was skipped, timed, or done by a function."""
    with runner.counting() as counts:
        steps = runner.steps("prefill", runner.start(), [1, 2, 3])
        gate = steps.run_until(site=GATE)
        assert gate is not None
        gate.time(3)
        gate.replace("triple")
        gate.rerun()
        down = steps.run_until(site=DOWN)
        assert down is not None
        down.replace(lambda x, w: x)
        scale = steps.run_until(operator="attention")
        assert scale is not None
        scale.skip()
        steps.finish()
    assert counts.site(GATE) == {"triple": 1, "plain": 1}
    assert counts.launches(site=DOWN) == counts.launches(operator="attention") == 0
    assert counts.launches() == 4


def test_making_launches_again_changes_nothing(model: rl.Runner) -> None:
    """Every kernel gives the same when it is launched again, those that write the cache in place too."""
    state, other = model.start(), model.start()
    for each in (state, other):
        model.prefill(each, IDS)
    expected = model.decode(other, 7)
    steps = model.steps("decode", state, 7)
    for launch in steps:
        launch.run()
        for _ in range(2):
            launch.rerun()
        assert launch.seconds is not None
    np.testing.assert_array_equal(steps.logits, expected)
    np.testing.assert_array_equal(model.decode(state, 8), model.decode(other, 8))


def test_what_is_edited_is_edited_there_only(model: rl.Runner) -> None:
    """Activations end with the call, a cache is the state's, weights are the runner's: the file keeps its own."""
    file = model.artifact.path / "weights.safetensors"
    before = file.read_bytes()
    state, other = model.start(), model.start()
    for each in (state, other):
        model.prefill(each, IDS)
    expected = model.decode(other.fork(), 7)
    steps = model.steps("decode", state.fork(), 7)
    launch = steps.run_until(operator="attention")
    assert launch is not None
    launch.inputs[0][...] = 100
    assert not np.array_equal(steps.finish(), expected)
    np.testing.assert_array_equal(model.decode(state.fork(), 7), expected)

    steps = model.steps("decode", state, 7)
    launch = steps.run_until(operator="attention")
    assert launch is not None
    (values,) = (o.value for o in launch.arguments if o.name.endswith("v_cache"))
    values[:, :, 0] = 5
    steps.close()
    assert not np.array_equal(model.decode(state, 7), expected)
    np.testing.assert_array_equal(model.decode(other.fork(), 7), expected)

    steps = model.steps("decode", other.fork(), 7)
    launch = steps.run_until(operator="norm")
    assert launch is not None
    weight = launch.inputs[1]
    kept = weight.copy()
    weight[...] = 0
    steps.close()
    assert not np.array_equal(model.decode(other.fork(), 7), expected)
    weight[...] = kept
    np.testing.assert_array_equal(model.decode(other.fork(), 7), expected)
    assert file.read_bytes() == before


def test_timing_that_fails_leaves_everything_as_it_was(model: rl.Runner) -> None:
    calls = []

    def fails(*inputs: Any) -> Any:
        calls.append(len(inputs))
        for array in inputs:
            if array.dtype == np.float32 and array.ndim > 2:
                array[...] = 0
        raise KeyboardInterrupt

    state, other = model.start(), model.start()
    for each in (state, other):
        model.prefill(each, IDS)
    expected = model.decode(other, 7)
    steps = model.steps("decode", state, 7)
    launch = steps.run_until(operator="append")
    assert launch is not None
    with pytest.raises(KeyboardInterrupt):
        launch.time(3, kernel=fails)
    assert calls
    np.testing.assert_array_equal(steps.finish(), expected)
    np.testing.assert_array_equal(model.decode(state, 8), model.decode(other, 8))


def test_timing_other_kernels(runner: rl.Runner) -> None:
    steps = runner.steps("prefill", runner.start(), [1, 2, 3])
    launch = steps.run_until(site=DOWN)
    assert launch is not None
    for kernel in launch.kernels:
        assert launch.time(2, kernel=kernel) > 0
    assert launch.time(2, kernel=lambda x, w: x + w) > 0
    with pytest.raises(InputError, match=r"'single' does not serve .* there are: plain, double, triple"):
        launch.time(2, kernel="single")
    with pytest.raises(InputError, match=r"The replacement of .* must return float32"):
        launch.time(2, kernel=lambda x, w: x[0])
    assert launch.done == ""
    assert launch.seconds is None
    assert steps.finish()[0] == dispatching.prefill(3, "plain", "plain", "single")
