"""The record of matrix products."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm.formats import FORMATS, Blocks, Format
from relax_llm.formats.activations import GROUP, ROUNDINGS
from relax_llm.formats.blocks import Parts
from relax_llm.kernels.layout import Layout, Plain
from relax_llm.kernels.matmul.problem import Matmul, arguments, definition, norm_arguments, reference
from relax_llm.kernels.norm import Norm
from relax_llm.kernels.operators.norm import NORM
from relax_llm.kernels.operators.operator import (
    UNIT,
    Array,
    Expected,
    Mistake,
    Operand,
    Operator,
    Sizes,
    rows_of,
    summed,
)

_LARGEST = 7  # Integers of the exact run, in magnitude.
_AT_ONCE = 2**23  # Elements of a float64 copy of the weight.
# Steepest slope of each activation: an error of d before it is at most this times d behind it.
_SLOPE = {"silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13, "relu": 1.0}


def operands(problem: Matmul, layout: Layout | None) -> tuple[Operand, ...]:
    """(x [M, K], weight, (bias [N]), (residual [M, outputs]), (norm_weight [K]), (norm_bias [K]), out [M, outputs])."""
    layout = layout or Plain(problem.weight_format)
    known = {
        "x": Operand("x", ("M", problem.k)),
        "weight": Operand("weight", layout.shape(problem.n, problem.k), layout.dtype, "weight"),
        "bias": Operand("bias", (problem.n,), role="weight"),
        "residual": Operand("residual", ("M", problem.outputs)),
        **{name: Operand(name, (problem.k,), role="weight") for name in norm_arguments(problem)},
        "out": Operand("out", ("M", problem.outputs), role="output"),
    }
    return tuple(known[name] for name in arguments(problem))


def inputs(problem: Matmul, sizes: Sizes, rng: np.random.Generator, exact: bool) -> dict[str, Array]:
    """x, the weight as encoded, bias and residual: normal numbers, or integers whose sums are exact."""
    return (_integers if exact else _reals)(problem, rows_of(sizes), rng)


def _shapes(problem: Matmul, rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    shapes = {
        "x": (rows, problem.k),
        "weight": (problem.n, problem.k),
        "bias": (problem.n,),
        "residual": (rows, problem.outputs),
        **dict.fromkeys(norm_arguments(problem), (problem.k,)),
    }
    return ((name, shapes[name]) for name in arguments(problem) if name != "out")


def _reals(problem: Matmul, rows: int, rng: np.random.Generator) -> dict[str, Array]:
    """Normal numbers; the weight scaled so that products are of order 1, where activations bend."""
    made = {name: rng.standard_normal(shape, np.float32) for name, shape in _shapes(problem, rows)}
    made["weight"] *= np.float32(1 / math.sqrt(problem.k))
    made["weight"] = FORMATS[problem.weight_format].encode(made["weight"])
    return made


def _integers(problem: Matmul, rows: int, rng: np.random.Generator) -> dict[str, Array]:
    """Integers other than 0, the weight, bias and residual times a power of two: every sum of them is exact.

    No sum reaches 2**24: products stay below 2**23, and bias and residual below 2**22 each. Where activations may be
    rounded, each group has a 127, so that they are integers then, too. Behind a norm nothing is exact.
    """
    largest = min(_LARGEST, math.isqrt(2**23 // problem.k))
    typical = largest * (largest + 1) / 3 * math.sqrt(problem.k)
    shift = min(22, max(0, round(math.log2(typical))))

    def draw(shape: tuple[int, ...], limit: int) -> Array:
        magnitude: Array = rng.integers(1, limit + 1, shape, np.int32).astype(np.float32)
        return np.where(rng.integers(0, 2, shape, np.int8), magnitude, -magnitude)

    limits = {"x": largest, "weight": largest, "bias": 2**shift, "residual": 2**shift}
    limits |= dict.fromkeys(norm_arguments(problem), 2**shift)
    made = {name: draw(shape, limits[name]) for name, shape in _shapes(problem, rows)}
    if problem.activations in ROUNDINGS:
        made["x"][:, ::GROUP] = np.copysign(127, made["x"][:, ::GROUP])
    for name in made.keys() - {"x"}:
        made[name] *= np.float32(2.0**-shift)
    made["weight"] = _encoded_exactly(FORMATS[problem.weight_format], made["weight"], np.float16(2.0**-shift))
    return made


def _encoded_exactly(format: Format, weight: Array, unit: np.float16) -> Array:
    """A matrix of multiples of `unit`, none larger than `_LARGEST`, as a format encodes it when it loses nothing."""
    if not isinstance(format, Blocks):
        return format.encode(weight)
    n, k = weight.shape
    groups = format.groups(k)
    padded = np.zeros((n, groups * format.group), np.float32)
    padded[:, :k] = weight
    lowest = -(np.arange(n * groups) % 2 + _LARGEST).reshape(
        n, groups, 1
    )  # minimums that are not all the same
    whole = (padded / np.float32(unit)).astype(np.int32).reshape(n, groups, format.group)
    codes = (whole - lowest if format.minimum else whole + format.zero).astype(np.uint8)
    minimums = lowest[..., 0].astype(np.float16) * unit if format.minimum else None
    return format.join(Parts(codes, np.full((n, groups), unit), minimums))


def expected(problem: Matmul, sizes: Sizes, values: Mapping[str, Array], exact: bool) -> dict[str, Expected]:
    """The right result and its bound, some columns at a time, so that a float64 copy of the weight stays small.

    A product behind a norm is one of what the norm should give, which is missed by as much as a norm may miss it.
    """
    rows = rows_of(sizes)
    values = {
        name: array.reshape(rows, -1) if name in ("x", "residual") else array
        for name, array in values.items()
    }
    values["weight"] = FORMATS[problem.weight_format].decode(values["weight"], problem.k)
    if problem.norm is not None:
        x = {name.removeprefix("norm_"): values.pop(name) for name in ("x", *norm_arguments(problem))}
        normed = NORM.expected(problem.norm, sizes, x, False)["out"]
        values |= {"x": normed.right, "missed": normed.bound}
        problem, exact = replace(problem, norm=None), False
    right, bound = np.empty((rows, problem.outputs)), np.empty((rows, problem.outputs))
    step = max(1, _AT_ONCE // problem.k)
    for start in range(0, problem.outputs, step):
        columns = slice(start, min(start + step, problem.outputs))
        right[:, columns], bound[:, columns] = bounded(*_columns(problem, values, columns), exact=exact)
    return {"out": Expected(right, bound)}


def bounded(problem: Matmul, values: Mapping[str, Array], *, exact: bool) -> tuple[Array, Array]:
    """The right result in float64, and how far from it an honest kernel may be, for each element.

    Write u for the unit roundoff and S for the sum of |x| |w| over the reduction, plus |bias|; the product is within
    g u S, with g from `summed`. Where `exact`, inputs are small integers and g = 0.

    Behind the sum, an activation multiplies the error by at most its steepest slope and adds one of its own: 16 u
    max(1, |x|), three times what was measured for the worst of the built-in ones. A product of two inexact factors has
    the error |a| d(b) + |b| d(a) + d(a) d(b) and a rounding. A residual may be where the sum starts from or be added
    last: g + 2 roundings of its size, and one of the result's.

    Where the problem allows activations to be rounded, each may be off by half a step, which in integers is one of its
    group's.

    Args:
        problem: What to compute.
        values: "x" [M, K], "weight" [N, K], and where the problem has them "bias" [N] and "residual" [M, outputs];
            "missed" [M, K], where a kernel's x may be that far off.
        exact: Whether sums of the inputs are exact in float32.

    Returns:
        The result and the bound, each float64 [M, outputs].
    """
    u = UNIT
    roundings = 0.0 if exact else summed(problem.k)
    linear = replace(problem, activation=None, gated=False, residual=False)
    outer = {name: array for name, array in values.items() if name != "residual"}
    right = reference(problem, values)
    plain = not (problem.activation or problem.gated)
    total = right if plain and not problem.residual else reference(linear, outer)
    if exact:
        error = np.zeros_like(total)
    else:
        error = roundings * u * reference(linear, {name: np.abs(array) for name, array in outer.items()})
    if not exact and (problem.activations or "missed" in values):
        missed = np.asarray(values.get("missed", 0.0))
        if problem.activations:
            missed = missed + 1.001 * _half_steps(problem, np.abs(values["x"]) + missed)
        error = error + missed @ np.abs(values["weight"].astype(np.float64)).T
    half = problem.outputs
    value, bound = total[:, :half], error[:, :half]
    if problem.activation:
        own = 0.0 if problem.activation == "relu" else 16.0 * u * np.maximum(1.0, np.abs(value))
        bound = _SLOPE[problem.activation] * bound + own
    if problem.gated:
        gate = {name: array[:half] if name in ("weight", "bias") else array for name, array in outer.items()}
        value = reference(replace(problem, n=half, gated=False, residual=False), gate)
        other, its = total[:, half:], error[:, half:]
        bound = np.abs(value) * its + np.abs(other) * bound + its * bound + u * np.abs(value * other)
    if problem.residual:
        bound = bound + u * ((roundings + 2.0) * np.abs(values["residual"]) + np.abs(right))
    return right, bound


def _half_steps(problem: Matmul, x: Array) -> Array:
    """How far a rounded activation may be from each element [M, K]."""
    if problem.activations == "bf16":
        return np.abs(x.astype(np.float64)) * 2.0**-8 + 2.0**-126  # half a step of the largest of a binade
    return _largest_of_groups(x) / (2 * ROUNDINGS[problem.activations or ""].least)


def _largest_of_groups(x: Array) -> Array:
    """For each element [M, K] the largest magnitude of its group of 32 along K, in float64."""
    rows, k = x.shape
    padded = np.zeros((rows, -(-k // GROUP) * GROUP))
    padded[:, :k] = np.abs(x)
    largest = padded.reshape(rows, -1, GROUP).max(axis=2)
    spread: Array = np.repeat(largest, GROUP, axis=1)[:, :k]
    return spread


def _columns(problem: Matmul, values: Mapping[str, Array], columns: slice) -> tuple[Matmul, dict[str, Array]]:
    """The problem of some outputs alone."""
    chosen: npt.NDArray[np.intp] = np.arange(columns.start, columns.stop)
    rows = np.concatenate([chosen, chosen + problem.outputs]) if problem.gated else chosen
    part: dict[str, Any] = {
        name: array[rows] if name in ("weight", "bias") else array for name, array in values.items()
    }
    if problem.residual:
        part["residual"] = values["residual"][:, columns]
    return replace(problem, n=len(rows)), part


def _flat(problem: Matmul) -> Any:
    return definition(problem, flat=True)


MATMUL = Operator(
    Matmul,
    operands,
    _flat,
    inputs,
    expected,
    samples=(
        Matmul(1, 1),
        Matmul(48, 64),
        Matmul(21, 19, bias=True),
        Matmul(40, 33, bias=True, activation="gelu", residual=True),
        Matmul(33, 40, activation="relu"),
        Matmul(64, 17, activation="silu", gated=True),
        Matmul(150, 77, bias=True, activation="gelu_tanh", gated=True, residual=True),
        Matmul(16, 2000, residual=True),
        Matmul(48, 64, "bf16"),
        Matmul(70, 33, "bf16", activation="silu", gated=True),
        Matmul(21, 19, "bf16", bias=True, residual=True),
        Matmul(48, 64, "bf16", activations="bf16"),
        Matmul(70, 33, "bf16", activation="silu", gated=True, activations="bf16"),
        Matmul(21, 1301, "bf16", bias=True, residual=True, activations="bf16"),
        Matmul(40, 35, "f16", residual=True),
        Matmul(48, 64, "q8"),
        Matmul(70, 33, "q8", activation="silu", gated=True),
        Matmul(48, 96, "q4", bias=True),
        Matmul(70, 65, "q4", activation="silu", gated=True),
        Matmul(21, 19, "q4s", bias=True, residual=True),
        Matmul(40, 70, "q8", activations="int8"),
        Matmul(38, 65, "q4", activation="silu", gated=True, activations="int7"),
        Matmul(33, 40, "q4s", residual=True, activations="int7"),
        Matmul(33, 40, "q4s", bias=True, activations="int8"),
        Matmul(33, 40, "q6", bias=True, activations="int16"),
        Matmul(33, 40, "bf16", activations="bf16", norm=Norm(40, 1e-5)),
        Matmul(38, 64, "q8", activation="silu", gated=True, activations="int8", norm=Norm(64, 1e-5)),
        Matmul(33, 65, "q4", bias=True, activations="int7", norm=Norm(65, 1e-6, centered=True, bias=True)),
    ),
    benchmarks=(
        *(Matmul(n, k) for n, k in ((960, 576), (576, 576), (576, 1536), (49152, 576))),
        Matmul(3072, 576, activation="silu", gated=True),
        *(Matmul(n, k) for n, k in ((3072, 2048), (2048, 2048), (2048, 8192))),
        Matmul(16384, 2048, activation="silu", gated=True),
        *(Matmul(n, k) for n, k in ((6144, 4096), (4096, 4096), (4096, 14336))),
        Matmul(28672, 4096, activation="silu", gated=True),
        Matmul(3072, 768),
    ),
    mistakes=(
        Mistake({"n": 0, "k": 4}, "at least 1"),
        Mistake({"n": 4, "k": -1}, "at least 1"),
        Mistake({"n": 4, "k": 4, "weight_format": "q3"}, "q3"),
        Mistake({"n": 5, "k": 4, "gated": True}, "even"),
        Mistake({"n": 4, "k": 4, "activation": "sinc"}, "sinc"),
        Mistake({"n": 4, "k": 4, "activations": "int4"}, "int4"),
        Mistake({"n": 4, "k": 4, "norm": Norm(5, 1e-5)}, "does not fit"),
    ),
    by_rows=True,
    exact=True,
)
