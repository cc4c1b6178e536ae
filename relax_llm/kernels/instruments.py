"""Functions that every library carries and no model calls: a clock, and loops that find what a machine can do.

A runtime without a compiler measures with them. They are compiled for the same processor as the kernels beside them,
run on the same threads, and so say what those could reach.
"""

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.intrinsics import BF16, INT8, dot_bf16, dot_int8, imported
from relax_llm.kernels.machine import LANES, Machine

CLOCK, READ, LOOPS = "relax_llm_clock", "relax_llm_read", "relax_llm_chains"
MULTIPLY_ADD, MULTIPLY_BF16, MULTIPLY_INT8 = (
    f"relax_llm_multiply_add{suffix}" for suffix in ("", "_bf16", "_int8")
)

_SUMS = 8
"""Vectors that reading adds at once, so that it does not wait for the last addition."""

_AHEAD = 64 * LANES
"""Elements by which reading asks ahead, into a first-level cache; into the second one by twice as many."""


def instruments(machine: Machine) -> dict[str, PrimFunc]:
    """The functions for a processor, by symbol."""
    found = {CLOCK: clock(), MULTIPLY_ADD: multiply_add(machine), READ: read(machine), LOOPS: loops()}
    if machine.features >= BF16:
        found[MULTIPLY_BF16] = multiply_bf16(machine)
    if machine.features >= INT8:
        found[MULTIPLY_INT8] = multiply_int8(machine)
    return found


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
    return _loop(MULTIPLY_ADD, machine, "float32", "float32", lambda total, factor: total * factor + factor)


def multiply_bf16(machine: Machine) -> PrimFunc:
    """The same with products of pairs of bf16, twice as many in a vector.

    ::

        relax_llm_multiply_add_bf16(half: int32 [tasks, LANES], count, out: f32 [tasks, LANES])
    """

    def step(total: b.Expr, pairs: b.Expr) -> b.Expr:
        return dot_bf16(total, pairs, pairs)

    return _loop(MULTIPLY_BF16, machine, "int32", "float32", step, imported())


def multiply_int8(machine: Machine) -> PrimFunc:
    """The same with products of bytes, four times as many in a vector.

    ::

        relax_llm_multiply_add_int8(ones: int32 [tasks, LANES], count, out: int32 [tasks, LANES])
    """

    def step(total: b.Expr, quads: b.Expr) -> b.Expr:
        return dot_int8(total, quads, quads)

    return _loop(MULTIPLY_INT8, machine, "int32", "int32", step)


def _loop(
    name: str,
    machine: Machine,
    factors: str,
    results: str,
    step: Callable[[b.Expr, b.Expr], b.Expr],
    within: AbstractContextManager[None] | None = None,
) -> PrimFunc:
    """A loop of steps in registers, each from a sum and the factor, emitted `within` what they need."""
    sums = machine.accumulators

    def emit() -> None:
        tasks = b.size("tasks")
        half = b.argument("half", (tasks, LANES), factors)
        count = b.scalar("count")
        out = b.argument("out", (tasks, LANES), results)

        def work(task: b.Expr) -> None:
            registers = b.Registers(1, [(index * LANES, LANES) for index in range(sums)], results)
            factor = b.let("factor", b.load(half, task, 0))
            for _, index, _, _ in registers:
                registers.set(0, index, T.broadcast(T.cast(index, results), LANES))
            with (
                within or nullcontext(),
                T.serial(T.truncdiv(count, T.int64(sums))),
            ):
                for _, index, _, _ in registers:
                    registers.set(0, index, step(registers.get(0, index), factor))
            b.store(out, _total(registers), task, 0)

        b.tasks(tasks, work)

    return b.prim_func(name, emit)


def read(machine: Machine) -> PrimFunc:
    """Read memory from end to end on all threads, and keep sums of it.

    ::

        relax_llm_read(memory: f32 [tasks, elements], out: f32 [tasks, LANES])

    `elements` is a multiple of `8 * LANES`. Where cores read ahead by themselves, as `Machine.reads_ahead` has it, each
    reads from two places in turns, and asks for one line of four.
    """
    places, asked, ahead = (2, 1, 2 * _AHEAD) if machine.reads_ahead(_SUMS, _SUMS) else (1, _SUMS, _AHEAD)
    each = _SUMS // places

    def emit() -> None:
        tasks, elements = b.size("tasks"), b.size("elements")
        memory = b.argument("memory", (tasks, elements))
        out = b.argument("out", (tasks, LANES))
        flat = b.view(memory, (tasks * elements,))

        def work(task: b.Expr) -> None:
            registers = b.Registers(1, [(index * LANES, LANES) for index in range(_SUMS)])
            registers.clear()
            part = b.let("part", T.truncdiv(elements, T.int64(places)))
            with T.serial(T.truncdiv(elements, T.int64(_SUMS * LANES))) as turn:
                start = b.let("start", task * elements + turn * (each * LANES))
                for _, index, _, _ in registers:
                    at = start + index // each * part + index % each * LANES
                    if index % each < asked:
                        b.prefetch(flat, at + ahead, machine.streams_into)
                    registers.set(0, index, registers.get(0, index) + b.load(flat, at))
            b.store(out, _total(registers), task, 0)

        b.tasks(tasks, work)

    return b.prim_func(READ, emit)


def loops() -> PrimFunc:
    """Loops over all threads, or on one, in which each task multiplies and adds for a while, in a chain.

    ::

        relax_llm_chains(count, steps, alone, out: f32 [tasks, LANES])

    `count` loops, on one thread where `alone` is not 0; each task does `steps` multiply-adds that wait for each other.
    The first element of each row becomes 1 - 2**-steps plus the number of the last loop.
    """

    def emit() -> None:
        tasks = b.size("tasks")
        count, steps, alone = b.scalar("count"), b.scalar("steps"), b.scalar("alone")
        out = b.argument("out", (tasks, LANES))
        with T.serial(count) as number:

            def work(task: b.Expr) -> None:
                chain = b.local((1,))
                b.put(chain, T.float32(0), 0)
                with T.serial(steps):
                    b.put(chain, chain[0] * T.float32(0.5) + T.float32(0.5), 0)
                b.put(out, chain[0] + T.cast(number, "float32"), task, 0)

            b.tasks(tasks, work, serial_if=alone != 0)

    return b.prim_func(LOOPS, emit)


def _total(registers: b.Registers) -> b.Expr:
    return reduce(operator.add, (registers.get(row, index) for row, index, _, _ in registers))
