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
from relax_llm.errors import ArtifactError, KernelError
from relax_llm.plan.kernel import Kernel

PREFIX = "relax_llm.python."
"""Of the global functions that compiled code calls; the kernel's symbol follows."""


@dataclass(frozen=True)
class PythonOperand:
    """One argument.

    Attributes:
        name: What it is called.
        shape: Numbers and names of sizes, as text.
        dtype: Of its elements.
        role: "input", "weight", "updated", "output", or "size" for a number.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str
    role: str

    def at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape at concrete sizes."""
        return tuple(sizes[size] if size in sizes else int(size) for size in self.shape)


@dataclass(frozen=True)
class PythonKernel:
    """What must be registered before an artifact can run.

    Attributes:
        kernel: The name of the kernel's record.
        symbol: What the compiled code calls it.
        problem: The fields of the problem.
        operands: Its arguments.
    """

    kernel: str
    symbol: str
    problem: Mapping[str, Any]
    operands: tuple[PythonOperand, ...]


_functions: dict[str, Callable[..., None]] = {}


def register(python: PythonKernel, kernel: Kernel) -> None:
    """Let compiled code call a kernel's function; a later one of the same symbol takes its place."""
    if python.symbol not in _functions:
        # What crosses compiled code comes back as the class that is registered under its name.
        ffi.runtime().register_error("KernelError", KernelError)
        # Compiled code looks a global function up once and keeps it: what may change lies behind it.
        ffi.runtime().register_global_func(
            PREFIX + python.symbol, lambda *values: _functions[python.symbol](*values), override=True
        )
    _functions[python.symbol] = caller(python, kernel)


def caller(python: PythonKernel, kernel: Kernel) -> Callable[..., None]:
    """The function of pointers, numbers and sizes that calls a kernel's function of arrays."""
    problem = SimpleNamespace(**python.problem)
    named = [size for operand in python.operands for size in operand.shape if not size.isdigit()]
    sizes = list(dict.fromkeys(named))

    def call(*values: Any) -> None:
        known = dict(zip(sizes, values[len(python.operands) :], strict=True))
        arguments: list[Any] = []
        for operand, value in zip(python.operands, values, strict=False):
            if operand.role == "size":
                arguments.append(int(value))
            else:
                writeable = operand.role in ("output", "updated")
                arguments.append(_array(value, operand.at(known), operand.dtype, writeable=writeable))
        try:
            kernel.make(problem, *arguments)
        except Exception as error:  # the function is the user's
            raise KernelError(
                f"The Python kernel {kernel.name!r} failed for {python.symbol}: {type(error).__name__}: {error}."
            ) from error

    return call


def register_given(needed: Iterable[PythonKernel], kernels: Iterable[Kernel]) -> None:
    """Register those of an artifact's kernels that are given, by name."""
    given = {kernel.name: kernel for kernel in kernels}
    for python in needed:
        if python.kernel in given:
            register(python, given[python.kernel])


def require(needed: Iterable[PythonKernel], origin: str) -> None:
    """Refuse to go on without an artifact's kernels.

    Raises:
        ArtifactError: One was never registered in this process.
    """
    for python in needed:
        if python.symbol not in _functions:
            raise ArtifactError(
                f"{origin} calls the Python kernel {python.kernel!r}, which is not in the artifact; give it by name: "
                f"relax_llm.load(..., kernels=[{python.kernel}])."
            )


def _array(pointer: Any, shape: tuple[int, ...], dtype: str, *, writeable: bool) -> npt.NDArray[Any]:
    address = pointer.value if hasattr(pointer, "value") else int(pointer)
    kind = np.dtype(dtype)
    memory = (ctypes.c_uint8 * (math.prod(shape) * kind.itemsize)).from_address(address)
    array: npt.NDArray[Any] = np.ctypeslib.as_array(memory).view(kind).reshape(shape)
    array.flags.writeable = writeable
    return array
