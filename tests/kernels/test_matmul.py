"""Matrix products with every epilogue, at the edges of the register tile and of the panels."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from relax_llm.kernels.matmul import Matmul, definition
from relax_llm.kernels.matmul.tiled import layout_for, tile_for

from ..machines import PLAINER
from ..tolerances import ACTIVATION, ROUNDINGS, SLOPE, UNIT, assert_within, reduction
from .bench import HOST, generate, launch, launch_function, machine_of, machines, needs, random
from .guarded import Out

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Array = npt.NDArray[Any]

_erf = np.vectorize(math.erf)


def _sigmoid(x: Array) -> Array:
    result: Array = 0.5 * (1.0 + np.tanh(0.5 * x))
    return result


REFERENCES: dict[str | None, Callable[[Array], Array]] = {
    None: lambda x: x,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0.0),
}


def _reference(
    problem: Matmul, x: Array, weight: Array, bias: Array | None, residual: Array | None
) -> tuple[Array, Array]:
    """The product in float64, and how far each of its elements may be missed."""
    unit = UNIT["float32"]
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    value, scale = x @ weight.T, np.abs(x) @ np.abs(weight).T
    if bias is not None:
        value, scale = value + bias, scale + np.abs(bias)
    error = scale * reduction("float32", problem.k)
    half = problem.outputs
    out, allowed = value[..., :half], error[..., :half]
    if problem.activation:
        allowed = SLOPE * allowed + ACTIVATION * np.maximum(1.0, np.abs(out))
        out = REFERENCES[problem.activation](out)
    if problem.gated:
        up, up_error = value[..., half:], error[..., half:]
        allowed = allowed * np.abs(up) + np.abs(out) * up_error + allowed * up_error
        out = out * up
    if residual is not None:
        out = out + residual
        allowed = allowed + ROUNDINGS * unit * (np.abs(out) + np.abs(residual))
    return out, allowed + unit * np.abs(out)


def _operands(problem: Matmul, batch: int, seq: int) -> tuple[Array, Array, Array | None, Array | None]:
    x = random(batch, seq, problem.k)
    weight = random(problem.n, problem.k, seed=1) / np.float32(math.sqrt(problem.k))
    bias = random(problem.n, seed=2) if problem.bias else None
    residual = random(batch, seq, problem.outputs, seed=3) if problem.residual else None
    return x, weight, bias, residual


def _check(problem: Matmul, on: str, batch: int, seq: int) -> None:
    x, weight, bias, residual = _operands(problem, batch, seq)
    packed = layout_for(problem, machine_of(on)).pack(weight)
    optional = [value for value in (bias, residual) if value is not None]
    (out,) = launch(problem, on, x, packed, *optional, Out((batch, seq, problem.outputs)))
    reference, allowed = _reference(problem, x, weight, bias, residual)
    assert_within(out, reference, allowed, f"{problem.name} for batch {batch}, seq {seq}")


def _sizes(on: str) -> list[tuple[int, int]]:
    rows = tile_for(machine_of(on)).rows
    edges = {1, rows - 1, rows, rows + 1, 2 * rows - 1, 2 * rows, 2 * rows + 1, 300} - {0}
    return [(1, seq) for seq in sorted(edges)] + [(3, 1), (3, rows + 1), (3, 7)]


def _panel(on: str) -> int:
    return tile_for(machine_of(on)).cols


@machines
@pytest.mark.parametrize(
    ("n", "k"),  # K at every remainder of the unrolled steps, with panels that are full, cut and alone
    [
        ("1", 34),
        ("panel - 1", 131),
        ("panel", 1),
        ("panel + 1", 128),
        ("2 * panel - 1", 33),
        ("2 * panel + 1", 3),
    ],
)
def test_sizes(on: str, n: str, k: int) -> None:
    problem = Matmul(eval(n, {"panel": _panel(on)}), k)
    for batch, seq in _sizes(on):
        _check(problem, on, batch, seq)


PLAIN = Matmul(2, 33)
EPILOGUES = [
    replace(PLAIN, bias=True),
    replace(PLAIN, residual=True),
    replace(PLAIN, bias=True, residual=True),
    *(replace(PLAIN, activation=name) for name in REFERENCES if name),
    *(replace(PLAIN, bias=True, activation=name, residual=True) for name in REFERENCES if name),
]
GATED = [
    replace(PLAIN, gated=True, activation="silu"),
    replace(PLAIN, gated=True, activation="gelu_tanh", bias=True),
    replace(PLAIN, gated=True, activation="relu", residual=True),
    replace(PLAIN, gated=True, activation="gelu", bias=True, residual=True),
]


def _epilogues(on: str) -> list[Matmul]:
    """All, but for AVX-512, which takes long to compile, those that have everything beside the activation."""
    if on == HOST and PLAINER:
        return [problem for problem in EPILOGUES if problem.bias and problem.residual]
    return EPILOGUES


@pytest.mark.parametrize(
    ("on", "epilogue"),
    [
        pytest.param(on, problem, marks=needs(on), id=f"{on}-{problem.name.removeprefix('matmul_n2_k33_')}")
        for on in (HOST, "x86-64-v3", "x86-64")
        for problem in _epilogues(on)
    ],
)
def test_epilogues(on: str, epilogue: Matmul) -> None:
    problem = replace(epilogue, n=_panel(on) + 5)
    for batch, seq in _sizes(on):
        _check(problem, on, batch, seq)


@machines
@pytest.mark.parametrize(
    ("gated", "half"),
    [
        *((GATED[0], half) for half in ("1", "panel // 2", "panel + 3")),
        (GATED[1], "panel // 2 - 1"),
        (GATED[2], "panel // 2 + 1"),
        (GATED[3], "panel + 3"),
    ],
    ids=lambda value: value.name.removeprefix("matmul_n2_k33_") if isinstance(value, Matmul) else value,
)
def test_gated(on: str, gated: Matmul, half: str) -> None:
    problem = replace(gated, n=2 * eval(half, {"panel": _panel(on)}))
    for batch, seq in _sizes(on):
        _check(problem, on, batch, seq)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), [(2, 500), (15, 31), (63, 2), (101, 650)])
def test_more_sizes(n: int, k: int) -> None:
    problem = Matmul(n, k, bias=True, residual=True)
    for batch, seq in [*_sizes(HOST), *((1, seq) for seq in range(2, 45)), (2, 129), (64, 1)]:
        _check(problem, HOST, batch, seq)


@machines
def test_large_activations_saturate(on: str) -> None:
    """Sums far outside the range of exp go through the epilogue without infinities or NaN."""
    problem = Matmul(2 * _panel(on), 1, activation="silu", gated=True)
    x = np.array([1e4, -1e4, 88.0, -88.0, 89.0, 1e-40, 0.0, -1e30], np.float32).reshape(1, 8, 1)
    weight = np.ones((problem.n, 1), np.float32)
    weight[problem.outputs :] = 1e-5
    packed = layout_for(problem, machine_of(on)).pack(weight)
    (out,) = launch(problem, on, x, packed, Out((1, 8, problem.outputs)))
    reference, allowed = _reference(problem, x, weight, None, None)
    assert_within(out, reference, allowed, problem.name)


@machines
def test_one_bad_row_stays_alone(on: str) -> None:
    """A NaN or an infinity in one row of x reaches that row of the result, and no other."""
    problem = Matmul(_panel(on) + 1, 17, activation="silu", residual=True)
    rows = 2 * tile_for(machine_of(on)).rows + 1
    x, weight, _, residual = _operands(problem, 1, rows)
    assert residual is not None
    x[0, 1, 3], x[0, rows - 1, 0] = np.nan, np.inf
    packed = layout_for(problem, machine_of(on)).pack(weight)
    (out,) = launch(problem, on, x, packed, residual, Out((1, rows, problem.outputs)))
    bad = [1, rows - 1]
    assert np.isnan(out[0, 1]).all()
    assert not np.isfinite(out[0, rows - 1]).all()
    good = [row for row in range(rows) if row not in bad]
    reference, allowed = _reference(problem, x[:, good], weight, None, residual[:, good])
    assert_within(out[:, good], reference, allowed, problem.name)


@machines
def test_a_row_does_not_depend_on_the_rows_beside_it(on: str) -> None:
    """Bitwise: rows are never padded or combined, whatever tile they fall into."""
    problem = Matmul(_panel(on) + 1, 65, bias=True)
    x, weight, bias, _ = _operands(problem, 1, 40)
    assert bias is not None
    packed = layout_for(problem, machine_of(on)).pack(weight)
    (whole,) = launch(problem, on, x, packed, bias, Out((1, 40, problem.n)))
    for start, end in [(0, 1), (3, 17), (39, 40), (1, 40)]:
        part = np.ascontiguousarray(x[:, start:end])
        (out,) = launch(problem, on, part, packed, bias, Out((1, end - start, problem.n)))
        np.testing.assert_array_equal(out, whole[:, start:end])


@cache
def _definition(problem: Matmul) -> Callable[..., None]:
    func = definition(problem)
    function: Callable[..., None] = generate(func, machine_of(HOST))[str(func.attrs["global_symbol"])]
    return function


@pytest.mark.parametrize(
    "problem", [PLAIN, *EPILOGUES, *GATED], ids=lambda p: p.name.removeprefix("matmul_n2_k33")
)
def test_the_definition_says_the_same(problem: Matmul) -> None:
    """`default` is what a user's kernel is measured by: it must compute what the problem's fields say."""
    problem = replace(problem, n=14)
    x, weight, bias, residual = _operands(problem, 3, 5)
    optional = [value for value in (bias, residual) if value is not None]
    arguments: list[Array | Out] = [x, weight, *optional, Out((3, 5, problem.outputs))]
    (out,) = launch_function(_definition(problem), problem.name, *arguments)
    reference, allowed = _reference(problem, x, weight, bias, residual)
    assert_within(out, reference, allowed, problem.name)
