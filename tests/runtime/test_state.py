"""The KV cache as a thing: how it grows, is cut back, copied and counted; without a model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from relax_llm.artifact.kv_cache import CACHE_DTYPES, GRANULE, TILE, cache_tensors
from relax_llm.artifact.manifest import Cache
from relax_llm.artifact.memory import aligned
from relax_llm.errors import ContextLengthError, InputError
from relax_llm.runtime import pages as blocks
from relax_llm.runtime.state import State

CACHES = (Cache("layers.0", 2, 6), Cache("layers.1", 1, 10))
PER_TOKEN = 2 * 4 * (2 * 6 + 1 * 10)
"""Bytes of one token of one sequence: keys and values of all heads of both layers."""


def _state(batch: int = 1, context: int = 200) -> State:
    return State(CACHES, batch, context)


def _append(state: State, count: int, first: int = 0) -> None:
    """Append tokens as a runner does, and mark their place in every cache by their id."""
    argument = state.reserve(count)
    ids = np.arange(first, first + count, dtype=np.int32)
    for index, tensor in enumerate(argument):
        positions = np.arange(state.length, state.length + count)
        array = np.from_dlpack(tensor)
        for position, value in zip(positions, ids, strict=True):
            tile, lane = divmod(int(position), TILE)
            if index % 2 == 0:
                array[:, :, tile, :, lane] = value
            else:
                array[:, :, tile, lane, :] = value
    state.append(np.broadcast_to(ids, (state.batch, count)))


def _marks(state: State) -> list[list[float]]:
    """What `_append` has written, read back from every cache."""
    marks = []
    for index, tensor in enumerate(state.reserve(0)):
        array = np.from_dlpack(tensor)
        flat = array.swapaxes(3, 4) if index % 2 == 0 else array  # [batch, heads, tiles, TILE, dim]
        flat = flat.reshape(*array.shape[:2], -1, flat.shape[-1])[:, :, : state.length]
        first = flat[:1, :1, :, :1]
        np.testing.assert_array_equal(flat, np.broadcast_to(first, flat.shape))
        marks.append(first.reshape(-1).tolist())
    return marks


@pytest.mark.parametrize("format", CACHE_DTYPES)
def test_caches_have_the_shapes_and_types_of_their_format(format: str) -> None:
    layers = [replace(layer, format=format) for layer in CACHES]
    state = State(layers, 3, 256)
    expected = [
        (tensor.shape, tensor.dtype)
        for layer in layers
        for tensor in cache_tensors(format, 3, layer.kv_heads, 128 // TILE, layer.head_dim)
    ]
    caches = state.reserve(65)
    assert [(tuple(cache.shape), str(cache.dtype)) for cache in caches] == expected
    assert all(cache.data_ptr() % 64 == 0 for cache in caches)
    assert state.nbytes == sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in expected)
    grown = state.fork()
    assert grown.capacity == state.capacity


def test_it_begins_with_nothing() -> None:
    state = _state()
    assert (state.length, state.capacity, state.nbytes, state.tokens) == (0, 0, 0, [])
    assert state.token_ids.shape == (1, 0)


@pytest.mark.parametrize("batch", [1, 3])
def test_it_grows_by_blocks_and_then_twofold(batch: int) -> None:
    state = _state(batch, context=1000)
    seen = []
    for count in (1, 62, 1, 1, 63, 1, 200):
        _append(state, count, state.length)
        assert state.capacity >= state.length
        assert state.capacity % GRANULE == 0
        assert state.nbytes == batch * PER_TOKEN * state.capacity
        seen.append(state.capacity)
        assert _marks(state) == [list(range(state.length))] * 4
    assert seen == [64, 64, 64, 128, 128, 256, 512]


def test_it_never_grows_beyond_the_context() -> None:
    state = _state(context=200)
    _append(state, 129)
    assert state.capacity == 192
    _append(state, 71)
    assert state.capacity == 256
    assert state.length == 200


def test_a_first_prompt_leaves_room_for_an_answer() -> None:
    state = _state(context=100_000)
    _append(state, 1000)
    assert state.capacity == 1280


@pytest.mark.parametrize(("length", "more"), [(0, 201), (200, 1), (150, 51), (0, 2**40), (199, 2)])
def test_more_than_the_context(length: int, more: int) -> None:
    state = _state(context=200)
    if length:
        _append(state, length)
    before = (state.capacity, state.tokens)
    with pytest.raises(ContextLengthError, match=rf"{length} tokens .* {more} more .* 200 tokens") as caught:
        state.reserve(more)
    assert isinstance(caught.value, InputError)
    assert (state.capacity, state.tokens) == before


def test_growing_keeps_what_was_there() -> None:
    state = _state(batch=2, context=5000)
    for count in (3, 14, 40, 8, 100, 1000):
        _append(state, count, first=7 * count)
        marks = _marks(state)
        assert marks == [state.token_ids[0].tolist()] * 4


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 63, 64, 99, 100])
def test_truncate(length: int) -> None:
    state = _state()
    _append(state, 100)
    capacity = state.capacity
    state.truncate(length)
    assert state.length == length
    assert state.tokens == list(range(length))
    assert state.capacity == capacity, "memory that was taken is kept for what follows"
    _append(state, 20, first=500)
    expected = [*range(length), *range(500, 520)]
    assert state.tokens == expected
    assert _marks(state) == [expected] * 4


@pytest.mark.parametrize("kept", [0, 1, 15, 16, 63, 64, 99])
def test_restore_takes_back_what_was_cut_off(kept: int) -> None:
    state = _state()
    _append(state, 100)
    state.truncate(kept)
    for token_id in range(kept, 100):
        assert not state.restore([token_id + 1])
        assert state.length == token_id
        assert state.restore([token_id])
    assert not state.restore([100])
    assert _marks(state) == [list(range(100))] * 4
    state.truncate(kept)
    assert not state.restore([*range(kept, 100), 100])
    assert state.restore(range(kept, 100))
    assert state.tokens == list(range(100))


def test_restore_knows_what_was_written_over() -> None:
    state = _state()
    _append(state, 100)
    state.truncate(40)
    _append(state, 1, first=40)
    assert not state.restore([41]), "the cache was given away for 40 and all behind it"
    state.truncate(30)
    state.reserve(1)  # a call that fails: it may have written
    assert not state.restore([30])
    assert state.tokens == list(range(30))


def test_restore_where_there_is_nothing() -> None:
    state = _state(context=1000)
    assert state.restore([])
    assert not state.restore([0])
    _append(state, 100)
    state.truncate(90)
    assert not state.fork().restore([90])
    several = _state(batch=2)
    _append(several, 10)
    several.truncate(5)
    assert not several.restore([5])


@pytest.mark.parametrize("length", [-1, 11, 2**70, 2.0, 1.5, "3", None, True, np.float32(1), [1]])
def test_truncate_refuses(length: Any) -> None:
    state = _state()
    _append(state, 10)
    with pytest.raises(InputError, match="A state of 10 tokens cannot be cut back to"):
        state.truncate(length)
    assert state.tokens == list(range(10))


def test_truncate_takes_numpys_numbers() -> None:
    state = _state()
    _append(state, 10)
    state.truncate(np.int64(4))
    assert state.length == 4
    assert type(state.length) is int


@pytest.mark.parametrize("length", [0, 1, 16, 17, 64, 65, 128])
@pytest.mark.parametrize("batch", [1, 3])
def test_fork(batch: int, length: int) -> None:
    state = _state(batch, context=1000)
    if length:
        _append(state, length)
    fork = state.fork()
    assert (fork.batch, fork.length, fork.context_length) == (batch, length, 1000)
    np.testing.assert_array_equal(fork.token_ids, state.token_ids)
    _append(state, 5, first=2000)
    for count in (3, 97):  # at first into room that both have, then into room of its own
        _append(fork, count, first=3000 + fork.length - length)
        assert _marks(state) == [[*range(length), *range(2000, 2005)]] * 4
        assert state.token_ids[0].tolist() == [*range(length), *range(2000, 2005)]
    assert _marks(fork) == [[*range(length), *range(3000, 3100)]] * 4
    assert fork.token_ids[-1].tolist() == [*range(length), *range(3000, 3100)]
    fork.truncate(0)
    assert state.length == length + 5


def test_a_fork_does_not_know_what_was_cut_off() -> None:
    state = _state()
    _append(state, 100)
    state.truncate(30)
    fork = state.fork()
    assert fork.tokens == list(range(30))
    with pytest.raises(InputError):
        fork.truncate(31)
    _append(fork, 1, first=77)
    assert _marks(fork) == [[*range(30), 77]] * 4
    assert state.tokens == list(range(30))


def test_tokens_are_copies() -> None:
    state = _state()
    _append(state, 5)
    state.token_ids[:] = 9
    state.tokens.append(9)
    assert state.tokens == list(range(5))


def test_tokens_of_several_sequences() -> None:
    state = _state(batch=2)
    _append(state, 3)
    assert state.token_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    with pytest.raises(InputError, match="2 sequences; `token_ids`"):
        _ = state.tokens


def test_memory_comes_when_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing asks for memory twice over, but writes only what was used."""
    taken: list[int] = []

    def counting(shape: tuple[int, ...], dtype: str) -> Any:
        made = aligned(shape, dtype)
        taken.append(made.nbytes)
        return made

    monkeypatch.setattr(blocks, "aligned", counting)
    state = _state(context=131_072)
    assert taken == []
    _append(state, 10)
    assert sum(taken) == PER_TOKEN * GRANULE
    taken.clear()
    for _ in range(54):
        _append(state, 1)
    assert taken == [], "nothing is taken while there is room"


def test_caches_are_aligned() -> None:
    state = _state(batch=3)
    for _ in range(3):
        _append(state, 60)
        for tensor in state.reserve(0):
            assert np.from_dlpack(tensor).ctypes.data % 64 == 0


def test_of_another_model() -> None:
    state = _state()
    assert state.fits(CACHES)
    assert state.fits(list(CACHES))
    assert not state.fits(CACHES[:1])
    assert not state.fits((Cache("layers.0", 2, 8), CACHES[1]))
