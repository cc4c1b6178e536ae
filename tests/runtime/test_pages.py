"""Memory that is used again: only when nobody has a view of it, and never kept without end."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from relax_llm.artifact.manifest import Cache
from relax_llm.runtime.pages import Pages
from relax_llm.runtime.state import State

CACHES = (Cache("layers.0", 2, 6), Cache("layers.1", 1, 10, "bf16"))


def _address(array: Any) -> int:
    return int(array.ctypes.data)


@pytest.mark.parametrize("count", [64, 2**20, 2**21 + 64, 2**23])
def test_what_nobody_looks_at_is_used_again(count: int) -> None:
    pages = Pages()
    first = pages.take(count)
    assert len(first) == count
    assert _address(first) % 64 == 0
    place = _address(first)
    second = pages.take(count)
    assert _address(second) != place
    first[...] = 7
    del first
    again = pages.take(count)
    assert _address(again) == place
    assert not again.any()
    assert pages.nbytes == 2 * count


@pytest.mark.parametrize("count", [2**20, 2**23])
def test_any_view_holds_it(count: int) -> None:
    """However far it is from what was taken: another type and shape, a part, what DLPack gave away."""
    pages = Pages()
    memory = pages.take(count)
    place = _address(memory)
    views: list[Any] = [
        memory.view(np.float32).reshape(-1, 16)[3:5],
        np.from_dlpack(memory[64:128]),
        memory.data[5:9],
    ]
    del memory
    while views:
        assert _address(pages.take(count)) != place
        views.pop()
        gc.collect()
    assert _address(pages.take(count)) == place


def test_sizes() -> None:
    """A block is not used for less than half of it; of those that are free only a few are kept."""
    pages = Pages()
    places = {_address(pages.take(count)) for count in (2**20,)}
    assert _address(pages.take(2**19)) in places
    assert pages.nbytes == 2**20
    pages.take(2**19 - 64)
    for power in range(10, 19):
        pages.take(2**power)
    assert pages.nbytes <= 2**20 + 2**19 + 2**18
    held = [pages.take(2**22) for _ in range(5)]
    assert len({_address(block) for block in held}) == 5


def test_states_give_back_what_they_had() -> None:
    pages = Pages()

    def begin() -> State:
        state = State(CACHES, 1, 4096, pages)
        for _ in range(20):
            state.reserve(50)
            state.append(np.zeros((1, 50), np.int32))
        return state

    state = begin()
    caches, whole = list(state.reserve(0)), pages.nbytes
    del state
    gc.collect()
    assert begin().nbytes <= pages.nbytes
    grown = pages.nbytes
    assert grown > whole, "somebody still had its caches"
    del caches
    gc.collect()
    for _ in range(5):
        begin()
    assert pages.nbytes <= grown


def test_a_copy_is_a_copy() -> None:
    state = State(CACHES, 1, 4096, Pages())
    arrays = [np.from_dlpack(cache) for cache in state.reserve(10)]
    for array in arrays:
        array[...] = 7
    state.append(np.zeros((1, 10), np.int32))
    copy = state.fork()
    for array in arrays:
        array[...] = 1
    assert all((np.from_dlpack(cache)[:, :, :1] == 7).all() for cache in copy.reserve(0))
