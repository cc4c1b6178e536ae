"""The record of logits that may be the largest."""

from collections.abc import Mapping

import numpy as np
from tvm import te, tirx
from tvm.tirx import PrimFunc

from relax_llm.formats import format_named
from relax_llm.kernels.contenders import LEAST, Contenders
from relax_llm.kernels.elements import element
from relax_llm.kernels.layout import Layout
from relax_llm.kernels.operators.matmul import bounded
from relax_llm.kernels.operators.operator import (
    Array,
    Expected,
    Mistake,
    Operand,
    Operator,
    Sizes,
    rows_of,
)
from relax_llm.kernels.problem import tag


def operands(problem: Contenders, layout: Layout | None) -> tuple[Operand, ...]:
    """(x [M, K], estimates [M, N], head, margins [N], out [M, N])."""
    head = problem.head
    return (
        Operand("x", ("M", problem.k)),
        Operand("estimates", ("M", problem.n)),
        Operand("head", head.shape(problem.n, problem.k), head.dtype, "weight"),
        Operand("margins", (problem.n,), role="weight"),
        Operand("out", ("M", problem.n), role="output"),
    )


def definition(problem: Contenders) -> PrimFunc:
    """Plain loops: blocks "squares", "logits", "bar" (no logit below it is the largest) and "contenders"."""
    rows, n, k, head = tirx.Var("M", "int64"), problem.n, problem.k, problem.head
    x = te.placeholder((rows, k), name="x")
    estimates = te.placeholder((rows, n), name="estimates")
    stored = te.placeholder(head.shape(n, k), head.dtype, name="head")
    margins = te.placeholder((n,), name="margins")
    i, j, column = te.reduce_axis((0, k), name="i"), te.reduce_axis((0, k), name="j"), te.reduce_axis((0, n))
    squares = te.compute((rows,), lambda r: te.sum(x[r, i] * x[r, i] + LEAST * LEAST, axis=i), name="squares")
    logits = te.compute(
        (rows, n), lambda r, c: te.sum(x[r, j] * element(head, stored, c, j), axis=j), name="logits"
    )

    def margin(row: tirx.Var, at: tirx.Var) -> tirx.Expr:
        return margins[at] * tirx.sqrt(squares[row])

    bar = te.compute(
        (rows,), lambda r: te.max(estimates[r, column] - margin(r, column), axis=column), name="bar"
    )

    def chosen(row: tirx.Var, at: tirx.Var) -> tirx.Expr:
        below = estimates[row, at] + margin(row, at) < bar[row]
        return tirx.if_then_else(below, estimates[row, at], logits[row, at])

    out = te.compute((rows, n), chosen, name="contenders")
    func = te.create_prim_func([x, estimates, stored, margins, out])
    return tag(func.with_attr("global_symbol", f"loops_{problem.name}"), problem)


def inputs(problem: Contenders, sizes: Sizes, rng: np.random.Generator, exact: bool) -> dict[str, Array]:
    """A head, and estimates within their margins of its logits; in every fifth row one of them is NaN."""
    rows, n, k = rows_of(sizes), problem.n, problem.k
    format = format_named(problem.head.format)
    stored = format.encode(rng.standard_normal((n, k), np.float32))
    x = rng.standard_normal((rows, k), np.float32)
    margins = rng.uniform(0.001, 0.02, n).astype(np.float32)
    room = margins * np.linalg.norm(x, axis=1, keepdims=True)
    estimates = x @ format.decode(stored, k).T + room * rng.uniform(-0.98, 0.98, (rows, n))
    estimates[4::5, -1] = np.nan
    return {
        "x": x,
        "estimates": estimates.astype(np.float32),
        "head": problem.head.pack(stored),
        "margins": margins,
    }


def expected(
    problem: Contenders, sizes: Sizes, values: Mapping[str, Array], exact: bool
) -> dict[str, Expected]:
    """Logits of those that reach the largest one; others' may be estimates."""
    n, k = problem.n, problem.k
    table = format_named(problem.head.format).decode(problem.head.unpack(values["head"], n, k), k)
    x, estimates = (
        values[name].reshape(-1, width).astype(np.float64) for name, width in (("x", k), ("estimates", n))
    )
    right, slack = bounded(problem.product, {"x": x, "weight": table}, exact=False)
    reached = estimates + values["margins"] * np.linalg.norm(x, axis=1, keepdims=True)
    spared = reached < right.max(axis=1, keepdims=True)  # not where an estimate is NaN
    apart = np.abs(np.where(spared, estimates, right) - right)
    return {"out": Expected(right, slack + apart)}


CONTENDERS = Operator(
    Contenders,
    operands,
    definition,
    inputs,
    expected,
    samples=(
        Contenders(1, 1, "tiled32"),
        Contenders(1200, 20, "tiled32_bf16"),
        Contenders(513, 40, "tiled16_f16"),
        Contenders(600, 70, "tiled32_q8", "int16"),
    ),
    benchmarks=(Contenders(49152, 576, "tiled32_bf16"),),
    mistakes=(
        Mistake({"n": 0, "k": 4, "layout": "tiled32"}, "at least 1"),
        Mistake({"n": 4, "k": 4, "layout": "plain"}, "in panels"),
    ),
    by_rows=True,
)
