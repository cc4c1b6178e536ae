"""Functions that every library carries and no model calls: a clock, and two loops that find what a machine can do.

A runtime without a compiler measures with them. They are compiled for the same processor as the kernels beside them,
run on the same threads, and so say what those could reach.
"""

import operator
from functools import reduce

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.machine import LANES, Machine

CLOCK, MULTIPLY_ADD, READ = "relax_llm_clock", "relax_llm_multiply_add", "relax_llm_read"

_SUMS = 8
"""Vectors that reading adds at once, so that it does not wait for the last addition."""

_AHEAD = 64 * LANES
"""Elements by which reading asks ahead."""


def instruments(machine: Machine) -> dict[str, PrimFunc]:
    """The functions for a processor, by symbol."""
    return {CLOCK: clock(), MULTIPLY_ADD: multiply_add(machine), READ: read()}


def clock() -> PrimFunc:
    """Write the time to a row of a table: seconds and nanoseconds, as the C library has them.

    ::

        relax_llm_clock(times: int64 [stamps, 2], row, clock_id)
    """

    def emit() -> None:
        times = b.argument("times", (b.size("stamps"), 2), "int64")
        row, which = b.scalar("row"), b.scalar("clock_id")
        place = T.address_of(times[row, 0])
        T.evaluate(T.call_extern("int32", "clock_gettime", T.cast(which, "int32"), place))

    return b.prim_func(CLOCK, emit)


def multiply_add(machine: Machine) -> PrimFunc:
    """Multiply and add in registers only, on all threads: independent sums, as many as a micro-kernel has.

    ::

        relax_llm_multiply_add(half: f32 [tasks, LANES], count, out: f32 [tasks, LANES])

    Each task does `count` multiply-adds of `LANES` elements, or fewer by less than one for each of its sums. `half` is
    0.5, so that sums converge to 1, far from denormals; LLVM does not know it, and cannot work the sums out.
    """
    sums = machine.accumulators

    def emit() -> None:
        tasks = b.size("tasks")
        half = b.argument("half", (tasks, LANES))
        count = b.scalar("count")
        out = b.argument("out", (tasks, LANES))

        def work(task: b.Expr) -> None:
            registers = b.Registers(1, [(index * LANES, LANES) for index in range(sums)])
            factor = b.let("factor", b.load(half, task, 0))
            for _, index, _, _ in registers:
                registers.set(0, index, factor * b.splat(float(index)))
            with T.serial(T.truncdiv(count, T.int64(sums))):
                for _, index, _, _ in registers:
                    registers.set(0, index, registers.get(0, index) * factor + factor)
            b.store(out, _total(registers), task, 0)

        b.tasks(tasks, work)

    return b.prim_func(MULTIPLY_ADD, emit)


def read() -> PrimFunc:
    """Read memory from end to end on all threads, and keep sums of it.

    ::

        relax_llm_read(memory: f32 [tasks, elements], out: f32 [tasks, LANES])

    `elements` is a multiple of `8 * LANES`.
    """

    def emit() -> None:
        tasks, elements = b.size("tasks"), b.size("elements")
        memory = b.argument("memory", (tasks, elements))
        out = b.argument("out", (tasks, LANES))
        flat = b.view(memory, (tasks * elements,))

        def work(task: b.Expr) -> None:
            registers = b.Registers(1, [(index * LANES, LANES) for index in range(_SUMS)])
            registers.clear()
            with T.serial(T.truncdiv(elements, T.int64(_SUMS * LANES))) as turn:
                start = b.let("start", task * elements + turn * (_SUMS * LANES))
                for _, index, offset, _ in registers:
                    b.prefetch(flat, start + _AHEAD + offset)
                    registers.set(0, index, registers.get(0, index) + b.load(flat, start + offset))
            b.store(out, _total(registers), task, 0)

        b.tasks(tasks, work)

    return b.prim_func(READ, emit)


def _total(registers: b.Registers) -> b.Expr:
    return reduce(operator.add, (registers.get(row, index) for row, index, _, _ in registers))
