"""The records of what depends on positions alone."""

from collections.abc import Mapping

import numpy as np
from tvm import te, tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from relax_llm.kernels.layout import Layout
from relax_llm.kernels.operators.operator import UNIT, Array, Expected, Mistake, Operand, Operator, Sizes
from relax_llm.kernels.positions import Positions, RopeTable
from relax_llm.kernels.problem import tag

_TABLE = (
    3e-7  # Absolute error of a cosine or sine of an exact angle: libm's float32 functions, and one product.
)


def positions_operands(problem: Positions, layout: Layout | None) -> tuple[Operand, ...]:
    """(kv_len, out [1, seq] int32)."""
    return Operand("kv_len", (), "int64", "size"), Operand("out", (1, "seq"), "int32", "output")


def positions_definition(problem: Positions) -> PrimFunc:
    """Plain loops: block "positions"."""
    seq, kv_len = tirx.Var("seq", "int64"), tirx.Var("kv_len", "int64")
    out = te.compute((1, seq), lambda _, i: tirx.Cast("int32", kv_len - seq + i), name="positions")
    func = te.create_prim_func([kv_len, out]).with_attr("global_symbol", f"loops_{problem.name}")
    return tag(func, problem)


def _nothing(
    problem: Positions | RopeTable, sizes: Sizes, rng: np.random.Generator, exact: bool
) -> dict[str, Array]:
    return {}


def positions_expected(
    problem: Positions, sizes: Sizes, values: Mapping[str, Array], exact: bool
) -> dict[str, Expected]:
    """The last seq numbers below kv_len."""
    right = np.arange(sizes["kv_len"] - sizes["seq"], sizes["kv_len"], dtype=np.float64)[None]
    return {"out": Expected(right, np.zeros_like(right))}


POSITIONS = Operator(
    Positions,
    positions_operands,
    positions_definition,
    _nothing,
    positions_expected,
    samples=(Positions(),),
    benchmarks=(Positions(),),
    mistakes=(),
)


def table_operands(problem: RopeTable, layout: Layout | None) -> tuple[Operand, ...]:
    """(kv_len, out [seq, 2, head_dim / 2])."""
    half = len(problem.inverse_frequencies)
    return Operand("kv_len", (), "int64", "size"), Operand("out", ("seq", 2, half), role="output")


def table_definition(problem: RopeTable) -> PrimFunc:
    """Plain loops: blocks "frequencies" and "table"."""
    seq, kv_len = tirx.Var("seq", "int64"), tirx.Var("kv_len", "int64")
    half = len(problem.inverse_frequencies)

    def frequency(j: tirx.Var) -> tirx.Expr:
        chosen: tirx.Expr = tirx.const(problem.inverse_frequencies[-1], "float32")
        for index in reversed(range(half - 1)):
            constant = tirx.const(problem.inverse_frequencies[index], "float32")
            chosen = tirx.Select(j == index, constant, chosen)
        if problem.dynamic is None:
            return chosen
        theta, factor, original = problem.dynamic
        dim = 2.0 * half
        grown = tirx.const(factor / original, "float64") * tirx.Cast("float64", kv_len) - tirx.const(
            factor - 1.0, "float64"
        )
        base = tirx.const(theta, "float64") * T.pow(grown, tirx.const(dim / (dim - 2.0), "float64"))
        power = tirx.const(-2.0 / dim, "float64") * tirx.Cast("float64", j)
        return tirx.if_then_else(kv_len > original, tirx.Cast("float32", T.pow(base, power)), chosen)

    frequencies = te.compute((half,), frequency, name="frequencies")

    def rotation(i: tirx.Var, which: tirx.Var, j: tirx.Var) -> tirx.Expr:
        angle = tirx.Cast("float32", kv_len - seq + i) * frequencies[j]
        return tirx.if_then_else(which == 0, tirx.cos(angle), tirx.sin(angle)) * tirx.const(
            problem.magnitude, "float32"
        )

    out = te.compute((seq, 2, half), rotation, name="table")
    func = te.create_prim_func([kv_len, out]).with_attr("global_symbol", f"loops_{problem.name}")
    return tag(func, problem)


def table_expected(
    problem: RopeTable, sizes: Sizes, values: Mapping[str, Array], exact: bool
) -> dict[str, Expected]:
    """Cosines and sines in float64; an angle is rounded to float32, as in every implementation."""
    half, kv_len = len(problem.inverse_frequencies), sizes["kv_len"]
    frequencies, extra = np.array(problem.inverse_frequencies), 0.0
    if problem.dynamic and kv_len > problem.dynamic[2]:
        theta, factor, original = problem.dynamic
        base = theta * (factor * kv_len / original - (factor - 1.0)) ** (2 * half / (2 * half - 2))
        frequencies, extra = base ** (-np.arange(half) / half), UNIT
    angles = np.arange(kv_len - sizes["seq"], kv_len)[:, None] * frequencies
    right = problem.magnitude * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    bound = abs(problem.magnitude) * (_TABLE + np.abs(angles) * (2 * UNIT + extra))[:, None]
    return {"out": Expected(right, np.broadcast_to(bound, right.shape))}


def _frequencies(half: int, theta: float = 10000.0) -> tuple[float, ...]:
    return tuple(float(np.float32(theta ** (-i / half))) for i in range(half))


ROPE_TABLE = Operator(
    RopeTable,
    table_operands,
    table_definition,
    _nothing,
    table_expected,
    samples=(
        RopeTable(_frequencies(1)),
        RopeTable(_frequencies(20), 0.7),
        RopeTable(_frequencies(32), 1.0, (3000.0, 4.0, 81)),
    ),
    benchmarks=(RopeTable(_frequencies(32)), RopeTable(_frequencies(64))),
    mistakes=(
        Mistake({"inverse_frequencies": ()}, "at least one"),
        Mistake({"inverse_frequencies": (1.0,), "dynamic": (1e4, 2.0, 64)}, "at least two"),
    ),
)
