"""The record of the largest element of a row."""

from collections.abc import Mapping

import numpy as np
from tvm import te, tirx
from tvm.tirx import PrimFunc

from relax_llm.kernels.argmax import Argmax
from relax_llm.kernels.layout import Layout
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

_NAN = 2**31 - 1


def operands(problem: Argmax, layout: Layout | None) -> tuple[Operand, ...]:
    """(x [M, width], out [M, 1] int32)."""
    return Operand("x", ("M", problem.width)), Operand("out", ("M", 1), "int32", "output")


def definition(problem: Argmax) -> PrimFunc:
    """Plain loops: blocks "rank", integers that order as the elements do with NaN above all, "highest" and "first"."""
    rows, width = tirx.Var("M", "int64"), problem.width
    x = te.placeholder((rows, width), name="x")

    def rank(row: tirx.Var, column: tirx.Var) -> tirx.Expr:
        bits = tirx.reinterpret("int32", x[row, column])
        magnitude = tirx.bitwise_and(bits, tirx.const(2**31 - 1, "int32"))
        ordered = tirx.if_then_else(bits >= 0, bits, tirx.const(-(2**31), "int32") - bits)
        return tirx.if_then_else(magnitude > 0x7F800000, tirx.const(_NAN, "int32"), ordered)

    ranks = te.compute((rows, width), rank, name="rank")
    i, j = te.reduce_axis((0, width), name="i"), te.reduce_axis((0, width), name="j")
    highest = te.compute((rows,), lambda r: te.max(ranks[r, i], axis=i), name="highest")

    def first(row: tirx.Var, _: tirx.Var) -> tirx.Expr:
        none = tirx.const(_NAN, "int32")
        found = tirx.if_then_else(ranks[row, j] == highest[row], tirx.Cast("int32", j), none)
        return te.min(found, axis=j)

    out = te.compute((rows, 1), first, name="first")
    return tag(te.create_prim_func([x, out]).with_attr("global_symbol", f"loops_{problem.name}"), problem)


def inputs(problem: Argmax, sizes: Sizes, rng: np.random.Generator, exact: bool) -> dict[str, Array]:
    """Random rows: as they are, with ties, of nothing but -inf or with some, with inf, and with NaN of both signs."""
    x = rng.standard_normal((rows_of(sizes), problem.width), np.float32)
    x[1::6] = np.round(x[1::6])
    x[2::6] = -np.inf
    x[3::6][x[3::6] < 0] = -np.inf
    spoiled = rng.random(x.shape) < 2 / problem.width
    x[4::6][spoiled[4::6]] = np.inf
    x[5::6][spoiled[5::6]] = -np.nan
    x[5::12] = np.abs(x[5::12])  # the sign of NaN too
    return {"x": x}


def expected(problem: Argmax, sizes: Sizes, values: Mapping[str, Array], exact: bool) -> dict[str, Expected]:
    """What NumPy says."""
    right = values["x"].reshape(-1, problem.width).argmax(axis=1, keepdims=True).astype(np.float64)
    return {"out": Expected(right, np.zeros_like(right))}


ARGMAX = Operator(
    Argmax,
    operands,
    definition,
    inputs,
    expected,
    samples=(Argmax(1), Argmax(200)),
    benchmarks=(Argmax(49152), Argmax(128256)),
    mistakes=(Mistake({"width": 0}, "at least 1"),),
    by_rows=True,
)
