"""Memory of caches, used again when nobody looks at it any more: new pages cost a prompt up to 5 % of its time."""

import sys
from threading import Lock
from typing import Any

import numpy.typing as npt

from relax_llm.artifact.memory import aligned

Array = npt.NDArray[Any]

_KEPT = 2
"""Blocks that wait for another use, at most."""


class _Block:
    """Aligned memory, and what all views of it refer to."""

    def __init__(self, count: int) -> None:
        self.memory = aligned((count,), "uint8")
        self.root: Any = self.memory.base  # NumPy has views of a view refer to what that is a view of

    @property
    def views(self) -> int:
        """How many refer to it, this block and the count itself among them."""
        return sys.getrefcount(self.root)


_UNUSED = _Block(1).views


class Pages:
    """Blocks of memory for the states of one runner.

    A block is free when no array is a view of it.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._blocks: list[_Block] = []
        self._taking = Lock()

    def take(self, count: int) -> Array:
        """Memory that nobody else uses, all zeros: uint8 [count], at an aligned address."""
        with self._taking:
            free = [block for block in self._blocks if block.views <= _UNUSED]
            fitting = [block for block in free if count <= len(block.memory) <= 2 * count]
            if fitting:
                used = min(fitting, key=lambda block: len(block.memory)).memory[:count]
                used.fill(0)
                return used
            kept = sorted(free, key=lambda block: len(block.memory))[len(free) - _KEPT + 1 :]
            self._blocks = [block for block in self._blocks if block in kept or block not in free]
            self._blocks.append(_Block(count))
            return self._blocks[-1].memory[:]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, used or not."""
        return sum(len(block.memory) for block in self._blocks)
