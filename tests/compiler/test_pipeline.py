"""The pipeline as a list that users change: naming passes, adding their own, what is refused, what the cache knows."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tvm
from tvm import IRModule, relax

import relax_llm as rl
from relax_llm.compiler.passes.legalize import Legalize
from relax_llm.compiler.passes.schedule_rest import ScheduleRest
from relax_llm.compiler.pipeline import Launches, Pipeline, run
from relax_llm.compiler.planner import Planner
from relax_llm.compiler.sources import pass_sources
from relax_llm.errors import CompileError
from relax_llm.kernels.machine import machine

from ..artifact.checkpoints import LLAMA, llama_shapes, tensors_for, write
from . import passes_of_a_user as users
from .modules import TARGET, kernels_of, stages
from .probes import MACHINE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OURS = [
    *("HoistLastToken", "CombineProjections", "FuseMatmul", "Legalize", "FuseNorm", "SelectKernels"),
    *("ScreenHead", "LiftWeights"),
]


def same(mod: IRModule) -> IRModule:
    """A pass that changes nothing."""
    return mod


def test_it_shows_its_order() -> None:
    passes = rl.pipeline()
    assert passes.names()[:8] == OURS
    passes.insert_after("Legalize", same)
    shown = str(passes).splitlines()
    assert [line.split()[1] for line in shown[1:]] == passes.names()
    assert shown[4:7] == ["  3  Legalize", "  4  same  (yours)", "  5  FuseNorm"]
    assert next(line for line in shown if "Launches" in line).endswith("(border)")


@pytest.mark.parametrize("where", ["Legalize", Legalize, rl.pipeline()[3]], ids=["name", "class", "entry"])
def test_passes_are_found_by_name_class_and_entry(where: Any) -> None:
    passes = rl.pipeline()
    passes.insert_before(where, same)
    assert passes.names()[2:5] == ["FuseMatmul", "same", "Legalize"]
    passes.insert_after(where, same)
    assert passes.names()[3:7] == ["same", "Legalize", "same", "FuseNorm"]
    passes.replace(where, same)
    assert passes[3:6] == [same, same, same]


def test_functions_of_tvm_are_found() -> None:
    passes = rl.pipeline()
    passes.remove(relax.transform.FuseTIR)
    assert "FuseTIR" not in passes.names()
    passes.insert(0, relax.transform.FoldConstant())
    assert passes.position("FoldConstant") == 0


def test_passes_move() -> None:
    passes = rl.pipeline()
    passes.move_before("LiftWeights", "Legalize")
    assert passes.names()[:8] == [*OURS[:3], "LiftWeights", *OURS[3:7]]
    passes.move_after("LiftWeights", "ScreenHead")
    assert passes.names() == rl.pipeline().names()
    passes.move_after("Legalize", "Legalize")
    assert passes.names() == rl.pipeline().names()


def test_it_is_a_list() -> None:
    passes = rl.pipeline()
    passes.append(same)
    assert passes.pop() is same
    assert passes == rl.pipeline()
    del passes[0]
    passes += [same]
    assert len(passes) == len(rl.pipeline())
    assert isinstance(passes[2:], Pipeline)
    copied = passes.copy()
    copied.clear()
    assert passes
    assert rl.pipeline().names()[:8] == OURS  # each is a new one


def test_wrong_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(
        CompileError, match=r"no pass FuseMatmuls; it has HoistLastToken, CombineProjections, .*, HideI"
    ):
        rl.pipeline().insert_before("FuseMatmuls", same)
    for change in ("remove", "position"):
        with pytest.raises(CompileError, match="no pass same; it has"):
            getattr(rl.pipeline(), change)(same)
    passes = rl.pipeline()
    passes[3:3] = [same, same]
    with pytest.raises(CompileError, match="same is in the pipeline 2 times, at 3 and 4"):
        passes.remove("same")
    with pytest.raises(CompileError, match="no pass Launches"):
        Pipeline([same]).parts()


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (users.empties, "The pass empties gives NoneType; it must give the IRModule"),
        (users.loses_decode, "The pass loses_decode loses the function 'decode'"),
        (users.untyped, r"The pass untyped gives a module that is not well-formed: .*R\.add"),
        (
            users.returns_token_ids,
            "The pass returns_token_ids changes what 'hidden' gives back from .*float32.* to .*int",
        ),
        (users.divides_by_zero, "The pass divides_by_zero fails on what it was given: ZeroDivisionError"),
        (users.ScaleSilu, "ScaleSilu is in the pipeline but is not a pass .* put an object of the class in"),
        (17, "int is in the pipeline but is not a pass"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_pass_is_refused_by_name(step: Any, says: str) -> None:
    traced = stages("llama")[0][1]
    planner = Planner(machine(TARGET))
    with pytest.raises(CompileError, match=says):
        run(traced, Pipeline([step]).bind(planner))


def test_launches_may_not_change_after_the_border() -> None:
    _, after = rl.pipeline().parts()
    after.insert_after("ToNonDataflow", same)
    launched = stages("llama")[-1][1]
    planner = Planner(machine(TARGET))
    lowered = run(launched, after.bind(planner), launches_stay=True)
    assert kernels_of(lowered).keys() >= kernels_of(launched).keys()
    after.replace("same", users.launches_twice)
    with pytest.raises(CompileError, match="The pass launches_twice changes which kernels are launched"):
        run(launched, after.bind(planner), launches_stay=True)


def test_a_pass_may_ask_what_is_compiled_for() -> None:
    seen: list[str] = []
    run(stages("llama")[0][1], Pipeline([users.ForMachine(seen)]).bind(Planner(machine(TARGET))))
    assert seen == [TARGET]


@pytest.mark.parametrize("name", OURS[:-1])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_passes_of_ours_can_be_left_out(name: str, model: str) -> None:
    """What it would have done is then TVM's work: slower, and no less scheduled.

    All but LiftWeights, without which functions take weights as the checkpoint has them.
    """
    passes = rl.pipeline()
    passes.remove(name)
    planner = Planner(machine(TARGET))
    before, after = (part.bind(planner) for part in passes.parts())
    launched = run(stages(model)[0][1], before)
    for symbol, func in kernels_of(launched).items():
        assert bool(func.attrs["tirx.is_scheduled"]), symbol
    lowered = run(launched, after, launches_stay=True)
    relax.analysis.well_formed(lowered)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny llama, and the same with `down_proj` three times as large."""
    config = {**LLAMA, "mlp_bias": False}
    tensors = tensors_for(llama_shapes(config))
    larger = {name: value * np.float32(3 if "down_proj" in name else 1) for name, value in tensors.items()}
    directory = tmp_path_factory.mktemp("pipeline")
    return write(directory / "plain", config, tensors), write(directory / "larger", config, larger)


def test_a_pass_of_ones_own_changes_the_model(checkpoints: tuple[Path, Path]) -> None:
    """Three times silu(gate) is three times the input of down_proj, so three times its weight."""
    plain, larger = checkpoints
    passes = rl.pipeline()
    passes.insert_before("CombineProjections", users.ScaleSilu(3.0))
    found, expected = (
        rl.compile(c, pipeline=p, target=MACHINE.name) for c, p in ((plain, passes), (larger, None))
    )
    ids = [5, 1, 9, 22, 8]
    results = []
    for artifact in (found, expected, rl.compile(plain, target=MACHINE.name)):
        runner = rl.Runner(artifact)
        results.append(runner.prefill(runner.start(), ids, output="all"))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-4)
    assert np.abs(results[0] - results[2]).max() > 0.1  # it does matter


def test_the_cache_knows_the_passes(checkpoints: tuple[Path, Path]) -> None:
    plain, _ = checkpoints

    def path(*steps: Any) -> Path:
        passes = rl.pipeline()
        for step in steps:
            passes.insert_before("CombineProjections", step)
        return rl.compile(plain, pipeline=passes, target=MACHINE.name).path

    assert path() == rl.compile(plain, target=MACHINE.name).path
    assert path(users.ScaleSilu(3.0)) == path(users.ScaleSilu(3.0))
    assert path(users.ScaleSilu(3.0)) != path(users.ScaleSilu(2.0))


def _scaled_by(factor: float) -> Callable[[IRModule], IRModule]:
    return lambda mod: mod if factor else IRModule()


def _sources(step: Any) -> list[str]:
    found = pass_sources([step])
    assert found is not None
    return found


def test_sources_tell_passes_apart() -> None:
    assert pass_sources(rl.pipeline()) is None
    assert pass_sources(None) is None
    assert pass_sources(rl.pipeline()[1:]) is not None
    assert _sources(same) == _sources(same)
    assert _sources(_scaled_by(1.0)) == _sources(_scaled_by(1.0)) != _sources(_scaled_by(2.0))
    first, second = (lambda mod: mod), (lambda mod: mod if mod else 1)
    assert _sources(first) != _sources(second)
    assert _sources(functools.partial(same)) == _sources(functools.partial(same))
    assert _sources(functools.partial(run, steps=[])) != _sources(functools.partial(run, steps=()))
    assert _sources(users.ScaleSilu(1.0)) == _sources(users.ScaleSilu(1.0)) != _sources(users.ScaleSilu(1.5))
    assert _sources(users.ScaleSilu(1.0).__call__) != _sources(users.ScaleSilu(1.5).__call__)


def test_what_does_not_say_what_it_does_is_new_each_time() -> None:
    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def decorated(mod: IRModule, _: Any) -> IRModule:
        return mod

    class Local:
        def __call__(self, mod: IRModule) -> IRModule:
            return mod

    for step in (decorated, relax.transform.FuseOps(2), Local(), functools.partial(same, object())):
        assert _sources(step) != _sources(step)


def test_a_python_pass_in_tvms_wrapping_is_known() -> None:
    assert _sources(Wrapped(2)) == _sources(Wrapped(2)) != _sources(Wrapped(3))
    passes = rl.pipeline()
    wrapped: Any = Wrapped(2)
    passes.insert_after(ScheduleRest, wrapped)
    assert passes.names()[passes.position(Launches) - 1] == "Wrapped"


@tvm.transform.module_pass(opt_level=0, name="Wrapped")
class Wrapped:
    """A module pass as TVM's documentation writes them."""

    def __init__(self, number: int) -> None:
        self.number = number

    def transform_module(self, mod: IRModule, _: Any) -> IRModule:
        return mod


def test_the_names_are_those_of_the_documentation() -> None:
    """Every pass of ours has a docstring that shows its work."""
    for entry in rl.pipeline():
        kind = getattr(entry, "kind", None)
        if isinstance(kind, type):
            assert re.search(r"Before::\n.*After::\n", kind.__doc__ or "", re.DOTALL), kind
