"""The virtual machine of a compiled library, by way of TVM's C++ runtime alone: no compiler is loaded."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm import cpu, ffi
from relax_llm.errors import ArtifactError, InputError

Array = npt.NDArray[Any]

_CPU, _POOLED = 1, 2


def set_threads(count: int) -> None:
    """Use this many threads in kernels. TVM reads the number once, when the first kernel runs.

    Raises:
        InputError: Kernels have run with another number.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"The number of threads must be a positive whole number, not {count!r}.")
    if (
        count > cpu.cores()
    ):  # threads of a kernel wait for each other by spinning: more than cores wait for ever
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
    return ffi.runtime().Shape(sizes)


def pack(tensors: Sequence[Any]) -> Any:
    """Tensors as one tuple argument."""
    return ffi.runtime().convert(list(tensors))


def numpy(result: Any) -> Array:
    """A NumPy view of a TVM tensor, without a copy; the memory lives as long as the view."""
    view: Array = np.from_dlpack(result)
    return view


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
            self._module = runtime.load_module(_loadable(library))
            self._vm = self._module["vm_load_executable"]()
            self._vm["vm_initialization"](_CPU, 0, _POOLED)
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
