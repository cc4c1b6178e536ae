"""Kernels written in Python: compiled code calls back with pointers, and they compute on NumPy arrays over these."""

import ctypes
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm import ffi
from relax_llm.errors import ArtifactError
from relax_llm.plan.kernel import Kernel

PREFIX = "relax_llm.python."
"""Of the global functions that compiled code calls; the kernel's symbol follows."""


@dataclass(frozen=True)
class PythonKernel:
    """What must be registered before an artifact can run.

    Attributes:
        kernel: The name of the kernel's record.
        symbol: What the compiled code calls it.
        problem: The fields of the problem.
        operands: Name, shape (numbers and names of sizes), dtype and role of each argument.
    """

    kernel: str
    symbol: str
    problem: Mapping[str, Any]
    operands: tuple[tuple[str, tuple[int | str, ...], str, str], ...]


_functions: dict[str, Callable[..., None]] = {}


def register(python: PythonKernel, kernel: Kernel) -> None:
    """Let compiled code call a kernel's function; a later one of the same symbol takes its place."""
    if python.symbol not in _functions:
        # Compiled code looks a global function up once and keeps it: what may change lies behind it.
        ffi.runtime().register_global_func(
            PREFIX + python.symbol, lambda *values: _functions[python.symbol](*values), override=True
        )
    _functions[python.symbol] = caller(python, kernel)


def caller(python: PythonKernel, kernel: Kernel) -> Callable[..., None]:
    """The function of pointers, numbers and sizes that calls a kernel's function of arrays."""
    problem = SimpleNamespace(**python.problem)
    sizes = list(
        dict.fromkeys(size for _, shape, _, _ in python.operands for size in shape if isinstance(size, str))
    )

    def call(*values: Any) -> None:
        known = dict(zip(sizes, values[len(python.operands) :], strict=True))
        arguments: list[Any] = []
        for (_, shape, dtype, role), value in zip(python.operands, values, strict=False):
            if role == "size":
                arguments.append(int(value))
            else:
                concrete = tuple(known[size] if isinstance(size, str) else size for size in shape)
                arguments.append(_array(value, concrete, dtype, writeable=role in ("output", "updated")))
        kernel.make(problem, *arguments)

    return call


def register_all(needed: Iterable[PythonKernel], kernels: Iterable[Kernel], origin: str) -> None:
    """Register what an artifact needs.

    Raises:
        ArtifactError: A kernel is neither given nor registered in this process.
    """
    given = {kernel.name: kernel for kernel in kernels}
    for python in needed:
        if python.kernel in given:
            register(python, given[python.kernel])
        elif python.symbol not in _functions:
            raise ArtifactError(
                f"{origin} calls the Python kernel {python.kernel!r}, which is not in the artifact; pass it: "
                f"relax_llm.load(..., kernels=[{python.kernel}])."
            )


def _array(pointer: Any, shape: tuple[int, ...], dtype: str, *, writeable: bool) -> npt.NDArray[Any]:
    address = pointer.value if hasattr(pointer, "value") else int(pointer)
    kind = np.dtype(dtype)
    memory = (ctypes.c_char * (math.prod(shape) * kind.itemsize)).from_address(address)
    array: npt.NDArray[Any] = np.ndarray(shape, kind, memory)
    array.flags.writeable = writeable
    return array
