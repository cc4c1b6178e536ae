"""The record of norms over the hidden axis."""

from collections.abc import Mapping

import numpy as np
from tvm import te, tirx
from tvm.tirx import PrimFunc

from relax_llm.kernels.layout import Layout
from relax_llm.kernels.norm import Norm, norm_reference, normalized
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
from relax_llm.kernels.problem import tag


def operands(problem: Norm, layout: Layout | None) -> tuple[Operand, ...]:
    """(x [M, hidden], weight [hidden], (bias [hidden]), out [M, hidden])."""
    return (
        Operand("x", ("M", problem.hidden)),
        *(Operand(name, (problem.hidden,), role="weight") for name in problem.vectors),
        Operand("out", ("M", problem.hidden), role="output"),
    )


def definition(problem: Norm) -> PrimFunc:
    """Plain loops: blocks "mean" (where centered), "square" and "normalized"."""
    x = te.placeholder((tirx.Var("M", "int64"), problem.hidden), name="x")
    vectors = [te.placeholder((problem.hidden,), name=name) for name in problem.vectors]
    out = normalized(problem, x, *vectors)
    func = te.create_prim_func([x, *vectors, out]).with_attr("global_symbol", f"loops_{problem.name}")
    return tag(func, problem)


def inputs(problem: Norm, sizes: Sizes, rng: np.random.Generator, exact: bool) -> dict[str, Array]:
    """Rows of different scales, some far from zero mean."""
    rows = rows_of(sizes)
    scale = np.float32(2.0) ** rng.integers(-6, 7, (rows, 1)).astype(np.float32)
    made = {
        "x": rng.standard_normal((rows, problem.hidden), np.float32) * scale,
        "weight": rng.standard_normal(problem.hidden, np.float32),
    }
    if problem.bias:
        made["bias"] = rng.standard_normal(problem.hidden, np.float32)
    return made


def expected(problem: Norm, sizes: Sizes, values: Mapping[str, Array], exact: bool) -> dict[str, Expected]:
    """The norm in float64.

    The mean is missed by at most g u of the row's mean magnitude, the variance relatively by g u and by twice what the
    mean is missed by, against the standard deviation; their root halves that, and some roundings follow.
    """
    x = values["x"].astype(np.float64).reshape(rows_of(sizes), problem.hidden)
    vectors = [values[name].astype(np.float64) for name in problem.vectors]
    weight = vectors[0]
    right = norm_reference(problem, x, weight)
    missed = np.zeros((len(x), 1))
    if problem.centered:
        missed = summed(problem.hidden) * UNIT * np.abs(x).mean(axis=1, keepdims=True)
        magnitude = np.abs(x) + np.abs(x.mean(axis=1, keepdims=True))
        x = x - x.mean(axis=1, keepdims=True)
    else:
        magnitude = np.abs(x)
    deviation = np.sqrt((x * x).mean(axis=1, keepdims=True) + problem.eps)
    relative = summed(problem.hidden) * UNIT + missed / deviation
    bound = np.abs(right) * (relative + 8 * UNIT) + (missed + UNIT * magnitude) / deviation * np.abs(weight)
    if problem.bias:
        right = right + vectors[1]
        bound = bound + UNIT * (np.abs(right) + np.abs(vectors[1]))
    return {"out": Expected(right, bound)}


NORM = Operator(
    Norm,
    operands,
    definition,
    inputs,
    expected,
    samples=(
        Norm(1, 1e-5),
        Norm(17, 1e-6),
        Norm(576, 1e-5),
        Norm(33, 1e-5, centered=True),
        Norm(64, 1e-12, centered=True, bias=True),
        Norm(15, 1e-5, bias=True),
    ),
    benchmarks=(
        Norm(576, 1e-5),
        Norm(2048, 1e-5),
        Norm(4096, 1e-5),
        Norm(768, 1e-5, centered=True, bias=True),
    ),
    mistakes=(
        Mistake({"hidden": 0, "eps": 1e-5}, "at least 1"),
        Mistake({"hidden": 4, "eps": -1.0}, "negative"),
    ),
    by_rows=True,
)
