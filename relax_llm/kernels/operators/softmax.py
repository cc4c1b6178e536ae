"""The record of probabilities."""

from collections.abc import Mapping

import numpy as np
from tvm import te, tirx
from tvm.tirx import PrimFunc

from relax_llm.kernels.layout import Layout
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
from relax_llm.kernels.softmax import Softmax

_VANISHED = 1e-37  # What a power may be that is as good as 0.


def operands(problem: Softmax, layout: Layout | None) -> tuple[Operand, ...]:
    """(x [M, width], (temperature [M]), out [M, width])."""
    tempered = (Operand("temperature", ("M",)),) if problem.tempered else ()
    return (
        Operand("x", ("M", problem.width)),
        *tempered,
        Operand("out", ("M", problem.width), role="output"),
    )


def definition(problem: Softmax) -> PrimFunc:
    """Plain loops: blocks "largest", "raised", "total" and "probability"."""
    rows, width = tirx.Var("M", "int64"), problem.width
    x = te.placeholder((rows, width), name="x")
    temperature = te.placeholder((rows,), name="temperature")
    i, j = te.reduce_axis((0, width), name="i"), te.reduce_axis((0, width), name="j")
    largest = te.compute((rows,), lambda r: te.max(x[r, i], axis=i), name="largest")

    def power(r: tirx.Var, c: tirx.Var) -> tirx.Expr:
        below = x[r, c] - largest[r]
        return tirx.exp(below / temperature[r] if problem.tempered else below)

    raised = te.compute((rows, width), power, name="raised")
    total = te.compute((rows,), lambda r: te.sum(raised[r, j], axis=j), name="total")
    out = te.compute((rows, width), lambda r, c: raised[r, c] / total[r], name="probability")
    func = te.create_prim_func([x, temperature, out] if problem.tempered else [x, out])
    return tag(func.with_attr("global_symbol", f"loops_{problem.name}"), problem)


def inputs(problem: Softmax, sizes: Sizes, rng: np.random.Generator, exact: bool) -> dict[str, Array]:
    """Rows of different spread, some far from 0, and some with elements that are ruled out."""
    rows = rows_of(sizes)
    spread = np.float32(2.0) ** rng.integers(-3, 7, (rows, 1)).astype(np.float32)
    x = rng.standard_normal((rows, problem.width), np.float32) * spread
    x[1::3] += rng.integers(-2000, 2000, (len(x[1::3]), 1)).astype(np.float32)
    ruled_out = rng.random(x.shape) < 0.3
    ruled_out[np.arange(rows), rng.integers(0, problem.width, rows)] = False
    x[2::3][ruled_out[2::3]] = -np.inf
    made = {"x": x}
    if problem.tempered:
        made["temperature"] = rng.uniform(0.2, 2.0, rows).astype(np.float32)
    return made


def expected(problem: Softmax, sizes: Sizes, values: Mapping[str, Array], exact: bool) -> dict[str, Expected]:
    """Softmax in float64.

    A power is missed by some roundings of what is subtracted and divided, so its exponential relatively by as much,
    and by the exponential's own error; the sum by what its terms are on average, and by its own roundings.
    """
    x = values["x"].astype(np.float64).reshape(-1, problem.width)
    temperature = np.ones(len(x))
    if problem.tempered:
        temperature = values["temperature"].astype(np.float64).reshape(-1)
    largest = x.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        raised = np.exp((x - largest) / temperature[:, None])
        right = raised / raised.sum(axis=1, keepdims=True)
        sizes_of_terms = np.where(np.isfinite(x), np.abs(x) + np.abs(largest), 0.0) / temperature[:, None]
    relative = np.expm1(4 * UNIT * sizes_of_terms) + 8 * UNIT
    average = (right * relative).sum(axis=1, keepdims=True)
    bound = right * (relative + average + summed(problem.width) * UNIT) + _VANISHED
    return {"out": Expected(right, bound)}


SOFTMAX = Operator(
    Softmax,
    operands,
    definition,
    inputs,
    expected,
    samples=(Softmax(8), Softmax(200, tempered=True)),
    benchmarks=(Softmax(64), Softmax(49152, tempered=True), Softmax(128256, tempered=True)),
    mistakes=(Mistake({"width": 0}, "at least 1"),),
    by_rows=True,
)
