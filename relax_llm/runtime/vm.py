"""The virtual machine of a compiled library, by way of TVM's C++ runtime alone: no compiler is loaded."""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm import cpu
from relax_llm.errors import ArtifactError, InputError

Array = npt.NDArray[Any]

_CPU, _POOLED = 1, 2


@contextmanager
def _without_torch() -> Iterator[None]:
    """Keep TVM's FFI from importing PyTorch just because it is installed: that takes a second and 200 MB."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if absent:
            del sys.modules["torch"]


@lru_cache(maxsize=1)
def _ffi() -> Any:
    """TVM's FFI with the runtime library loaded."""
    os.environ.setdefault("TVM_NUM_THREADS", str(cpu.cores()))
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    with _without_torch():
        import tvm_ffi
    spec = importlib.util.find_spec("tvm")
    for location in (spec and spec.submodule_search_locations) or ():
        for name in ("libtvm_runtime.so", "libtvm_runtime.dylib"):
            library = Path(location) / "lib" / name
            if library.is_file():
                ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
                return tvm_ffi
    raise ArtifactError("TVM's runtime library is not installed; `pip install apache-tvm` brings it.")


def set_threads(count: int) -> None:
    """Use this many threads in kernels. TVM reads the number once, when the first kernel runs.

    Raises:
        InputError: Kernels have run with another number.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"The number of threads must be a positive whole number, not {count!r}.")
    if _ffi.cache_info().currsize and os.environ.get("TVM_NUM_THREADS") != str(count):
        raise InputError(
            f"This process already uses {os.environ.get('TVM_NUM_THREADS')} threads; "
            "set the number before the first Runner."
        )
    os.environ["TVM_NUM_THREADS"] = str(count)


def tensor(array: Array) -> Any:
    """A TVM view of NumPy memory, without a copy."""
    return _ffi().from_dlpack(array)


def shape(*sizes: int) -> Any:
    """A TVM shape."""
    return _ffi().Shape(sizes)


def pack(tensors: Sequence[Any]) -> Any:
    """Tensors as one tuple argument."""
    return _ffi().convert(list(tensors))


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
        ffi = _ffi()
        self._library = library
        try:
            self._module = ffi.load_module(_loadable(library))
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
