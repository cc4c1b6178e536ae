"""The virtual machine of a compiled library, by way of TVM's C++ runtime alone: no compiler is loaded."""

import ctypes
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from relax_llm import cpu, ffi
from relax_llm.errors import ArtifactError, InputError
from relax_llm.runtime import program_bytes
from relax_llm.runtime.program import Program

Array = npt.NDArray[Any]
T = TypeVar("T")

_CPU, _POOLED = 1, 2


def set_threads(count: int) -> None:
    """Use this many threads in kernels. A library reads the number once, when its first kernel runs.

    Raises:
        InputError: Kernels have run with another number.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"The number of threads must be a positive whole number, not {count!r}.")
    if count > cpu.cores():  # they would wait for each other
        raise InputError(f"{count} threads are more than the {cpu.cores()} cores of this process.")
    if ffi.is_loaded() and os.environ.get("TVM_NUM_THREADS") != str(count):
        raise InputError(
            f"This process already uses {os.environ.get('TVM_NUM_THREADS')} threads; "
            "set the number before the first Runner."
        )
    os.environ["TVM_NUM_THREADS"] = str(count)


def tensor(array: Array) -> Any:
    """A TVM view of NumPy memory, without a copy."""
    return ffi.runtime().from_dlpack(array)


def shape(*sizes: int) -> Any:
    """A TVM shape."""
    return _shape()(*sizes)


@lru_cache(maxsize=1)
def _shape() -> Callable[..., Any]:
    """What makes a shape of numbers; the class in TVM's Python looks at each of them first."""
    made: Callable[..., Any] = ffi.runtime().get_global_func("ffi.Shape")
    return made


def pack(tensors: Sequence[Any]) -> Any:
    """Tensors as one tuple argument."""
    return ffi.runtime().convert(list(tensors))


def numpy(result: Any) -> Array:
    """A NumPy view of a TVM tensor, without a copy; the memory lives as long as the view."""
    view: Array = np.from_dlpack(result)
    return view


def item(tensor: Any, index: int, kind: "type[ctypes._SimpleCData[T]]") -> T:
    """One element of a TVM tensor's memory: that at an index of all its elements, row by row.

    A view for NumPy takes ten times as long, where the caches hold weights and not the interpreter.
    """
    return kind.from_address(tensor.data_ptr() + index * ctypes.sizeof(kind)).value


class _Memory:
    """Memory of a TVM tensor as NumPy asks for it: an array over it may be written, in every version of NumPy."""

    def __init__(self, tensor: Any, kind: np.dtype[Any]) -> None:
        self.tensor = tensor  # the memory lives as long as this
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "typestr": kind.str,
        }


def view(tensor: Any) -> Array:
    """A NumPy array over a TVM tensor's memory, to read and to write; bfloat16 comes as `ml_dtypes` has it."""
    name = str(tensor.dtype)
    if name == "bfloat16":
        import ml_dtypes

        return np.asarray(_Memory(tensor, np.dtype(np.uint16))).view(ml_dtypes.bfloat16)
    return np.asarray(_Memory(tensor, np.dtype(name)))


_loaded: dict[Path, list[tuple[int, ...]]] = {}


def _loadable(library: Path) -> str:
    """A path under which the system loads what lies there now.

    A library stays loaded, and is known by its path: an artifact that is compiled anew in the same place would get
    the code of the one before. Each further file at a path is therefore spelled in another way.
    """
    path = library.resolve()
    status = path.stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    known = _loaded.setdefault(path, [])
    if identity not in known:
        known.append(identity)
    return f"{path.parent}/{'./' * known.index(identity)}{path.name}"


class VirtualMachine:
    """A library's functions, ready to call."""

    def __init__(self, library: Path) -> None:
        """Load a library.

        Raises:
            ArtifactError: It cannot be loaded.
        """
        runtime = ffi.runtime()
        self._library = library
        try:
            self._module: Any = runtime.load_module(_loadable(library))
            self._vm: Any = _started(self._module)
        except (RuntimeError, OSError, AttributeError) as error:
            raise ArtifactError(f"{library} cannot be loaded: {error}") from error

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """The function of this name.

        Raises:
            ArtifactError: There is none.
        """
        try:
            function: Callable[..., Any] = self._vm[name]
        except AttributeError as error:
            raise ArtifactError(
                f"{self._library} has no function {name!r}; compile the artifact again."
            ) from error
        return function

    @cached_property
    def program(self) -> Program:
        """What it executes.

        Raises:
            ArtifactError: It is of another version.
        """
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "program"
            self._module.write_to_file(str(file))  # the runtime offers the bytes in no other way
            return program_bytes.read(file.read_bytes())

    def executing(self, program: Program) -> "VirtualMachine":
        """A second machine over the same code in memory, that executes another program.

        Both may be used, one after the other, on the same tensors.

        Args:
            program: This machine's, changed.

        Raises:
            ArtifactError: It calls a function that neither the library nor TVM's runtime has.
        """
        load = ffi.runtime().get_global_func("ffi.Module.load_from_bytes.relax.VMExecutable")
        other = VirtualMachine.__new__(VirtualMachine)
        other._library = self._library
        try:
            other._module = load(program_bytes.write(program))
            for library in self._module.imports:
                other._module.import_module(library)
            other._vm = _started(other._module)
            other.program = program
        except (RuntimeError, AttributeError) as error:
            raise ArtifactError(f"{self._library} cannot execute the changed program: {error}") from error
        return other

    def has_kernel(self, symbol: str) -> bool:
        """Whether the library has a kernel of this name."""
        return any(library.implements_function(symbol) for library in self._module.imports)

    def kernel(self, symbol: str) -> Callable[..., Any]:
        """A compiled kernel of the library, on its own: it takes tensors and sizes, outputs last.

        Raises:
            ArtifactError: There is none.
        """
        for library in self._module.imports:
            if library.implements_function(symbol):
                function: Callable[..., Any] = library[symbol]
                return function
        raise ArtifactError(f"{self._library} has no kernel {symbol!r}; compile the artifact again.")


def _started(module: Any) -> Any:
    machine = module["vm_load_executable"]()
    machine["vm_initialization"](_CPU, 0, _POOLED)
    return machine
