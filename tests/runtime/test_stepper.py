"""Launching kernel by kernel: bitwise a plain run, every way of interfering, and nothing left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm.errors import ArtifactError, ContextLengthError, InputError
from relax_llm.runtime import vm
from relax_llm.runtime.interpreter import Interpreter
from tests.artifact.checkpoints import GPT2, LLAMA, write
from tests.runtime import dispatching
from tests.runtime.conftest import roomy
from tests.runtime.dispatching import ATTENTION, DOWN, FUNCTIONS, GATE, make
from tests.runtime.libraries import Sums, build

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


@pytest.mark.parametrize("selection", ["dynamic", "pinned"])
@pytest.mark.parametrize("length", [1, 17, 300])
def test_bitwise_as_a_plain_run(model: rl.Runner, length: int, selection: Any) -> None:
    runner = rl.Runner(model.artifact, selection=selection)
    ids = np.random.default_rng(length).integers(0, runner.vocab_size, length)
    plain, stepped = runner.start(), runner.start()
    calls: list[tuple[str, Any]] = [
        ("prefill", ids),
        ("decode", 7),
        ("decode", [8]),
        ("prefill", ids[None, :3]),
    ]
    for function, tokens in calls:
        run = runner.decode if function == "decode" else runner.prefill
        expected = run(plain, tokens)
        steps = runner.steps(function, stepped, tokens)
        seen = [(launch.site, launch.symbol) for launch in steps]
        assert seen == [(said.site, said.kernel) for said in runner.artifact.manifest.functions[function]]
        np.testing.assert_array_equal(steps.logits, expected)
        assert stepped.tokens == plain.tokens
    np.testing.assert_array_equal(runner.decode(stepped, 1), runner.decode(plain, 1))


@pytest.mark.parametrize(
    ("weights", "kv_cache", "family"),
    [
        ("bf16", "auto", LLAMA),
        ("bf16", "auto", GPT2),
        ("f16", "auto", GPT2),
        ("q8", "q8", LLAMA),
        ("q4", "auto", GPT2),
        ("q4s", "auto", LLAMA),
    ],
    ids=["bf16-llama", "bf16-gpt2", "f16-gpt2", "q8-llama", "q4-gpt2", "q4s-llama"],
)
def test_bitwise_in_every_weight_format(
    weights: str, kv_cache: str, family: dict[str, Any], tmp_path: Path
) -> None:
    artifact = rl.compile(write(tmp_path / "checkpoint", roomy(family)), weights=weights, kv_cache=kv_cache)
    for runner in (rl.Runner(artifact), rl.Runner(artifact, selection="pinned")):
        ids = np.random.default_rng(0).integers(0, runner.vocab_size, 300)
        for length in (1, 17, 300):
            _assert_steps_are_a_run(runner, ids[:length])


def test_bitwise_with_forced_kernels(model: rl.Runner) -> None:
    ids = np.random.default_rng(0).integers(0, model.vocab_size, 300)
    forced = 0
    for launch in model.steps("prefill", model.start(), ids):
        others = [kernel for kernel in launch.kernels if kernel != launch.kernel]
        if others:
            with model.force(launch.site, others[0]):
                _assert_steps_are_a_run(model, ids)
            forced += 1
    assert forced


def _assert_steps_are_a_run(runner: rl.Runner, ids: Any) -> None:
    """A prefill and a decode, plainly, stepped, and stepped up to the middle and then natively."""
    plain, stepped, left = (runner.start() for _ in range(3))
    for function, tokens in (("prefill", ids), ("decode", 7)):
        expected = getattr(runner, function)(plain, tokens)
        np.testing.assert_array_equal(runner.steps(function, stepped, tokens).finish(), expected)
        steps = runner.steps(function, left, tokens)
        steps.step(len(steps) // 2)
        np.testing.assert_array_equal(steps.detach(), expected)
    assert stepped.tokens == left.tokens == plain.tokens
    expected = runner.decode(plain, 1)
    for state in (stepped, left):
        np.testing.assert_array_equal(runner.decode(state, 1), expected)


@pytest.mark.parametrize("function", ["logits", "hidden"])
def test_other_functions_and_batches(model: rl.Runner, function: str) -> None:
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (3, 5))
    output: Any = {"logits": "all", "hidden": "hidden"}[function]
    expected = model.prefill(model.start(3), ids, output=output)
    state = model.start(3)
    np.testing.assert_array_equal(model.steps(function, state, ids).finish(), expected)
    plain = model.start(3)
    model.prefill(plain, ids)
    expected = model.decode(plain, [1, 2, 3])
    np.testing.assert_array_equal(model.steps("decode", state, [1, 2, 3]).finish(), expected)


def test_what_a_launch_knows(model: rl.Runner) -> None:
    state = model.start()
    model.prefill(state, IDS)
    manifest = model.artifact.manifest
    for launch, said in zip(model.steps("decode", state, 7), manifest.functions["decode"], strict=True):
        assert launch.done == ""
        assert (launch.sizes["batch"], launch.sizes["seq"], launch.sizes["kv_len"]) == (1, 1, 11)
        assert [(o.role, o.name) for o in launch.arguments] == [(a.role, a.name) for a in said.arguments]
        for operand, argument in zip(launch.arguments, said.arguments, strict=True):
            if operand.role == "size":
                assert operand.value == launch.sizes[argument.name]
            else:
                assert operand.value.ndim == len(argument.shape)
                assert operand.value.dtype == argument.dtype
                assert operand.value.flags.writeable
        assert launch.shapes == tuple(a.shape for a in (*launch.inputs, *launch.outputs))
        assert launch.flops >= 0
        assert launch.bytes > 0
        assert launch.kernel in launch.kernels
        assert launch.why
        assert str(launch) == f"decode[{launch.index}] {launch.site}: {launch.kernel}"
        launch.run()
        assert launch.done == "run"
        assert repr(launch) == f"<launch {launch}, run>"


def test_views_are_the_memory(model: rl.Runner) -> None:
    """What NumPy sees by our view is what DLPack's own gives, at the same address."""
    for launch in model.steps("prefill", model.start(), IDS):
        for operand, value in zip(launch.arguments, launch._arguments, strict=True):
            if operand.role != "size":
                other = np.from_dlpack(value)
                assert other.ctypes.data == operand.value.ctypes.data
                np.testing.assert_array_equal(other, operand.value)


def test_numpy_in_place_of_every_kernel_of_a_site(model: rl.Runner) -> None:
    """A matmul's weight is packed; a norm's is not, and what it computes is known."""
    site = "norm" if "model.norm" in str(model.artifact.manifest.weights) else "ln_f"
    expected = model.prefill(model.start(), IDS)
    steps = model.steps("prefill", model.start(), IDS)
    launch = steps.run_until(site=site)
    assert launch is not None

    def norm(x: Any, weight: Any, bias: Any = 0.0) -> Any:
        centered = x - x.mean(-1, keepdims=True) if site == "ln_f" else x
        scale = np.sqrt((centered.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
        return (centered / scale * weight + bias).astype(np.float32)

    launch.replace(norm)
    assert launch.done == "replaced"
    np.testing.assert_allclose(steps.finish(), expected, atol=1e-4)
    launches = []
    steps = model.steps("prefill", model.start(), IDS)
    steps.replace(site, lambda *inputs: launches.append(1) or norm(*inputs))  # type: ignore[func-returns-value]
    np.testing.assert_allclose(steps.finish(), expected, atol=1e-4)
    assert launches == [1]


def test_a_launch_that_is_not_run_is_run(runner: rl.Runner) -> None:
    expected = runner.prefill(runner.start(), [1, 2, 3])
    steps = runner.steps("prefill", runner.start(), [1, 2, 3])
    launches = list(steps)
    assert [launch.done for launch in launches] == ["run"] * 5
    np.testing.assert_array_equal(steps.logits, expected)
    assert steps.current is None
    assert next(steps, None) is None


def test_skip_keeps_what_you_put_there(runner: rl.Runner) -> None:
    steps = runner.steps("prefill", runner.start(), [1, 2, 3])
    launch = steps.run_until(site=DOWN)
    assert launch is not None
    launch.outputs[0][...] = 5
    launch.skip()
    assert launch.done == "skipped"
    with pytest.raises(InputError, match="was skipped already"):
        launch.run()
    np.testing.assert_array_equal(steps.finish(), np.full(4, 5 * 2.0, np.float32))


def test_inputs_may_be_changed(runner: rl.Runner) -> None:
    steps = runner.steps("prefill", runner.start(), [1, 2, 3])
    launch = steps.run_until(site=GATE)
    assert launch is not None
    activation, weight = launch.inputs
    np.testing.assert_array_equal(activation[0, :, 0], [1, 2, 3])
    np.testing.assert_array_equal(weight, np.full(4, 16))
    activation[...] = 7
    launch.run()
    np.testing.assert_array_equal(launch.outputs[0], np.full((1, 3, 4), 7 + 16))
    activation[...] = 8
    launch.rerun()
    np.testing.assert_array_equal(launch.outputs[0], np.full((1, 3, 4), 8 + 16))
    np.testing.assert_array_equal(steps.finish(), np.full(4, (8 + 16 + 160) * 2.0))


def test_another_kernel_for_one_launch(runner: rl.Runner) -> None:
    steps = runner.steps("prefill", runner.start(), [1, 2, 3])
    launch = steps.run_until(site=DOWN)
    assert launch is not None
    assert (launch.kernel, launch.kernels) == ("plain", ("plain", "double", "triple"))
    launch.replace("triple")
    assert steps.finish()[0] == dispatching.prefill(3, "plain", "triple", "single")


def test_another_kernel_for_all_that_match(runner: rl.Runner) -> None:
    steps = runner.steps("prefill", runner.start(), [1, 2, 3])
    steps.replace("layers.*.mlp.*", "triple")
    steps.replace("layers.0.mlp.up_proj", "double", operator="matmul")
    launches = list(steps)
    assert [launch.done for launch in launches] == ["run", "replaced", "replaced", "run", "run"]
    assert steps.logits[0] == dispatching.prefill(3, "double", "triple", "single")


def test_what_a_runner_was_told_holds_here_too(runner: rl.Runner) -> None:
    with runner.force("layers.*.mlp.*", "triple"), runner.plan({ATTENTION: "single"}):
        steps = runner.steps("prefill", runner.start(), [1, 2, 3])
        assert [launch.kernel for launch in steps] == ["lookup_all", "triple", "triple", "single", "copy"]
        assert steps.logits[0] == dispatching.prefill(3, "triple", "triple", "single")
        launch = runner.steps("prefill", runner.start(), [1, 2, 3]).run_until(site=DOWN)
        assert launch is not None
        assert launch.why == "it is forced, pinned or wanted by another plan"
    pinned = rl.Runner(runner.artifact, selection="pinned")
    steps = pinned.steps("decode", pinned.start(), 1)
    assert [launch.kernel for launch in steps] == ["lookup_all", "single", "plain", "copy", "plain"]
    assert steps.logits[0] == dispatching.decode(1, "plain", "plain", "single")


def test_why(runner: rl.Runner) -> None:
    steps = runner.steps("decode", runner.start(), 1)
    assert [launch.why for launch in steps] == [
        "it is the only kernel here",
        "the plan has it for these sizes",
        "the plan has it for these sizes",
        "it is the only kernel here",
        "the plan has it for these sizes",
    ]


REPLACEMENTS: dict[str, tuple[Any, str]] = {
    "another shape": (
        lambda x, w: x[0],
        r"must return float32 of shape \(1, 3, 4\), not float32 of shape \(3, 4\)",
    ),
    "another type": (lambda x, w: x.astype(np.float64), r"must return float32 .*, not float64"),
    "nothing": (lambda x, w: None, "must return 1 arrays, not 0"),
    "too much": (lambda x, w: (x, x), "must return 1 arrays, not 2"),
    "an unknown kernel": ("fastest", r"'fastest' does not serve .* there are: plain, double, triple"),
    "a kernel of another site": ("single", r"there are: plain, double, triple"),
}


@pytest.mark.parametrize("case", list(REPLACEMENTS))
def test_replacements_that_do_not_fit(runner: rl.Runner, case: str) -> None:
    replacement, message = REPLACEMENTS[case]
    steps = runner.steps("prefill", runner.start(), [1, 2, 3])
    launch = steps.run_until(site=DOWN)
    assert launch is not None
    with pytest.raises(InputError, match=message):
        launch.replace(replacement)
    assert launch.done == ""
    assert steps.finish()[0] == dispatching.prefill(3, "plain", "plain", "single")


def test_a_kernel_that_is_not_valid_here(runner: rl.Runner) -> None:
    launch = runner.steps("decode", runner.start(), 1).run_until(site=DOWN)
    assert launch is not None
    with pytest.raises(InputError, match=r"'triple' does not serve .* there are: plain, double\."):
        launch.replace("triple")


def test_going_on_to(runner: rl.Runner) -> None:
    def steps() -> Any:
        return runner.steps("prefill", runner.start(), [1, 2, 3])

    assert [steps().step(count).index for count in range(1, 6)] == [0, 1, 2, 3, 4]
    assert steps().step(6) is None
    assert steps().run_until(kernel="plain").index == 1
    assert steps().run_until(operator="attention").index == 3
    assert steps().run_until(site="layers.1.*", operator="append").index == 4
    assert steps().run_until(where=lambda launch: launch.sizes.get("M") == 3 and launch.index > 1).index == 2
    assert steps().run_until(kernel="triple") is None
    going = steps()
    assert [going.run_until(operator="matmul").index for _ in range(2)] == [1, 2]
    assert going.run_until(operator="matmul") is None
    found = steps().run_until(after=lambda launch: launch.outputs[0].max() > 30)
    assert (found.index, found.done) == (2, "run")


def test_patterns_that_match_nothing(runner: rl.Runner) -> None:
    steps = runner.steps("prefill", runner.start(), [1, 2, 3])
    acts: list[Callable[[], Any]] = [
        lambda: steps.run_until(site="layers.9.*"),
        lambda: steps.replace("layers.9.*", "plain"),
    ]
    for act in acts:
        with pytest.raises(
            InputError, match=r"prefill launches nothing at 'layers\.9\.\*'; sites are named like embed"
        ):
            act()
    with pytest.raises(
        InputError, match=r"launches no 'norm'; operators there are append, attention, embedding"
    ):
        steps.run_until(operator="norm")
    assert steps.current is None


def test_time_leaves_everything_as_it_was(model: rl.Runner) -> None:
    state, other = model.start(), model.start()
    for each in (state, other):
        model.prefill(each, IDS)
    expected = model.decode(other, 7)
    steps = model.steps("decode", state, 7)
    for launch in steps:
        before = [array.copy() for array in (*launch.inputs, *launch.outputs)]
        assert launch.time(2) > 0
        for array, was in zip((*launch.inputs, *launch.outputs), before, strict=True):
            np.testing.assert_array_equal(array, was)
        launch.run()
        after = launch.outputs[0].copy()
        assert launch.time(1) > 0
        np.testing.assert_array_equal(launch.outputs[0], after)
    np.testing.assert_array_equal(steps.logits, expected)
    np.testing.assert_array_equal(model.decode(state, 8), model.decode(other, 8))


def test_cold_times(runner: rl.Runner) -> None:
    launch = next(runner.steps("decode", runner.start(), 1))
    assert launch.time(1, cold=True) > 0
    for repeat in (0, -1, 1.5, True, None):
        with pytest.raises(InputError, match="repeat must be a positive whole number"):
            launch.time(repeat)  # type: ignore[arg-type]


def test_launches_that_are_over(runner: rl.Runner) -> None:
    steps = runner.steps("prefill", runner.start(), [1, 2, 3])
    first, second = next(steps), next(steps)
    for act in (first.run, first.rerun, first.skip, first.time, lambda: first.replace("x")):
        with pytest.raises(InputError, match=r"prefill\[0\] embed: lookup_all is over"):
            act()
    with pytest.raises(InputError, match="has not been run"):
        second.rerun()
    second.run()
    with pytest.raises(InputError, match="was run already"):
        second.replace("triple")


def test_leaving_in_the_middle(runner: rl.Runner) -> None:
    expected = runner.prefill(runner.start(), [1, 2, 3])
    state = runner.start()
    for launch in runner.steps("prefill", state, [1, 2, 3]):
        if launch.site == DOWN:
            break
    assert state.length == 0
    with runner.steps("prefill", state, [1, 2, 3]) as steps:
        steps.step(2)
    with pytest.raises(InputError, match="were closed; begin again"):
        next(steps)
    with pytest.raises(InputError, match="has not ended: 2 of 5 launches have begun"):
        _ = steps.logits
    assert state.length == 0
    np.testing.assert_array_equal(runner.prefill(state, [1, 2, 3]), expected)


def test_an_error_in_a_replacement_leaves_the_launch_to_be_made(runner: rl.Runner) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    state = runner.start()
    steps = runner.steps("prefill", state, [1, 2, 3])
    steps.replace(DOWN, interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps.finish()
    assert state.length == 0
    steps.replace(DOWN, "double")
    assert steps.finish()[0] == dispatching.prefill(3, "plain", "double", "single")
    assert state.length == 3


def test_a_state_that_went_on_meanwhile(runner: rl.Runner) -> None:
    state = runner.start()
    steps = runner.steps("prefill", state, [1, 2, 3])
    steps.step()
    runner.decode(state, 1)
    with pytest.raises(InputError, match="had 0 tokens when these steps began and has 1 now"):
        steps.finish()
    assert state.tokens == [1]


def test_two_at_once_and_plain_runs_between(model: rl.Runner) -> None:
    prompts = [IDS, IDS[::-1]]
    expected = [model.prefill(model.start(), prompt) for prompt in prompts]
    steps = [model.steps("prefill", model.start(), prompt) for prompt in prompts]
    for _ in range(len(steps[0])):
        for each in steps:
            next(each)
        model.prefill(model.start(), [1, 2, 3])
    for each, logits in zip(steps, expected, strict=True):
        np.testing.assert_array_equal(each.finish(), logits)


def test_what_steps_refuses(runner: rl.Runner, model: rl.Runner) -> None:
    state = runner.start()
    with pytest.raises(InputError, match="There is no function 'encode'; there are: prefill, decode"):
        runner.steps("encode", state, [1])
    with pytest.raises(InputError, match="no tokens"):
        runner.steps("prefill", state, [])
    with pytest.raises(InputError, match="decode takes one token for each sequence"):
        runner.steps("decode", state, [[1, 2]])
    with pytest.raises(InputError, match="belongs to another model"):
        runner.steps("prefill", model.start(), [1])
    with pytest.raises(ContextLengthError):
        runner.steps("prefill", state, [1] * 257)
    assert state.length == 0


def test_a_manifest_of_another_library(tmp_path: Path) -> None:
    for index, launches in enumerate((FUNCTIONS["decode"], FUNCTIONS["prefill"][:-1])):
        functions = {**FUNCTIONS, "prefill": launches}
        runner = rl.Runner(make(tmp_path / f"artifact{index}", functions=functions))
        with pytest.raises(ArtifactError, match="launches other kernels in prefill than the manifest says"):
            runner.steps("prefill", runner.start(), [1, 2, 3]).finish()


def test_instructions_of_every_kind(tmp_path: Path) -> None:
    """Branches, calls of other functions and constant tensors, as TVM's own machine has it."""
    machine = vm.VirtualMachine(build(Sums, tmp_path / "lib.so"))
    interpreter = Interpreter(machine)
    x, w = (np.arange(4, dtype=np.float32) + i for i in range(2))
    for condition in (True, False):
        arguments = (vm.tensor(np.array(condition)), vm.tensor(x))
        expected = vm.numpy(machine["either"](*arguments))
        np.testing.assert_array_equal(vm.view(interpreter.start("either", *arguments).finish()), expected)
    expected = vm.numpy(machine["twice"](vm.tensor(x), vm.tensor(w)))
    np.testing.assert_array_equal(
        vm.view(interpreter.start("twice", vm.tensor(x), vm.tensor(w)).finish()), expected
    )
    with pytest.raises(ArtifactError, match="twice takes 2 arguments, and was given 1"):
        interpreter.start("twice", vm.tensor(x))
    with pytest.raises(ArtifactError, match="no function 'thrice'"):
        interpreter.start("thrice")
    program = machine.program
    machine.program = replace(program, functions=program.renamed({"add": "nowhere"}).functions)
    with pytest.raises(ArtifactError, match="calls 'nowhere', which is not there"):
        Interpreter(machine)
