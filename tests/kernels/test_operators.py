"""What every operator's record promises, tested for all of them from the records alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from relax_llm.errors import KernelError
from relax_llm.kernels.checking import check
from relax_llm.kernels.forms import Realized, realize
from relax_llm.kernels.library import build, built_in
from relax_llm.kernels.machine import machine
from relax_llm.kernels.operators import OPERATORS, Mistake, Operator
from relax_llm.kernels.points import all_sizes, sizes
from relax_llm.kernels.problem import Problem, problem_of
from relax_llm.plan.kernel import AXES, kernel

from ..machines import PLAINER
from .bench import generate, in_turns, launch_function, machine_of
from .guarded import InOut, Out

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from relax_llm.kernels.operators import Operand

ANY = machine(PLAINER)
SAMPLES = [(record, problem) for record in OPERATORS.values() for problem in record.samples]
samples = pytest.mark.parametrize(
    ("record", "problem"), SAMPLES, ids=[problem.name for _, problem in SAMPLES]
)
SOME = [(record, problem) for record in OPERATORS.values() for problem in record.samples[::2]]
some_samples = pytest.mark.parametrize(("record", "problem"), SOME, ids=[problem.name for _, problem in SOME])
MISTAKES = [(record, mistake) for record in OPERATORS.values() for mistake in record.mistakes]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered from one test to the next."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_public_list_is_that_of_the_records() -> None:
    assert set(AXES) == set(OPERATORS)
    for record in OPERATORS.values():
        assert record.samples, record.name
        assert record.benchmarks, record.name
        assert {type(problem) for problem in (*record.samples, *record.benchmarks)} == {record.problem}


@samples
def test_operands_are_well_formed(record: Operator, problem: Problem) -> None:
    known = set(all_sizes(record, dict.fromkeys(record.axes, 1)))
    for operands, extra in ((record.operands, set()), (record.launched, {"batch", "seq"})):
        given = operands(problem, None)
        assert len({operand.name for operand in given}) == len(given)
        assert {size for o in given for size in o.shape if isinstance(size, str)} <= known | extra
        assert any(operand.is_result for operand in given)


@samples
def test_inputs_and_results_have_the_operands_shapes(record: Operator, problem: Problem) -> None:
    rng = np.random.default_rng(0)
    for point in list(sizes(record, built_in(problem, ANY)[0].sizes))[::5]:
        every = all_sizes(record, point)
        for exact in (False, True):
            values = record.inputs(problem, every, rng, exact)
            expected = record.expected(problem, every, values, exact)
            for operand in record.operands(problem, None):
                if operand.role in ("input", "weight", "updated"):
                    assert values[operand.name].shape == operand.at(every)
                    assert values[operand.name].dtype.name == operand.dtype
                if operand.is_result:
                    found = expected[operand.name]
                    assert found.right.shape == found.bound.shape == operand.at(every)
                    assert (found.bound >= 0).all()
            assert values.keys() | expected.keys() == {
                operand.name for operand in record.operands(problem, None) if operand.is_tensor
            }


def _arguments(operands: Sequence[Operand], values: Mapping[str, Any], every: Mapping[str, int]) -> list[Any]:
    given: list[Any] = []
    for operand in operands:
        if not operand.is_tensor:
            given.append(every[operand.name])
        elif operand.role == "output":
            given.append(Out(operand.at(every), operand.dtype))
        elif operand.role == "updated":
            given.append(InOut(values[operand.name]))
        else:
            given.append(values[operand.name].reshape(operand.at(every)))
    return given


@pytest.mark.parametrize(("on", "record", "problem"), in_turns(SAMPLES))
def test_the_kernel_that_ships_is_right(on: str, record: Operator, problem: Problem) -> None:
    """As the model launches it, with [batch, seq] rows, on guarded memory; its weight packed as it wants."""
    here = machine_of(on)
    first = built_in(problem, here)[0]
    layout = realize(first, problem, here).layout if record.name == "matmul" else None
    function = generate(build(problem, here), here)[problem.name]
    rng = np.random.default_rng(1)
    operands = record.launched(problem, layout)
    for point in list(sizes(record, first.sizes))[::3]:
        shape = {"batch": 1, "seq": point["M"]} if "M" in point else {}
        every = {**all_sizes(record, point), **shape}
        values = record.inputs(problem, every, rng, False)
        expected = record.expected(problem, every, values, False)
        if layout is not None:
            values["weight"] = layout.pack(values["weight"])
        results = launch_function(function, problem.name, *_arguments(operands, values, every))
        for operand, result in zip([o for o in operands if o.is_result], results, strict=True):
            found = expected[operand.name]
            right = found.right.reshape(result.shape)
            wrong = ~(np.abs(result - right) <= found.bound.reshape(result.shape)) & ~np.isnan(right)
            assert not wrong.any(), f"{operand.name} at {point}"


@samples
def test_the_definition_passes_the_check(record: Operator, problem: Problem) -> None:
    """The plain loops that schedules transform, through the door: reference, definition and bounds agree."""

    @kernel(record.name, name="as_defined", absorbs=_all_epilogues(record))
    def as_defined(schedule: Any, problem: Any) -> None:
        del schedule, problem

    assert check(realize(as_defined, problem, ANY), ANY).startswith("checked at")
    assert problem_of(record.definition(problem)) == problem


def _all_epilogues(record: Operator) -> tuple[str, ...]:
    return ("bias", "activation", "gate", "residual") if record.name == "matmul" else ()


@some_samples
def test_a_kernel_that_does_nothing_is_refused(record: Operator, problem: Problem) -> None:
    """The check sees what is not written, for each operator and every result."""

    @kernel(record.name, form="python", name="idle", absorbs=_all_epilogues(record))
    def idle(problem: Any, *arrays: Any) -> None:
        del problem, arrays

    with pytest.raises(KernelError, match=r"'idle' is refused for .* at .*(never written|is right)"):
        check(realize(idle, problem, ANY), ANY)


@some_samples
def test_a_result_that_is_off_is_refused(record: Operator, problem: Problem) -> None:
    """One element of each result, wrong by three times its bound and then some, is found."""
    for at, result in enumerate(o for o in record.operands(problem, None) if o.is_result):
        made = realize(_off(record, problem, at), problem, ANY)
        with pytest.raises(
            KernelError, match=rf"is refused .*{'is' if result.name == 'out' else result.name}"
        ):
            check(made, ANY)


def _off(record: Operator, problem: Problem, which: int) -> Any:
    operands = record.operands(problem, None)

    @kernel(record.name, form="python", name="off", absorbs=_all_epilogues(record))
    def off(_: Any, *arrays: Any) -> None:
        values = {o.name: value for o, value in zip(operands, arrays, strict=True)}
        every = _sizes_of(operands, values)
        expected = record.expected(problem, every, values, False)
        for at, result in enumerate(o for o in operands if o.is_result):
            found = expected[result.name]
            right = found.right.copy()
            if at == which:
                place = np.unravel_index(np.nanargmax(np.abs(right)), right.shape)
                right[place] += 3 * found.bound[place] + 1e-3 * abs(right[place]) + 1
            values[result.name][...] = right

    return off


def _sizes_of(operands: Sequence[Operand], values: Mapping[str, Any]) -> dict[str, int]:
    every: dict[str, int] = {}
    for operand in operands:
        if not operand.is_tensor:
            every[operand.name] = values[operand.name]
            continue
        shape = values[operand.name].shape
        every |= {size: n for size, n in zip(operand.shape, shape, strict=True) if isinstance(size, str)}
    return every


def test_a_python_kernel_that_is_right_passes() -> None:
    """The reference itself, through the door."""
    for record, problem in SAMPLES[::4]:
        operands = record.operands(problem, None)

        def right(
            _: Any, *arrays: Any, record: Any = record, problem: Any = problem, operands: Any = operands
        ) -> None:
            values = {o.name: value for o, value in zip(operands, arrays, strict=True)}
            expected = record.expected(problem, _sizes_of(operands, values), values, False)
            for name, found in expected.items():
                values[name][...] = found.right

        made = kernel(record.name, form="python", name="right", absorbs=_all_epilogues(record))(right)
        realized: Realized = realize(made, problem, ANY)
        assert check(realized, ANY).startswith("checked at")


@pytest.mark.parametrize(
    ("record", "mistake"), MISTAKES, ids=[f"{record.name}-{mistake.said}" for record, mistake in MISTAKES]
)
def test_fields_that_make_no_problem_are_refused(record: Operator, mistake: Mistake) -> None:
    with pytest.raises(KernelError, match=mistake.said):
        record.problem(**mistake.fields)
