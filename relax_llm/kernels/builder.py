"""A thin layer over TVM's IR builder: kernels are Python functions that emit TIR.

Python loops unroll, `T.serial` loops stay loops, and vectors are `LANES` wide unless said otherwise. A function
built here is fully scheduled; no later pass changes its loops.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from tvm import tirx
from tvm.ir import Call, GlobalVar, PointerType, PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels.machine import LANES, LINE
from relax_llm.kernels.threads import TASKS

Expr = Any  # TIR expressions and buffers carry no useful static types in TVM's Python API.

CALLS = "relax_llm.calls"
"""Function attribute: the functions of the library that a kernel calls."""

_calls: ContextVar[list[GlobalVar]] = ContextVar("calls of the function that is being built")

_SUMS = 4  # of a row, which are added up at the end
_LOG_TASKS = TASKS.bit_length() - 1

_OPAQUE = 8  # The operator pattern that tells TVM's fusion to leave a function alone.


def prim_func(name: str, emit: Callable[[], None]) -> PrimFunc:
    """Build a scheduled PrimFunc whose body `emit` writes.

    Args:
        name: The kernel's symbol in the compiled library.
        emit: Declares arguments with `argument` and `size`, then emits the body.
    """
    attrs = {"global_symbol": name, "tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": _OPAQUE}
    return build(name, attrs, emit)


def build(name: str, attrs: Mapping[str, object], emit: Callable[[], None]) -> PrimFunc:
    """Build a PrimFunc with attributes, to which `CALLS` is added where it calls others."""
    calls: list[GlobalVar] = []
    before = _calls.set(calls)
    try:
        with IRBuilder() as ib, T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr(dict(attrs))
            emit()
    finally:
        _calls.reset(before)
    func = ib.get()
    return func.with_attr(CALLS, list(dict.fromkeys(calls))) if calls else func


def call(function: GlobalVar, *arguments: Expr) -> None:
    """Emit a call of a function that `kernels.inner` made: addresses and numbers, as it declares them."""
    _calls.get().append(function)
    T.evaluate(Call(function, list(arguments)))


def size(name: str) -> Expr:
    """A symbolic int64 size that TVM binds from the shapes of the arguments."""
    var = T.int64()
    IRBuilder.name(name, var)
    return var


def argument(name: str, shape: Sequence[Expr], dtype: str = "float32") -> Expr:
    """Declare the next tensor argument."""
    return T.arg(name, T.buffer(tuple(shape), dtype))


def scalar(name: str) -> Expr:
    """Declare the next argument as an int64 scalar."""
    return T.arg(name, T.int64())


def view(buffer: Expr, shape: Sequence[Expr], dtype: str = "float32") -> Expr:
    """The same memory under another shape of the same size."""
    return T.decl_buffer(tuple(shape), dtype, data=buffer.data)


def local(shape: Sequence[int], dtype: str = "float32") -> Expr:
    """Memory of one task, on its stack; LLVM turns what has constant indices into registers.

    Without the annotation TVM takes it from a pool of heap memory, at some tens of nanoseconds each, which LLVM
    cannot promote.
    """
    return T.alloc_buffer(tuple(shape), dtype, scope="local", annotations={"disable_lower_builtin": True})


def stack(shape: Sequence[int], dtype: str = "float32") -> Expr:
    """Memory of one task, on its stack, whose address is given away: it begins with a cache line.

    TVM aligns the stack's buffers to 16 bytes, wherever a thread's stack happens to lie, and every vector that lies
    across two lines is read and written twice.
    """
    beyond = LINE // np.dtype(dtype).itemsize
    count = math.prod(shape) + beyond
    whole = view(local((count,), dtype), (count,), dtype)  # see `scratch`
    kind = PointerType(PrimType(dtype))
    place = T.address_of(whole[beyond - 1])
    start = T.Bind(T.call_llvm_pure_intrin(kind, "llvm.ptrmask.p0.i64", place, T.int64(-LINE)))
    IRBuilder.name("start", start)
    return T.decl_buffer(tuple(shape), dtype, data=start)


def scratch(shape: Sequence[int], dtype: str = "float32") -> Expr:
    """Memory of one task, from TVM's pool: for what is too large for a stack, at some tens of nanoseconds.

    It is used through a view: TVM would otherwise cut a buffer down to what it believes is accessed, and fails at
    indices that are computed.
    """
    return view(T.alloc_buffer((math.prod(shape),), dtype), shape, dtype)


class Registers:
    """A tile of vectors that live in registers, `rows` by the given vectors, each a variable of its own."""

    def __init__(self, rows: int, vectors: Sequence[tuple[int, int]], dtype: str = "float32") -> None:
        self.rows = rows
        self.vectors = vectors
        self._dtype = dtype
        self._cells = [[local((lanes,), dtype) for _, lanes in vectors] for _ in range(rows)]

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """Every vector of the tile as (row, index of the vector, its first column, its lanes)."""
        for row in range(self.rows):
            for index, (start, lanes) in enumerate(self.vectors):
                yield row, index, start, lanes

    def get(self, row: int, index: int) -> Expr:
        return load(self._cells[row][index], 0, lanes=self.vectors[index][1])

    def part(self, row: int, index: int, lanes: int) -> Expr:
        """The first lanes of a vector."""
        return load(self._cells[row][index], 0, lanes=lanes)

    def set(self, row: int, index: int, value: Expr) -> None:
        store(self._cells[row][index], value, 0, lanes=self.vectors[index][1])

    def clear(self) -> None:
        for row, index, _, lanes in self:
            self.set(row, index, splat(tirx.const(0, self._dtype), lanes))

    def load(self, buffer: Expr, *at: Expr) -> None:
        """Take the values of a matrix, or of one of several, whose first row is the last of the indices `at`."""
        for row, index, column, lanes in self:
            self.set(row, index, load(buffer, *at[:-1], at[-1] + row, column, lanes=lanes))

    def store(self, buffer: Expr, *at: Expr) -> None:
        """Write where `load` reads."""
        for row, index, column, lanes in self:
            store(buffer, self.get(row, index), *at[:-1], at[-1] + row, column, lanes=lanes)


def let(name: str, value: Expr) -> Expr:
    """Name a value, so that it is computed once.

    Integers go through a variable of their own: TVM's simplifier copies bound integers back into every use, and the
    index arithmetic of one tile would be compiled hundreds of times.
    """
    if value.ty.dtype == "int64":
        cell = local((1,), "int64")
        IRBuilder.name(name, cell)
        T.buffer_store(cell, value, [0])
        return cell[0]
    var = T.Bind(value)
    IRBuilder.name(name, var)
    return var


def kept(value: Expr) -> Expr:
    """A number or a vector that is computed once, although it is used twice.

    TVM's simplifier copies a bound value that reads no memory back into every use: n steps that use each value twice
    become 2**n. LLVM makes a register of the memory.
    """
    dtype, _, lanes = value.ty.dtype.partition("x")
    count = int(lanes or 1)
    cell = local((count,), dtype)
    store(cell, value, 0, lanes=count)
    return T.Bind(load(cell, 0, lanes=count))


def vector_type(dtype: str, lanes: int) -> str:
    """The type of a vector, which is that of its elements where it has one."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def splat(value: Expr | float, lanes: int = LANES) -> Expr:
    """A vector of one value; a number is an f32."""
    scalar = T.float32(value) if isinstance(value, int | float) else value
    return scalar if lanes == 1 else T.broadcast(scalar, lanes)


def load(buffer: Expr, *indices: Expr, lanes: int = LANES) -> Expr:
    """`lanes` neighbours along the last axis, beginning at `indices`."""
    at = (*indices[:-1], _neighbours(indices[-1], lanes))
    return buffer[at]


def store(buffer: Expr, value: Expr, *indices: Expr, lanes: int = LANES) -> None:
    """Write `lanes` neighbours along the last axis, beginning at `indices`."""
    T.buffer_store(buffer, value, [*indices[:-1], _neighbours(indices[-1], lanes)])


def _neighbours(start: Expr, lanes: int) -> Expr:
    return start if lanes == 1 else T.ramp(start, 1, lanes)


def put(buffer: Expr, value: Expr, *indices: Expr) -> None:
    """Write one element."""
    T.buffer_store(buffer, value, list(indices))


def prefetch(buffer: Expr, index: Expr, level: int = 1) -> None:
    """Ask for the cache line of an element, in the cache of this level; one past the end is harmless."""
    place, read, locality, data = T.address_of(buffer[index]), 0, 4 - level, 1
    hint = [T.int32(value) for value in (read, locality, data)]
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", place, *hint))


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Emit the body under a run-time condition."""
    with T.If(condition), T.Then():
        yield


def either(condition: Expr, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Emit two bodies, of which one runs."""
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()


def tasks(
    count: Expr, emit: Callable[[Expr], None], *, serial_if: Expr | None = None, name: str = "task"
) -> None:
    """Run `emit(index)` for every index below `count`, over all cores.

    Neighbouring indices go to one core, and every core has as many, as long as none of them is late.

    Args:
        count: The number of tasks.
        emit: Emits the body of one.
        serial_if: A run-time condition under which one core does all: the fork and join of the thread pool cost
            some microseconds, more than a short loop takes.
        name: The loop variable's name.
    """

    def parallel() -> None:
        with T.parallel(TASKS) as part:
            begin = let("begin", T.shift_right(count * part, T.int64(_LOG_TASKS)))
            end = T.shift_right(count * (part + 1), T.int64(_LOG_TASKS))
            with T.serial(let("own", end - begin)) as own:
                emit(let(name, begin + own))

    def serial() -> None:
        with T.serial(count) as index:
            IRBuilder.name(name, index)
            emit(index)

    if serial_if is None:
        parallel()
    else:
        either(serial_if, serial, parallel)


def chunks(width: int, lanes: int = LANES) -> list[tuple[int, int]]:
    """Split `width` elements into vectors: (offset, lanes) pairs, full vectors first, then the tail."""
    full = [(start, lanes) for start in range(0, width - width % lanes, lanes)]
    return full + ([(width - width % lanes, width % lanes)] if width % lanes else [])


def sweep(width: int, visit: Callable[[Expr, int], None]) -> None:
    """Visit every vector of a row: `visit(start, lanes)` in a loop over full vectors, then once for the tail."""
    full = width // LANES
    if full:
        with T.serial(full) as i:
            visit(let("at", i * LANES), LANES)
    if width % LANES:
        visit(T.int64(full * LANES), width % LANES)


def row_sum(width: int, value: Callable[[Expr, int], Expr]) -> Expr:
    """The sum over a row of what `value(start, lanes)` gives for each of its vectors, as an f32 scalar.

    Vectors are added to one of `_SUMS` in turns, so that additions need not wait for each other.
    """
    sums = [local((LANES,)) for _ in range(_SUMS)]
    for one in sums:
        store(one, splat(0.0), 0)

    def add(one: Expr, at: Expr, lanes: int) -> None:
        store(one, load(one, 0, lanes=lanes) + value(at, lanes), 0, lanes=lanes)

    step = _SUMS * LANES
    if width // step:
        with T.serial(width // step) as turn:
            for index, one in enumerate(sums):
                add(one, let("at", turn * step + index * LANES), LANES)
    for one, (at, lanes) in zip(sums, chunks(width % step), strict=False):
        add(one, T.int64(width // step * step + at), lanes)
    first, second, third, fourth = (load(one, 0) for one in sums)
    return fold(let("total", (first + second) + (third + fourth)), lambda x, y: x + y)


def fold(vector: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """All lanes of a vector combined to one, by halves."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        halves = [T.Shuffle([vector], list(range(first, first + lanes))) for first in (0, lanes)]
        vector = kept(combine(*halves))
    return vector


def reduce_lanes(buffer: Expr, row: Sequence[Expr], combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Combine the `LANES` elements at the start of a row of `buffer` in a balanced tree."""
    places = [(*row, lane) for lane in range(LANES)]
    values = [buffer[place] for place in places]
    while len(values) > 1:
        values = [combine(values[i], values[i + 1]) for i in range(0, len(values), 2)]
    return let("reduced", values[0])
