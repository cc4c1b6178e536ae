"""Products in bf16: `vdpbf16ps` multiplies and adds two of each, where the problem allows activations to be rounded."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from tvm import ir
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.inner import inner, memory, number, pointer
from relax_llm.kernels.intrinsics import imported, round_bf16
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.matmul.operands import Operands, Parts
from relax_llm.kernels.matmul.panels import by_panel
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.matmul.shape import PIECE, Blocking, pairs_blocking
from relax_llm.plan.kernel import Declined

_AT_ONCE = 2 * LANES  # elements that are rounded together
_SERIAL = 1 << 14  # elements of x that one core rounds sooner than two could begin
_FAR = 1 << 20


def pairs(problem: Matmul, machine: Machine) -> PrimFunc:
    """The product over a packed weight in bf16 and activations rounded to bf16, x [M, K].

    First x goes through the norm, where there is one, and is rounded, for all tasks, into memory where rows lie an odd
    number of cache lines apart; an odd K is filled up with 0. Then each task has a panel of the weight and a block of
    rows, as in `tiled`. Every output is summed over pairs along k in ascending order, so that a row's result does not
    depend on the rows beside it.

    Raises:
        Declined: The problem does not allow to round its activations.
    """
    if problem.activations != "bf16":
        raise Declined("rounds activations to bf16, and the problem wants them in f32")
    blocking = pairs_blocking(problem, machine)

    def emit() -> None:
        operands = Operands.declare(problem, machine, flat=True)
        m = operands.m
        rounded = b.view(
            T.alloc_buffer((blocking.parts * m * PIECE,), "int32"), (blocking.parts, m, PIECE), "int32"
        )
        _round_all(operands, blocking, rounded)
        parts = Parts(operands, blocking, PIECE, pairs=True)
        by_panel(parts, lambda part, first: T.address_of(rounded[part, first, 0]))

    return b.prim_func(f"pairs__{problem.name}", emit)


def _round_all(operands: Operands, blocking: Blocking, rounded: Expr) -> None:
    """Emit the rounding of x to [parts, M, PIECE]."""
    m, k = operands.m, operands.problem.k
    encode, rest = round_pairs(operands.machine), k % _AT_ONCE
    full = k - rest  # what is left over follows it, within the last part
    wide = 2 * blocking.steps

    def task(row: Expr) -> None:
        x, at_row = operands.some_normalized(row, T.int64(1), 1)
        for part in range(blocking.parts):
            count = (min(full, (part + 1) * wide) - part * wide) // _AT_ONCE
            if count > 0:
                there = T.address_of(rounded[part, row, 0])
                b.call(encode, T.address_of(x[at_row, part * wide]), there, T.int64(count), m)
        if rest:
            last = b.local((_AT_ONCE,))
            for at, lanes in b.chunks(_AT_ONCE):
                b.store(last, b.splat(0.0), at, lanes=lanes)
            with T.serial(rest) as at:
                b.put(last, x[at_row, full + at], at)
            there = T.address_of(rounded[full // wide, row, full % wide // 2])
            b.call(encode, T.address_of(last[0]), there, T.int64(1), m)

    b.tasks(m, task, serial_if=m * k <= _SERIAL, name="row")


def round_pairs(machine: Machine) -> ir.GlobalVar:
    """The function that rounds f32 [count, 32] to words of two bf16, int32 [count, 16].

    ::

        round_pairs(x, rounded, count, rows)

    How many rows there are in all it does not use: LLVM does not know it, and keeps the function apart; see
    `inner.returning`.
    """

    def emit() -> None:
        x_at, rounded_at, count = pointer("x"), pointer("rounded", "int32"), number("count")
        number("rows")
        x, rounded = memory(x_at, (_FAR,)), memory(rounded_at, (_FAR,), "int32")
        with imported(), T.serial(count) as i:
            low, high = (b.load(x, i * _AT_ONCE + start) for start in (0, LANES))
            b.store(rounded, round_bf16(low, high), i * LANES)

    return inner("round_bf16", (machine,), emit)


def pairs_cost(
    machine: Machine, of_floats: Callable[[Matmul, Mapping[str, int]], float]
) -> Callable[..., float]:
    """Seconds of a launch: those of `tiled` over half as many steps, and rounding."""

    def cost(problem: Matmul, sizes: Mapping[str, int]) -> float:
        halved = replace(problem, k=-(-problem.k // 2), weight_format="f32", norm=None)
        return of_floats(halved, sizes) + sizes["M"] * problem.k / 20e9

    return cost
