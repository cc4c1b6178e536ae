"""TVM's C++ runtime by way of its FFI: what calls compiled code needs no more of TVM than this."""

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
def runtime() -> Any:
    """The module `tvm_ffi`, with the runtime library loaded. No compiler is.

    Raises:
        ArtifactError: The library is not installed.
    """
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


def is_loaded() -> bool:
    """Whether `runtime` has been called, after which the number of threads is fixed."""
    return runtime.cache_info().currsize > 0
