"""Probabilities of a row of logits."""

from dataclasses import dataclass
from typing import ClassVar

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b, vectormath
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.pieces import Pieces
from relax_llm.kernels.problem import Problem, require_positive, tag

_LONGEST = 8192  # Elements whose exponentials take one core about as long as two need to meet.
_LOWEST = -3.4028234663852886e38
_VANISHED = -87.3  # Below, e**x is less than any float32 of full precision; it counts as 0.


@dataclass(frozen=True)
class Softmax(Problem):
    """e**(x / temperature) of each row over the row's sum of these.

    What is -inf has the probability 0. A row with NaN or inf in it, or of nothing but -inf, is NaN.

    Attributes:
        width: Elements in a row.
        tempered: Whether each row has a temperature; otherwise it is 1.
    """

    operator: ClassVar[str] = "softmax"
    width: int
    tempered: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "width")

    @property
    def flops(self) -> str:
        return f"{(20 + self.tempered) * self.width}*batch*seq"  # an exponential is some 16 operations

    @property
    def bytes(self) -> str:
        return f"{8 * self.width + 4 * self.tempered}*batch*seq"


def softmax(problem: Softmax, machine: Machine) -> PrimFunc:
    """x [batch, seq, width], (temperature [batch, seq]) -> out [batch, seq, width].

    Two sweeps over pieces of a row. The first leaves exponentials against the piece's own maximum, which is subtracted
    before anything can overflow; the second scales them to the row's. Pieces are the same whatever the cores and the
    other rows, and so are the results.
    """
    width = problem.width
    pieces = Pieces(width, _LONGEST)

    def emit() -> None:
        batch, seq = b.size("batch"), b.size("seq")
        x_arg = b.argument("x", (batch, seq, width))
        given = b.argument("temperature", (batch, seq)) if problem.tempered else None
        out_arg = b.argument("out", (batch, seq, width))
        rows = batch * seq
        x, out = b.view(x_arg, (rows, width)), b.view(out_arg, (rows, width))
        temperature = b.view(given, (rows,)) if given is not None else None
        largest, total = (T.alloc_buffer((rows, pieces.count), "float32") for _ in range(2))
        serial = rows * width <= _LONGEST

        def raise_(index: Expr) -> None:
            row, piece = pieces.split(index)
            slope = b.let("slope", T.float32(1) / temperature[row]) if temperature is not None else None
            highest = b.local((LANES,))
            b.store(highest, b.splat(_LOWEST), 0)

            def compare(at: Expr, n: int) -> None:
                b.store(highest, T.max(b.load(x, row, at, lanes=n), b.load(highest, 0, lanes=n)), 0, lanes=n)

            pieces.visit(piece, compare)
            b.put(largest, b.reduce_lanes(highest, (), T.max), row, piece)
            base = b.let("base", largest[row, piece])
            sums = b.local((LANES,))
            b.store(sums, b.splat(0.0), 0)

            def exponential(at: Expr, n: int) -> None:
                below = b.load(x, row, at, lanes=n) - b.splat(base, n)
                power = b.let("power", below if slope is None else below * b.splat(slope, n))
                raised = b.let("raised", _exp(power, n))
                b.store(out, raised, row, at, lanes=n)
                b.store(sums, b.load(sums, 0, lanes=n) + raised, 0, lanes=n)

            pieces.visit(piece, exponential)
            b.put(total, b.reduce_lanes(sums, (), lambda p, q: p + q), row, piece)

        def scale(index: Expr) -> None:
            row, piece = pieces.split(index)
            factor = _factor(row, piece)

            def write(at: Expr, n: int) -> None:
                b.store(out, b.load(out, row, at, lanes=n) * b.splat(factor, n), row, at, lanes=n)

            pieces.visit(piece, write)

        def _factor(row: Expr, piece: Expr) -> Expr:
            """What the exponentials of a piece are multiplied with."""
            if pieces.count == 1:
                return b.let("factor", T.float32(1) / total[row, 0])
            slope = T.float32(1) / temperature[row] if temperature is not None else T.float32(1)
            highest, sum_ = b.local((1,)), b.local((1,))
            b.put(highest, largest[row, 0], 0)
            with T.serial(pieces.count - 1) as other:
                b.put(highest, T.max(largest[row, other + 1], highest[0]), 0)
            b.put(sum_, T.float32(0), 0)
            with T.serial(pieces.count) as other:
                weight = _exp((largest[row, other] - highest[0]) * slope, 1)
                b.put(sum_, sum_[0] + total[row, other] * weight, 0)
            return b.let("factor", _exp((largest[row, piece] - highest[0]) * slope, 1) / sum_[0])

        def whole(index: Expr) -> None:
            raise_(index)
            scale(index)

        if pieces.count == 1:
            b.tasks(rows, whole, serial_if=serial, name="row")
        else:
            b.tasks(rows * pieces.count, raise_, name="piece")
            b.tasks(rows * pieces.count, scale, name="piece")

    return tag(b.prim_func(problem.name, emit), problem)


def _exp(power: Expr, lanes: int) -> Expr:
    """e**power for power <= 0, and 0 where that is hardly a float."""
    power = b.let("power", power)
    return T.Select(power < b.splat(_VANISHED, lanes), b.splat(0.0, lanes), vectormath.exp(power))
