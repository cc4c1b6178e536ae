"""A conversation's KV cache: plain tensors that grow on demand."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm.artifact.kv_cache import GRANULE, TILE, cache_tensors
from relax_llm.artifact.manifest import Cache
from relax_llm.artifact.memory import dtype_of
from relax_llm.errors import ContextLengthError, InputError
from relax_llm.runtime import vm
from relax_llm.runtime.pages import Pages

Array = npt.NDArray[Any]

_ROOM = 4
"""A first prompt gets a part of its length more, for what follows not to have the caches copied at once."""


class State:
    """The tokens of `batch` sequences of equal length, and their keys and values in every layer.

    Attributes:
        batch: Number of sequences.
        context_length: The most tokens it can hold.
    """

    def __init__(
        self, caches: Sequence[Cache], batch: int, context_length: int, pages: Pages | None = None
    ) -> None:
        """Make an empty state; memory is taken when tokens come.

        Args:
            caches: Of the model.
            batch: Number of sequences.
            context_length: The most tokens it can hold.
            pages: Where memory comes from.
        """
        self._pages = pages or Pages()
        self.batch = batch
        self.context_length = context_length
        self._layers = tuple(caches)
        self._arrays: list[Array] = []
        self._argument: Any = None
        self._capacity = 0
        self._ids = np.empty((batch, 0), np.int32)
        self._one = np.zeros((1, 1), np.int32)
        self._one_argument: Any = None
        self._length = 0
        self._written = 0  # so many tokens of _ids have their keys and values in the cache, cut off or not

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    @property
    def capacity(self) -> int:
        """Tokens that memory has been taken for."""
        return self._capacity

    @property
    def tokens(self) -> list[int]:
        """The tokens in the cache, for batch 1."""
        if self.batch != 1:
            raise InputError(
                f"This state has {self.batch} sequences; `token_ids` has the tokens of all of them."
            )
        tokens: list[int] = self._ids[0, : self._length].tolist()
        return tokens

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """The tokens in the cache: [batch, length]."""
        ids: npt.NDArray[np.int32] = self._ids[:, : self._length].copy()
        return ids

    @property
    def nbytes(self) -> int:
        """Memory of the cache in bytes."""
        return sum(array.nbytes for array in self._arrays)

    def fits(self, caches: Sequence[Cache]) -> bool:
        """Whether it has the layers of a model with these caches."""
        return self._layers == tuple(caches)

    def truncate(self, length: int) -> None:
        """Cut the cache back to its first `length` tokens.

        Raises:
            InputError: There are not that many.
        """
        whole = isinstance(length, int | np.integer) and not isinstance(length, bool)
        if not whole or not 0 <= length <= self._length:
            raise InputError(f"A state of {self._length} tokens cannot be cut back to {length!r}.")
        self._length = int(length)

    def restore(self, token_ids: Sequence[int]) -> bool:
        """Take tokens back that `truncate` cut off, where the cache still has their keys and values.

        Args:
            token_ids: For batch 1: the first of those that were cut off.

        Returns:
            Whether it had them; where not, nothing has changed.
        """
        end = self._length + len(token_ids)
        kept = self.batch == 1 and end <= self._written
        if not kept or not np.array_equal(self._ids[0, self._length : end], token_ids):
            return False
        self._length = end
        return True

    def fork(self) -> "State":
        """A copy that goes its own way; the original stays as it is."""
        copy = State(self._layers, self.batch, self.context_length, self._pages)
        if self._capacity:
            copy._grow(self._capacity)
        for source, target in zip(self._arrays, copy._arrays, strict=True):
            used = -(-self._length // TILE)
            target[:, :, :used] = source[:, :, :used]
        copy._ids = self._ids.copy()
        copy._length = copy._written = self._length
        return copy

    def reserve(self, count: int) -> Any:
        """Make room for `count` more tokens.

        Returns:
            The caches as an argument of the compiled functions.

        Raises:
            ContextLengthError: They do not fit the model's context.
        """
        needed = self._length + count
        if needed > self.context_length:
            raise ContextLengthError(
                f"{self._length} tokens are in the cache and {count} more would exceed the model's context of "
                f"{self.context_length} tokens; shorten the prompt, or cut the state back with truncate."
            )
        self._written = self._length  # what comes next overwrites the rest, even if it fails
        if needed > self._capacity:
            limit = -(-self.context_length // GRANULE) * GRANULE
            room = 2 * self._capacity or needed + needed // _ROOM  # a prompt is followed by an answer
            self._grow(min(-(-max(needed, room) // GRANULE) * GRANULE, limit))
        return self._argument

    def one(self, token_id: int) -> npt.NDArray[np.int32]:
        """A token as [1, 1], in memory that is used again: NumPy's first steps are slow beside reading an element."""
        self._one[0, 0] = token_id
        return self._one

    def argument(self, ids: npt.NDArray[np.int32]) -> Any:
        """Token ids as an argument of the compiled functions."""
        if ids is not self._one:
            return vm.tensor(ids)
        if self._one_argument is None:
            self._one_argument = vm.tensor(ids)
        return self._one_argument

    def append(self, ids: npt.NDArray[np.int32]) -> None:
        """Record tokens whose keys and values are now in the cache: [batch, count]."""
        end = self._length + ids.shape[1]
        if end > self._ids.shape[1]:
            grown = np.empty((self.batch, max(end, self._capacity)), np.int32)
            grown[:, : self._length] = self._ids[:, : self._length]
            self._ids = grown
        self._ids[:, self._length : end] = ids
        self._length = self._written = end

    def _grow(self, capacity: int) -> None:
        used = -(-self._length // TILE)
        places = _places(self._layers, self.batch, capacity // TILE)
        memory = self._pages.take(places[-1][1] if places else 0)  # of all layers, for large pages
        arrays = [memory[start:end].view(kind).reshape(shape) for start, end, kind, shape in places]
        for grown, old in zip(arrays, self._arrays, strict=False):
            grown[:, :, :used] = old[:, :, :used]
        self._arrays, self._capacity = arrays, capacity
        self._argument = vm.pack([vm.tensor(array) for array in arrays])


@lru_cache(maxsize=16)  # states of one model after the other have the same
def _places(
    layers: tuple[Cache, ...], batch: int, tiles: int
) -> tuple[tuple[int, int, np.dtype[Any], tuple[int, ...]], ...]:
    """Where the caches of all layers lie in one block of memory: (first byte, end, type, shape) of each tensor."""
    kinds = [
        (dtype_of(tensor.dtype), tensor.shape)
        for layer in layers
        for tensor in cache_tensors(layer.format, batch, layer.kv_heads, tiles, layer.head_dim)
    ]
    ends = accumulate((math.prod(shape) * kind.itemsize for kind, shape in kinds), initial=0)
    return tuple(
        (start, end, kind, shape) for (start, end), (kind, shape) in zip(pairwise(ends), kinds, strict=True)
    )
