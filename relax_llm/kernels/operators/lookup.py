"""The records of what picks rows by index."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
from tvm import te, tirx
from tvm.tirx import PrimFunc

from relax_llm.kernels.layout import Layout, parse
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
    shape = layout.shape(problem.rows, problem.hidden)
    table = te.placeholder(shape, layout.dtype, name="table")

    def picked(row: tirx.Var, column: tirx.Var) -> tirx.Expr:
        index = tirx.Cast("int64", ids[row])
        if len(shape) == 2:
            return table[index, column]
        if len(shape) == 4:
            bits = table[index // shape[2], column // 2, index % shape[2], column % 2]
            return tirx.reinterpret("float32", tirx.Cast("uint32", bits) << tirx.const(16, "uint32"))
        return table[index // shape[2], column, index % shape[2]]

    out = te.compute((rows, problem.hidden), picked, name="picked")
    func = te.create_prim_func([ids, table, out]).with_attr("global_symbol", f"loops_{problem.name}")
    return tag(func, problem)


def embedding_inputs(
    problem: Embedding, sizes: Sizes, rng: np.random.Generator, exact: bool
) -> dict[str, Array]:
    """Random ids, the first and the last of the table among them, and a packed table."""
    ids = rng.integers(0, problem.rows, rows_of(sizes), np.int32)
    ids[:: max(1, len(ids) // 3)] = problem.rows - 1
    ids[len(ids) // 2] = 0
    table = rng.standard_normal((problem.rows, problem.hidden), np.float32)
    return {"ids": ids, "table": parse(problem.layout or "plain").pack(table)}


def embedding_expected(
    problem: Embedding, sizes: Sizes, values: Mapping[str, Array], exact: bool
) -> dict[str, Expected]:
    """Rows of the table, bit for bit."""
    table, ids = values["table"], values["ids"].reshape(-1)
    if table.ndim == 4:
        bits = table.transpose(0, 2, 1, 3).reshape(table.shape[0] * table.shape[2], -1)[:, : problem.hidden]
        table = np.ascontiguousarray(bits).view(ml_dtypes.bfloat16)
    if table.ndim == 3:
        table = table.transpose(0, 2, 1).reshape(-1, problem.hidden)
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
    ),
    benchmarks=(Embedding(49152, 576), Embedding(128256, 2048)),
    mistakes=(Mistake({"rows": 0, "hidden": 4}, "at least 1"),),
    by_rows=True,
)


def last_operands(problem: LastToken, layout: Layout | None) -> tuple[Operand, ...]:
    """(x [batch, seq, hidden], out [batch, 1, hidden])."""
    return (
        Operand("x", ("batch", "seq", problem.hidden)),
        Operand("out", ("batch", 1, problem.hidden), role="output"),
    )


def last_definition(problem: LastToken) -> PrimFunc:
    """Plain loops: block "last"."""
    batch, seq = tirx.Var("batch", "int64"), tirx.Var("seq", "int64")
    x = te.placeholder((batch, seq, problem.hidden), name="x")
    out = te.compute((batch, 1, problem.hidden), lambda b, _, c: x[b, seq - 1, c], name="last")
    func = te.create_prim_func([x, out]).with_attr("global_symbol", f"loops_{problem.name}")
    return tag(func, problem)


def last_inputs(problem: LastToken, sizes: Sizes, rng: np.random.Generator, exact: bool) -> dict[str, Array]:
    """Random rows."""
    return {"x": rng.standard_normal((sizes["batch"], sizes["seq"], problem.hidden), np.float32)}


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
    samples=(LastToken(1), LastToken(17), LastToken(64)),
    benchmarks=(LastToken(576),),
    mistakes=(Mistake({"hidden": 0}, "at least 1"),),
)
