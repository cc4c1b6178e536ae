"""The records of what picks rows by index."""

from collections.abc import Mapping

import numpy as np
from tvm import te, tirx
from tvm.tirx import PrimFunc

from relax_llm.formats import format_named
from relax_llm.kernels.elements import element
from relax_llm.kernels.layout import Layout, Plain, parse
from relax_llm.kernels.lookup import Embedding, LastToken
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


def embedding_operands(problem: Embedding, layout: Layout | None) -> tuple[Operand, ...]:
    """(ids [M] int32, table, out [M, hidden])."""
    stored = parse(problem.layout or "plain")
    return (
        Operand("ids", ("M",), "int32"),
        Operand("table", stored.shape(problem.rows, problem.hidden), stored.dtype, "weight"),
        Operand("out", ("M", problem.hidden), role="output"),
    )


def embedding_definition(problem: Embedding) -> PrimFunc:
    """Plain loops: block "picked"."""
    rows = tirx.Var("M", "int64")
    ids = te.placeholder((rows,), "int32", name="ids")
    layout = parse(problem.layout or "plain")
    table = te.placeholder(layout.shape(problem.rows, problem.hidden), layout.dtype, name="table")

    def picked(row: tirx.Var, column: tirx.Var) -> tirx.Expr:
        return element(layout, table, tirx.Cast("int64", ids[row]), column)

    out = te.compute((rows, problem.hidden), picked, name="picked")
    func = te.create_prim_func([ids, table, out]).with_attr("global_symbol", f"loops_{problem.name}")
    return tag(func, problem)


def embedding_inputs(
    problem: Embedding, sizes: Sizes, rng: np.random.Generator, exact: bool
) -> dict[str, Array]:
    """Random ids, the first and the last of the table among them, and a table in its layout."""
    ids = rng.integers(0, problem.rows, rows_of(sizes), np.int32)
    ids[:: max(1, len(ids) // 3)] = problem.rows - 1
    ids[len(ids) // 2] = 0
    layout = parse(problem.layout or "plain")
    table = rng.standard_normal((problem.rows, problem.hidden), np.float32)
    return {"ids": ids, "table": layout.pack(format_named(layout.format).encode(table))}


def embedding_expected(
    problem: Embedding, sizes: Sizes, values: Mapping[str, Array], exact: bool
) -> dict[str, Expected]:
    """Rows of the table, bit for bit."""
    layout, format = parse(problem.layout or "plain"), format_named(parse(problem.layout or "plain").format)
    stored, ids = values["table"], values["ids"].reshape(-1)
    if not isinstance(layout, Plain):
        stored = layout.unpack(stored, problem.rows, problem.hidden)
    table = format.decode(stored, problem.hidden)
    right = table[ids].astype(np.float64)
    return {"out": Expected(right, np.zeros_like(right))}


EMBEDDING = Operator(
    Embedding,
    embedding_operands,
    embedding_definition,
    embedding_inputs,
    embedding_expected,
    samples=(
        Embedding(1, 1),
        Embedding(257, 17),
        Embedding(33, 64),
        Embedding(70, 20, "tiled32"),
        Embedding(70, 19, "tiled32_bf16"),
        Embedding(40, 33, "tiled32_f16"),
        Embedding(40, 70, "tiled32_q8"),
        Embedding(70, 33, "tiled16_q4"),
        Embedding(33, 64, "tiled32_q4s"),
        Embedding(21, 19, "plain_f16"),
        Embedding(21, 40, "plain_q8"),
        Embedding(40, 70, "tiled32_q6"),
        Embedding(21, 40, "plain_q6"),
    ),
    benchmarks=(Embedding(49152, 576), Embedding(128256, 2048)),
    mistakes=(Mistake({"rows": 0, "hidden": 4}, "at least 1"),),
    by_rows=True,
)


def last_operands(problem: LastToken, layout: Layout | None) -> tuple[Operand, ...]:
    """(x [batch, seq, (heads,) hidden], out [batch, 1, (heads,) hidden])."""
    return (
        Operand("x", ("batch", "seq", *problem.shape)),
        Operand("out", ("batch", 1, *problem.shape), role="output"),
    )


def last_definition(problem: LastToken) -> PrimFunc:
    """Plain loops: block "last"."""
    batch, seq = tirx.Var("batch", "int64"), tirx.Var("seq", "int64")
    x = te.placeholder((batch, seq, *problem.shape), name="x")
    out = te.compute((batch, 1, *problem.shape), lambda b, _, *at: x(b, seq - 1, *at), name="last")
    func = te.create_prim_func([x, out]).with_attr("global_symbol", f"loops_{problem.name}")
    return tag(func, problem)


def last_inputs(problem: LastToken, sizes: Sizes, rng: np.random.Generator, exact: bool) -> dict[str, Array]:
    """Random rows."""
    return {"x": rng.standard_normal((sizes["batch"], sizes["seq"], *problem.shape), np.float32)}


def last_expected(
    problem: LastToken, sizes: Sizes, values: Mapping[str, Array], exact: bool
) -> dict[str, Expected]:
    """The last rows, bit for bit."""
    right = values["x"][:, -1:].astype(np.float64)
    return {"out": Expected(right, np.zeros_like(right))}


LAST_TOKEN = Operator(
    LastToken,
    last_operands,
    last_definition,
    last_inputs,
    last_expected,
    samples=(LastToken(1), LastToken(17), LastToken(64), LastToken(6, 3), LastToken(64, 9)),
    benchmarks=(LastToken(576), LastToken(64, 9)),
    mistakes=(Mistake({"hidden": 0}, "at least 1"), Mistake({"hidden": 4, "heads": 0}, "at least 1")),
)
