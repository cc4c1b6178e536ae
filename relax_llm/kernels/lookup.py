"""Rows picked by index: token and position embeddings, and the last token's hidden state."""

import math
from dataclasses import dataclass
from typing import ClassVar

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.elements import element
from relax_llm.kernels.layout import Plain, parse
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.problem import Problem, require_positive, tag

_SERIAL_ROWS = 16


@dataclass(frozen=True)
class Embedding(Problem):
    """Rows of a table, one for each index.

    Attributes:
        rows: Rows of the table (the vocabulary, or the number of positions).
        hidden: Columns of the table.
        layout: How the table lies in memory: None as in the checkpoint, else the name of a layout, such as that of the
            matmul that shares it.
    """

    operator: ClassVar[str] = "embedding"
    rows: int
    hidden: int
    layout: str | None = None

    def __post_init__(self) -> None:
        require_positive(self, "rows", "hidden")

    @property
    def flops(self) -> str:
        return "0"

    @property
    def bytes(self) -> str:
        return f"{8 * self.hidden + 4}*batch*seq"


def embedding(problem: Embedding, machine: Machine) -> PrimFunc:
    """ids [batch, seq] int32, table [rows, hidden] or packed -> out [batch, seq, hidden]."""
    hidden = problem.hidden
    layout = parse(problem.layout or "plain")

    def emit() -> None:
        batch, seq = b.size("batch"), b.size("seq")
        ids_arg = b.argument("ids", (batch, seq), "int32")
        table = b.argument("table", layout.shape(problem.rows, hidden), layout.dtype)
        out_arg = b.argument("out", (batch, seq, hidden))
        rows = batch * seq
        ids, out = b.view(ids_arg, (rows,), "int32"), b.view(out_arg, (rows, hidden))

        def task(row: Expr) -> None:
            index = b.let("index", T.cast(ids[row], "int64"))
            if layout == Plain():
                b.sweep(
                    hidden, lambda at, n: b.store(out, b.load(table, index, at, lanes=n), row, at, lanes=n)
                )
            else:
                with T.serial(hidden) as k:
                    b.put(out, element(layout, table, index, k), row, k)

        b.tasks(rows, task, serial_if=rows <= _SERIAL_ROWS, name="row")

    return tag(b.prim_func(problem.name, emit), problem)


@dataclass(frozen=True)
class LastToken(Problem):
    """The rows of each sequence's last token; logits are needed of no other.

    Attributes:
        hidden: Elements of a row.
        heads: Rows of a token, if it has several.
    """

    operator: ClassVar[str] = "last_token"
    hidden: int
    heads: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "hidden", *(("heads",) if self.heads is not None else ()))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a token."""
        return (self.hidden,) if self.heads is None else (self.heads, self.hidden)

    @property
    def flops(self) -> str:
        return "0"

    @property
    def bytes(self) -> str:
        return f"{8 * math.prod(self.shape)}*batch"


def last_token(problem: LastToken, machine: Machine) -> PrimFunc:
    """x [batch, seq, (heads,) hidden] -> out [batch, 1, (heads,) hidden]."""
    width = math.prod(problem.shape)

    def emit() -> None:
        batch, seq = b.size("batch"), b.size("seq")
        x_arg = b.argument("x", (batch, seq, *problem.shape))
        out_arg = b.argument("out", (batch, 1, *problem.shape))
        x, out = b.view(x_arg, (batch, seq, width)), b.view(out_arg, (batch, width))
        with T.serial(batch) as row:
            b.sweep(width, lambda at, n: b.store(out, b.load(x, row, seq - 1, at, lanes=n), row, at, lanes=n))

    return tag(b.prim_func(problem.name, emit), problem)
