"""TVM's C++ runtime by way of its FFI: what calls compiled code needs no more of TVM than this.

PyTorch is kept from being imported just because it is installed, which TVM would do in two places: that takes seconds
and 200 MB, and Ctrl-C within it ends the process, as C++ code of PyTorch calls Python.
"""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from relax_llm import cpu
from relax_llm.errors import ArtifactError


@contextmanager
def without_torch() -> Iterator[None]:
    """Make PyTorch look as if it were not installed, unless somebody has imported it."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if absent:
            del sys.modules["torch"]


@lru_cache(maxsize=1)
def runtime() -> Any:
    """The module `tvm_ffi`, with the runtime library loaded. No compiler is.

    Raises:
        ArtifactError: The library is not installed.
    """
    os.environ.setdefault("TVM_NUM_THREADS", str(cpu.cores()))
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    with without_torch():
        import tvm_ffi
    library = _library("tvm_runtime")
    if library is None:
        raise ArtifactError("TVM's runtime library is not installed; `pip install apache-tvm` brings it.")
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    return tvm_ffi


@lru_cache(maxsize=1)
def load_compiler() -> None:
    """Load TVM's compiler library too, for the LLVM in it; its Python package is not imported.

    Raises:
        ArtifactError: It is not installed.
    """
    runtime()
    library = _library("tvm_compiler")
    if library is None:
        raise ArtifactError(
            "Assembly is made by the LLVM in TVM's compiler library, which is not installed; `pip install apache-tvm` "
            "brings it."
        )
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _library(name: str) -> Path | None:
    """A library of the package `tvm`."""
    spec = importlib.util.find_spec("tvm")
    for location in (spec and spec.submodule_search_locations) or ():
        for ending in ("so", "dylib"):
            library = Path(location) / "lib" / f"lib{name}.{ending}"
            if library.is_file():
                return library
    return None


def is_loaded() -> bool:
    """Whether `runtime` has been called, after which the number of threads is fixed."""
    return runtime.cache_info().currsize > 0
