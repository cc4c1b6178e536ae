"""Memory to measure in: weights that come from where they come from in the model, and activations."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 64
_MOST = 2**30
_COPIES = 1024
_PATTERN = 2**18

Array = npt.NDArray[Any]

Kind = tuple[tuple[int, ...], str]
"""A tensor's shape and dtype."""


def available() -> int:
    """Bytes that may be taken: half of what the operating system says is free, a gigabyte at most."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return _MOST
    return min(free // 2, _MOST)


class Memory:
    """An arena of some bytes, filled with ordinary numbers, of which tensors are views.

    A model reads each layer's weight once for a token, and all others before it reads it again. So copies of a weight
    are laid out over as many bytes as the model has weights, and read in turn: they come from memory or from a cache
    just as they do in the model, whatever the processor's caches are.
    """

    def __init__(self, size: int) -> None:
        """Allocate.

        Args:
            size: Bytes.
        """
        self._bytes = _aligned(size)
        bits = np.random.default_rng(0).uniform(0.01, 0.02, _PATTERN).astype(np.float32).view(np.uint32)
        pattern = (bits & 0xFFFF0000 | bits >> 16).view(np.uint8)  # ordinary numbers as bf16, too
        for start in range(0, len(self._bytes), len(pattern)):
            part = self._bytes[start : start + len(pattern)]
            part[:] = pattern[: len(part)]

    @property
    def size(self) -> int:
        """Bytes of the arena."""
        return len(self._bytes)

    def copies(self, shape: Sequence[int], dtype: str) -> list[Array]:
        """Tensors of a shape, side by side, as many as fit; at least one must.

        More than some number are spread out instead: each costs a little to make.
        """
        size = _size(shape, dtype)
        stride = _padded(size)
        count = max(1, len(self._bytes) // stride)
        if count > _COPIES:
            count = _COPIES
            stride = len(self._bytes) // count // _ALIGNMENT * _ALIGNMENT
        return [
            self._bytes[index * stride : index * stride + size].view(dtype).reshape(shape)
            for index in range(count)
        ]

    def together(self, wanted: Mapping[str, Kind]) -> dict[str, Array]:
        """Tensors one behind the other."""
        start, made = 0, {}
        for name, (shape, dtype) in wanted.items():
            size = _size(shape, dtype)
            made[name] = self._bytes[start : start + size].view(dtype).reshape(shape)
            start += _padded(size)
        return made

    @staticmethod
    def needed(wanted: Mapping[str, Kind]) -> int:
        """Bytes that `together` takes."""
        return sum(_padded(_size(shape, dtype)) for shape, dtype in wanted.values())


def _size(shape: Sequence[int], dtype: str) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _padded(size: int) -> int:
    return -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT


def _aligned(size: int) -> Array:
    """Bytes that begin where TVM's generated code may assume that a tensor does."""
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size]
