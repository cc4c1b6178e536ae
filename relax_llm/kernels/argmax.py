"""The largest of a row: the greedy choice of a token, where the logits are."""

from dataclasses import dataclass
from typing import ClassVar

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.pieces import Pieces
from relax_llm.kernels.problem import Problem, require_positive, tag

_VECTORS = 4  # Of a block: their maximum is compared with the best so far, and not each of them.
BLOCK = _VECTORS * LANES
"""Elements that `largest_of` goes through at once."""

_LONGEST = 65536  # Elements that one core goes through in less time than two need to meet.
_INFINITY = float("inf")
_NAN = 2**31 - 1  # Its rank.


@dataclass(frozen=True)
class Argmax(Problem):
    """The index of the largest element of each row.

    Of equal ones it is the first, and the first NaN where there is one, as in NumPy: what is broken is not passed over.

    Attributes:
        width: Elements in a row.
    """

    operator: ClassVar[str] = "argmax"
    width: int

    def __post_init__(self) -> None:
        require_positive(self, "width")

    @property
    def flops(self) -> str:
        return f"{self.width}*batch*seq"

    @property
    def bytes(self) -> str:
        return f"{4 * self.width + 4}*batch*seq"


def argmax(problem: Argmax, machine: Machine) -> PrimFunc:
    """x [batch, seq, width] -> out [batch, seq, 1] int32.

    A block is a few vectors. Each lane keeps the largest value of its own and the first block that had it; only where
    the row ends are lanes compared, and the one block that won is searched for the element.
    """
    width = problem.width
    pieces = Pieces(width, _LONGEST, BLOCK)

    def emit() -> None:
        batch, seq = b.size("batch"), b.size("seq")
        x_arg = b.argument("x", (batch, seq, width))
        out_arg = b.argument("out", (batch, seq, 1), "int32")
        rows = batch * seq
        x, out = b.view(x_arg, (rows, width)), b.view(out_arg, (rows,), "int32")
        found = T.alloc_buffer((rows, pieces.count), "int32") if pieces.count > 1 else None

        def task(index: Expr) -> None:
            row, piece = pieces.split(index)
            best, place = b.local((1,), "int32"), b.local((1,), "int32")
            largest_of(x, row, piece, pieces, best, place)
            if found is None:
                b.put(out, place[0], row)
            else:
                b.put(found, place[0], row, piece)

        b.tasks(rows * pieces.count, task, serial_if=rows * width <= _LONGEST, name="piece")
        if found is not None:

            def combine(row: Expr) -> None:
                place = b.local((1,), "int32")
                b.put(place, found[row, 0], 0)
                with T.serial(pieces.count - 1) as other:
                    challenger = b.let("challenger", found[row, other + 1])
                    value, held = x[row, T.cast(challenger, "int64")], x[row, T.cast(place[0], "int64")]
                    with b.when(_rank(value) > _rank(held)):
                        b.put(place, challenger, 0)
                b.put(out, place[0], row)

            with T.serial(rows) as row:
                combine(row)

    return tag(b.prim_func(problem.name, emit), problem)


def largest_of(x: Expr, row: Expr, piece: Expr, pieces: Pieces, best: Expr, place: Expr) -> None:
    """Write where the largest of a piece is to `place`, and its rank to `best`."""
    first, block = b.let("first", pieces.first(piece)), pieces.block
    b.put(best, T.int32(-(2**31)), 0)
    b.put(place, T.cast(first * block, "int32"), 0)
    if pieces.blocks:
        _blocks(x, row, first, pieces.length(piece), block, best, place)
    if pieces.rest:
        with b.when(pieces.is_last(piece)), T.serial(pieces.rest) as i:
            at = b.let("at", pieces.blocks * block + i)
            rank = b.let("rank", _rank(x[row, at]))
            with b.when(rank > best[0]):
                b.put(best, rank, 0)
                b.put(place, T.cast(at, "int32"), 0)


def _blocks(x: Expr, row: Expr, first: Expr, length: Expr, block: int, best: Expr, place: Expr) -> None:
    values, blocks = b.local((LANES,)), b.local((LANES,), "int32")
    broken = b.local((LANES,), "int32")
    b.store(values, b.splat(-_INFINITY), 0)
    b.store(blocks, T.broadcast(T.int32(0), LANES), 0)
    b.store(broken, T.broadcast(T.int32(0), LANES), 0)
    with T.serial(length) as index:
        start = b.let("start", (first + index) * block)
        parts = [b.let("part", b.load(x, row, start + i * LANES)) for i in range(_VECTORS)]
        # Compared like this, NaN is seen whatever the simplifiers think of x != x; the processor takes two at once.
        ordered = parts[0] <= b.splat(_INFINITY)
        for part in parts[1:]:
            ordered = T.And(ordered, part <= b.splat(_INFINITY))
        while len(parts) > 1:
            parts = [b.let("larger", T.max(parts[i], parts[i + 1])) for i in range(0, len(parts), 2)]
        ones = T.broadcast(T.int32(1), LANES)
        b.store(broken, T.Select(ordered, b.load(broken, 0), ones), 0)
        is_new = parts[0] > b.load(values, 0)
        number = T.broadcast(T.cast(index, "int32"), LANES)
        b.store(blocks, T.Select(is_new, number, b.load(blocks, 0)), 0)
        b.store(values, T.Select(is_new, parts[0], b.load(values, 0)), 0)
    largest = b.reduce_lanes(values, (), lambda p, q: T.max(p, q))
    earliest = b.local((1,), "int32")
    b.put(earliest, T.int32(2**31 - 1), 0)
    with T.serial(LANES) as lane, b.when(values[lane] == largest):
        b.put(earliest, T.min(earliest[0], blocks[lane]), 0)
    b.put(best, _rank(largest), 0)
    start = b.let("start", (first + T.cast(earliest[0], "int64")) * block)
    _first(x, row, start, T.int64(block), place, best[0])
    any_broken = b.reduce_lanes(broken, (), lambda p, q: T.bitwise_or(p, q))
    with b.when(any_broken != 0):
        b.put(best, T.int32(_NAN), 0)
        _first(x, row, b.let("start", first * block), b.let("length", length * block), place, best[0])


def _first(x: Expr, row: Expr, start: Expr, length: Expr, place: Expr, rank: Expr) -> None:
    """Write the first place of a stretch with an element of this rank; there is one."""
    with T.serial(length) as behind:
        at = b.let("at", start + length - 1 - behind)
        with b.when(_rank(x[row, at]) == rank):
            b.put(place, T.cast(at, "int32"), 0)


def _rank(value: Expr) -> Expr:
    """A float as an integer that orders like it, both zeros alike and every NaN above all."""
    bits = b.let("bits", T.reinterpret("int32", value))
    negative = T.int32(-(2**31)) - bits
    ordered = T.Select(bits >= 0, bits, negative)
    return T.Select(T.bitwise_and(bits, T.int32(2**31 - 1)) > T.int32(0x7F800000), T.int32(_NAN), ordered)
