"""Logits of the tokens that may be the likeliest: what a greedy choice needs of a head, and all that it reads of it.

A head in fewer bits gives an estimate of every logit, and how far off that can be is known: for a row w of the head,
its row c in fewer bits and a hidden state x, no more than |w - c| |x|, by Cauchy and Schwarz. So a logit is computed
only where estimate and margin together reach the logit of the token with the largest estimate. Of 49,152 tokens these
are five or so; no other one can be the choice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.errors import KernelError
from relax_llm.formats import format_named
from relax_llm.formats.activations import GROUP, ROUNDINGS
from relax_llm.kernels import builder as b
from relax_llm.kernels.argmax import BLOCK, largest_of
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.layout import Packed, Plain, TiledGroups, parse
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.matmul.integer import FEATURES, ahead_of, multiply_integers, spacing_of, turns_of
from relax_llm.kernels.matmul.operands import Operands, Parts, Sums
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.matmul.quantize import BESIDE, encode_row, quantize
from relax_llm.kernels.matmul.reading import panel_words
from relax_llm.kernels.matmul.shape import tiled_blocking
from relax_llm.kernels.pieces import Pieces
from relax_llm.kernels.problem import Problem, require_positive, tag

_PANELS = 16
"""Panels of a task. Their estimates are looked at together first; mostly none of them contends."""

LEAST = 1e-18
"""Magnitudes of x below it count as this for its norm: their squares would be lost."""


@dataclass(frozen=True)
class Contenders(Problem):
    """A head's logits where they may be the largest of a row, and their estimates elsewhere.

    The largest element of a row of the result is that of the logits, and stands where it does in these. What has
    NaN for an estimate contends, and where x is not finite all do.

    Attributes:
        n: Rows of the head.
        k: Its columns.
        layout: The name of the layout, one in panels, that it lies in.
        activations: What x may be rounded to in a logit, as in `Matmul`.
    """

    operator: ClassVar[str] = "contenders"
    n: int
    k: int
    layout: str
    activations: str | None = None

    def __post_init__(self) -> None:
        require_positive(self, "n", "k")
        if isinstance(parse(self.layout), Plain):
            raise KernelError(f"Contenders are computed from a head in panels, not in {self.layout!r}.")

    @property
    def head(self) -> Packed:
        """The layout."""
        layout = parse(self.layout)
        assert not isinstance(layout, Plain)
        return layout

    @property
    def product(self) -> Matmul:
        """What a logit is an element of."""
        return Matmul(self.n, self.k, self.head.format, activations=self.activations)

    @property
    def flops(self) -> str:
        return f"{2 * self.n + 4 * self.k}*batch*seq"

    @property
    def bytes(self) -> str:
        panel = format_named(self.head.format).nbytes(self.head.cols, self.k)
        return f"{4 * self.n} + {8 * self.n + 4 * self.k + panel}*batch*seq"


def _rounds(problem: Contenders, machine: Machine) -> bool:
    """Whether logits are products of integers."""
    return (
        problem.activations == "int16"
        and isinstance(problem.head, TiledGroups)
        and machine.features >= FEATURES
    )


class _Logits(NamedTuple):
    """How logits are computed.

    Attributes:
        prepare: Emits what must be done once for a row.
        write: Emits the logits of a row and a panel, into [1, cols].
    """

    prepare: Callable[[Expr], None]
    write: Callable[[Expr, Expr, Expr], None]


def _floats(problem: Contenders, machine: Machine, x: Expr, words: Expr, rows: Expr) -> _Logits:
    product, layout = problem.product, problem.head
    operands = Operands(product, machine, layout, rows, x, words, None, None, (), x)
    parts = Parts(operands, tiled_blocking(product, machine), stride=problem.k)

    def write(row: Expr, panel: Expr, memory: Expr) -> None:
        sums, one = Sums(memory, (T.int64(0), T.int64(0)), layout.cols), T.int64(1)
        with T.serial(parts.blocking.parts) as part:
            start = T.address_of(x[row, part * parts.blocking.steps])
            parts.tile(part, panel, one, start, sums, parts.at(panel, part + 1), (T.int64(0), one))

    return _Logits(lambda row: None, write)


def _integers(problem: Contenders, machine: Machine, x: Expr, words: Expr, rows: Expr) -> _Logits:
    layout, rounding = problem.head, ROUNDINGS["int16"]
    assert isinstance(layout, TiledGroups)
    groups, planes = layout.blocks.groups(problem.k), rounding.planes
    widths = (("int8", groups * planes * GROUP), ("float32", groups * BESIDE))
    codes, beside = (
        b.view(T.alloc_buffer((rows * width,), dtype), (rows, width), dtype) for dtype, width in widths
    )
    encode, multiply = (
        quantize(layout.blocks, rounding, machine),
        multiply_integers(layout, rounding, machine),
    )

    def write(row: Expr, panel: Expr, memory: Expr) -> None:
        place = b.let("place", panel * panel_words(layout, problem.k))
        b.call(
            multiply,
            T.int64(1),
            T.address_of(codes[row, 0]),
            T.address_of(beside[row, 0]),
            T.address_of(words[place]),
            T.address_of(memory[0, 0]),
            T.address_of(words[place + ahead_of(machine)]),
            T.int64(layout.cols),
            T.int64(groups),
            T.int64(groups),
            T.int64(turns_of(layout)),
            spacing_of(layout, T.int64(1)),
            T.int64(0),
        )

    return _Logits(
        lambda row: encode_row(encode, (x, row), (codes, beside), row, rows, problem.k, planes), write
    )


def contenders(problem: Contenders, machine: Machine) -> PrimFunc:
    """x [batch, seq, K], estimates [batch, seq, N], head, margins [N] -> out [batch, seq, N].

    Logits are to the last bit those of the kernel `tiled`; of `integer16` where x may be rounded for it.
    """
    n, k, layout = problem.n, problem.k, problem.head
    cols, panels = layout.cols, layout.panels(n)
    whole = min(_PANELS * cols, n)
    count = -(-n // whole)
    pieces = Pieces(n, n, BLOCK)

    def emit() -> None:
        batch, seq = b.size("batch"), b.size("seq")
        x_arg = b.argument("x", (batch, seq, k))
        estimates_arg = b.argument("estimates", (batch, seq, n))
        head = b.argument("head", layout.shape(n, k), layout.dtype)
        margins = b.argument("margins", (n,))
        out_arg = b.argument("out", (batch, seq, n))
        rows = batch * seq
        x, estimates, out = (
            b.view(x_arg, (rows, k)),
            b.view(estimates_arg, (rows, n)),
            b.view(out_arg, (rows, n)),
        )
        words = b.view(head, (panels * panel_words(layout, k),))
        logits = (_integers if _rounds(problem, machine) else _floats)(problem, machine, x, words, rows)
        norms = b.view(T.alloc_buffer((rows,)), (rows,))
        bars = b.view(T.alloc_buffer((rows,)), (rows,))

        def logits_of(row: Expr, panel: Expr) -> Expr:
            """The logits of a panel, on the stack."""
            memory = b.stack((1, cols))
            logits.write(row, panel, memory)
            return memory

        with T.serial(rows) as row:
            squares = b.row_sum(k, lambda at, lanes: _square(b.load(x, row, at, lanes=lanes), lanes))
            b.put(norms, T.sqrt(squares), row)
            logits.prepare(row)
            best, place = b.local((1,), "int32"), b.local((1,), "int32")
            largest_of(estimates, row, T.int64(0), pieces, best, place)
            first = b.let("first", T.cast(place[0], "int64"))
            b.put(bars, logits_of(row, first // cols)[0, first % cols], row)

        def any_of(row: Expr, start: Expr, width: int) -> Expr:
            """Whether the logit of any of some tokens may reach the bar, or is not a number: not 0."""
            found = b.local((LANES,), "int32")
            b.store(found, T.broadcast(T.int32(0), LANES), 0)

            def look(offset: Expr, lanes: int) -> None:
                at = b.let("at", start + offset)
                reached = b.load(estimates, row, at, lanes=lanes)
                reached = reached + b.load(margins, at, lanes=lanes) * b.splat(norms[row], lanes)
                zeros, ones = (T.int32(i) if lanes == 1 else T.broadcast(T.int32(i), lanes) for i in range(2))
                here = T.Select(reached < b.splat(bars[row], lanes), zeros, ones)
                b.store(found, T.bitwise_or(b.load(found, 0, lanes=lanes), here), 0, lanes=lanes)

            b.sweep(width, look)
            return b.fold(b.load(found, 0), T.bitwise_or)

        def copy(source: Expr, at: tuple[Expr, Expr], row: Expr, start: Expr, width: int) -> None:
            """Write results for some tokens."""

            def some(offset: Expr, lanes: int) -> None:
                b.store(
                    out, b.load(source, at[0], at[1] + offset, lanes=lanes), row, start + offset, lanes=lanes
                )

            b.sweep(width, some)

        def panel(row: Expr, start: Expr, width: int) -> None:
            with b.when(any_of(row, start, width) != 0):
                exact = logits_of(row, b.let("panel", start // cols))
                copy(exact, (T.int64(0), T.int64(0)), row, start, width)

        def stretch(row: Expr, start: Expr, width: int) -> None:
            """The tokens of some panels."""
            copy(estimates, (row, start), row, start, width)
            with b.when(any_of(row, start, width) != 0):
                if width >= cols:
                    with T.serial(width // cols) as index:
                        panel(row, b.let("first", start + index * cols), cols)
                if width % cols:
                    panel(row, start + width // cols * cols, width % cols)

        def task(index: Expr) -> None:
            row, piece = b.let("row", index // count), b.let("piece", index % count)
            start = b.let("start", piece * whole)
            if n % whole:
                last = piece == count - 1
                b.either(last, lambda: stretch(row, start, n % whole), lambda: stretch(row, start, whole))
            else:
                stretch(row, start, whole)

        b.tasks(rows * count, task, name="piece")

    return tag(b.prim_func(problem.name, emit), problem)


def _square(x: Expr, lanes: int) -> Expr:
    return x * x + b.splat(LEAST * LEAST, lanes)
