"""Memory for tensors: aligned, zeroed, and in large pages where it is large."""

import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ALIGNMENT = 64
"""Bytes; what the compiled kernels may assume of every tensor's address."""

LARGE_PAGE = 2**21
"""Bytes of a page that a core looks up once, where small ones have 4 KB."""


def dtype_of(name: str) -> np.dtype[Any]:
    """NumPy's type of this name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def aligned(shape: Sequence[int], dtype: str = "float32") -> Array:
    """New zeroed memory at an aligned address; the operating system provides pages when they are first written."""
    kind = dtype_of(dtype)
    count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    if count >= LARGE_PAGE:
        return large_pages(count).view(kind).reshape(shape)
    memory = np.zeros(count + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + count].view(kind).reshape(shape)


def large_pages(count: int) -> Array:
    """New zeroed memory: uint8 [count], in pages of 2 MB where the system has some."""
    memory = mmap.mmap(-1, count + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    want_large_pages(memory)
    array = np.frombuffer(memory, np.uint8)
    start = -array.ctypes.data % LARGE_PAGE
    return array[start : start + count]


def want_large_pages(memory: mmap.mmap) -> None:
    """Tell the system that large pages are welcome here."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
