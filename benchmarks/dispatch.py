"""What a dispatcher adds to a call of a kernel."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tvm import ir
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm import ffi
from relax_llm.kernels import builder as b
from relax_llm.kernels.dispatch import Branch, dispatcher, internal
from relax_llm.kernels.generate import generate
from relax_llm.kernels.machine import machine
from relax_llm.kernels.matmul import Matmul
from relax_llm.kernels.operators import operator_of
from relax_llm.kernels.threads import link
from relax_llm.plan.plan import Range
from relax_llm.plan.sizes import Box

_LASTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, None)
_CALLS = 1000
_PROBLEM = Matmul(16, 4)


class DispatchCost:
    """A dispatcher over twelve ranges, each with a kernel that writes one number, and these kernels by themselves."""

    def __init__(self) -> None:
        """Compile."""
        functions: dict[ir.GlobalVar, PrimFunc] = {}
        operands = operator_of(_PROBLEM).operands(_PROBLEM, None)
        branches, ranges, first = [], [], 1
        for index, last in enumerate(_LASTS):
            kernel = _kernel(f"kernel{index}", float(index))
            functions[ir.GlobalVar(f"kernel{index}")] = kernel
            variable, inner, sizes = internal(kernel, operands, f"internal{index}")
            functions[variable] = inner.without_attr("global_symbol")
            branches.append(Branch(str(index), _PROBLEM, operands, sizes, variable))
            ranges.append(Range(Box.of(M=(first, last)), str(index)))
            first = (last or 0) + 1
        functions[ir.GlobalVar("dispatcher")] = dispatcher(_PROBLEM, None, branches, ranges, "dispatcher")
        self._ranges = ranges
        self._directory = tempfile.TemporaryDirectory()
        path = Path(self._directory.name) / "dispatch.so"
        link(generate(functions, machine()), path)
        self._library = ffi.runtime().load_module(str(path))

    def nanoseconds(self, rows: int, rounds: int = 300) -> float:
        """What a call of the dispatcher takes more than one of its kernel: the median of rounds in turns.

        Args:
            rows: M; the more ranges lie below it, the more comparisons there are.
            rounds: How many.
        """
        serving = next(index for index, part in enumerate(self._ranges) if {"M": rows} in part.sizes)
        tensor = ffi.runtime().from_dlpack
        x, weight, out = (np.zeros(shape, np.float32) for shape in ((rows, 4), (16, 4), (rows, 16)))
        flat = [tensor(array) for array in (x, weight, out)]
        outer = [tensor(array) for array in (x[None], weight, out[None])]
        dispatched, direct = self._library["dispatcher"], self._library[f"kernel{serving}"]
        dispatched(*outer)
        if out[0, 0] != serving:
            raise SystemExit(f"The dispatcher called kernel {out[0, 0]:g} at M={rows}, not {serving}.")
        found = []
        for _ in range(rounds):
            one, two = _seconds(dispatched, outer), _seconds(direct, flat)
            three, four = _seconds(direct, flat), _seconds(dispatched, outer)
            found.append(1e9 * (one + four - two - three) / 2)
        return median(found)


def _kernel(name: str, mark: float) -> PrimFunc:
    def emit() -> None:
        rows = b.size("M")
        b.argument("x", (rows, _PROBLEM.k))
        b.argument("weight", (_PROBLEM.n, _PROBLEM.k))
        b.put(b.argument("out", (rows, _PROBLEM.n)), T.float32(mark), 0, 0)

    return b.prim_func(name, emit)


def _seconds(function: Callable[..., None], arguments: list[Any]) -> float:
    began = time.perf_counter()
    for _ in range(_CALLS):
        function(*arguments)
    return (time.perf_counter() - began) / _CALLS
