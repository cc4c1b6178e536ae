"""Attention over the cache: every border of tiles, blocks, windows and row tiles, and scores of any size."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from tvm.tirx.script.builder import ir as T

from relax_llm.artifact.kv_cache import CACHE_DTYPES, GRANULE, TILE, decode, encode
from relax_llm.kernels import builder as b
from relax_llm.kernels.attention import Attention
from relax_llm.kernels.attention.operands import Operands
from relax_llm.kernels.attention.tile import BLOCK
from relax_llm.kernels.generate import generate
from relax_llm.kernels.intrinsics import BF16, INT8
from relax_llm.kernels.library import build
from relax_llm.kernels.machine import machine
from relax_llm.kernels.threads import load

from ..tolerances import EXP, assert_within, reduction
from .bench import HOST, every_machine, in_turns, launch, launch_function, machine_of, machines, random
from .guarded import SENTINEL, Out

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

BORDERS = (
    (1, 1),
    (2, 2),
    (15, 15),
    (16, 16),
    (17, 17),
    (63, 63),
    (64, 64),
    (65, 65),
    (128, 128),
    (129, 129),
    (257, 257),
)
"""(seq, kv_len): prompts around the borders of a tile (16), a granule of the cache (64) and a block (128)."""
LATER = (
    (1, 2),
    (1, 16),
    (1, 17),
    (1, 64),
    (1, 65),
    (1, 127),
    (1, 128),
    (1, 129),
    (1, 257),
    (1, 300),
    (7, 70),
    (64, 128),
    (65, 131),
    (5, 66),
    (4, 258),
)
"""Decodes and later chunks."""


def _layout(cache: str, keys: Array, values: Array, tiles: int) -> dict[str, Array]:
    """[batch, kv_len, kv_heads, head_dim] -> the tensors of the cache; what lies behind kv_len is NaN."""
    batch, kv_len, kv_heads, dim = keys.shape
    padded = np.full((2, batch, tiles * TILE, kv_heads, dim), SENTINEL, np.uint32).view(np.float32)
    padded[0, :, :kv_len], padded[1, :, :kv_len] = keys, values
    return encode(cache, padded[0], padded[1])


def _reference(problem: Attention, q: Array, keys: Array, values: Array) -> tuple[Array, Array]:
    """Softmax attention in float64, and how far each element may be missed; keys and values as the cache has them."""
    tiles = -(-keys.shape[1] // TILE)
    kept = decode(problem.cache, _layout(problem.cache, keys, values, tiles), problem.head_dim)
    keys, values = (x[:, : keys.shape[1]] for x in kept)
    batch, seq, heads, dim = q.shape
    kv_len, group = keys.shape[1], heads // problem.kv_heads
    q, keys, values = (x.astype(np.float64) for x in (q, keys, values))
    keys, values = np.repeat(keys, group, axis=2), np.repeat(values, group, axis=2)
    scores = problem.scale * np.einsum("bshd,bthd->bhst", q, keys)
    scale = abs(problem.scale) * np.einsum("bshd,bthd->bhst", np.abs(q), np.abs(keys))
    query, position = np.arange(kv_len - seq, kv_len)[:, None], np.arange(kv_len)[None]
    visible = position <= query
    if problem.window is not None:
        visible &= position > query - problem.window
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bhst,bthd->bshd", weights, values)
    # A score that is missed by e makes its weight wrong by a factor e**e, and all others through their sum. Scores far
    # below the maximum weigh nothing, so theirs do not count; each block may rescale what came before it.
    heavy = np.where(visible & (weights > 1e-12), scale, 0.0).max(axis=-1)  # [batch, heads, seq]
    rounded = 0.0 if problem.cache == "f32" else 2.0**-8  # queries, and weights
    missed = np.expm1(2 * (reduction("float32", dim) + rounded) * heavy)
    relative = missed + EXP * (2 + math.sqrt(kv_len / GRANULE)) + reduction("float32", kv_len) + rounded
    magnitude = np.einsum("bhst,bthd->bshd", weights, np.abs(values))
    allowed = magnitude * relative.transpose(0, 2, 1)[..., None] + 1e-30
    return out.reshape(batch, seq, heads * dim), allowed.reshape(batch, seq, heads * dim)


def _run(problem: Attention, on: str, q: Array, keys: Array, values: Array, spare: int = 0) -> Array:
    tiles = (-(-keys.shape[1] // GRANULE) + spare) * GRANULE // TILE
    cache = _layout(problem.cache, keys, values, tiles).values()
    shape = (*q.shape[:2], q.shape[2] * q.shape[3])
    (out,) = launch(problem, on, q, *cache, keys.shape[1], Out(shape))
    return out


def _operands(problem: Attention, batch: int, seq: int, kv_len: int) -> tuple[Array, Array, Array]:
    q = random(batch, seq, problem.heads, problem.head_dim)
    keys = random(batch, kv_len, problem.kv_heads, problem.head_dim, seed=1)
    return q, keys, random(batch, kv_len, problem.kv_heads, problem.head_dim, seed=2)


def _check(problem: Attention, on: str, batch: int, seq: int, kv_len: int, spare: int = 0) -> None:
    q, keys, values = _operands(problem, batch, seq, kv_len)
    out = _run(problem, on, q, keys, values, spare)
    reference, allowed = _reference(problem, q, keys, values)
    assert_within(out, reference, allowed, f"{problem.name}, batch {batch}, {seq} up to {kv_len}")


def _problem(
    heads: tuple[int, int], head_dim: int, window: int | None = None, cache: str = "f32"
) -> Attention:
    return Attention(*heads, head_dim, head_dim**-0.5, window, cache)


caches = pytest.mark.parametrize("cache", CACHE_DTYPES)


@machines
@pytest.mark.parametrize(
    ("heads", "kv_heads", "batch"), [(1, 1, 1), (3, 1, 1), (9, 3, 1), (9, 3, 3), (8, 1, 1), (32, 4, 1)]
)
def test_lengths(on: str, heads: int, kv_heads: int, batch: int) -> None:
    for seq, kv_len in (*BORDERS, *LATER):
        _check(_problem((heads, kv_heads), 10), on, batch, seq, kv_len, spare=kv_len % 2)


@pytest.mark.parametrize(("on", "head_dim"), in_turns((dim,) for dim in (2, 16, 20, 64, 80, 128)))
def test_head_dims(on: str, head_dim: int) -> None:
    for seq, kv_len in ((1, 1), (1, 65), (17, 17), (20, 90)):
        _check(_problem((6, 2), head_dim), on, 2, seq, kv_len)


SMALLER = [((9, 3), 64, None), ((3, 1), 7, None), ((1, 1), 1, None), ((6, 2), 40, 65), ((8, 2), 33, 5)]


@pytest.mark.parametrize(
    ("on", "heads", "head_dim", "window", "cache"),
    in_turns((*shape, cache) for cache in ("bf16", "q8") for shape in SMALLER),
)
def test_smaller_caches(
    on: str, heads: tuple[int, int], head_dim: int, window: int | None, cache: str
) -> None:
    """Odd positions and odd channels are halves of words, of which the other half is not theirs."""
    problem = _problem(heads, head_dim, window, cache)
    for seq, kv_len in (*BORDERS, *LATER):
        _check(problem, on, 2 if seq == 1 else 1, seq, kv_len, spare=kv_len % 2)


@pytest.mark.parametrize(("on", "window"), in_turns((window,) for window in (1, 5, 64, 65, 130)))
def test_windows(on: str, window: int) -> None:
    for seq, kv_len in (
        (1, 1),
        (65, 65),
        (130, 130),
        (1, 64),
        (1, 65),
        (1, 129),
        (1, 200),
        (9, 133),
        (64, 192),
    ):
        _check(_problem((3, 1), 20, window), on, 2, seq, kv_len)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 7, 64])
@pytest.mark.parametrize("heads", [(7, 1), (4, 4), (10, 5)], ids=lambda heads: f"{heads[0]}-{heads[1]}")
def test_more_lengths(heads: tuple[int, int], window: int | None) -> None:
    for seq in (1, 3, 16, 33, 100):
        for past in (0, 1, 15, 16, 40, 63, 64, 65, 127, 128, 190):
            _check(_problem(heads, 6, window), HOST, 1, seq, seq + past)


def test_layers_with_other_windows_share_a_library() -> None:
    """As models do that alternate local and global attention."""
    problems = [_problem((6, 2), 20, window) for window in (None, 9, 5)]
    on = machine_of("x86-64")
    library = load(generate({problem.name: build(problem, on) for problem in problems}, on))
    for problem in problems:
        q, keys, values = _operands(problem, 1, 7, 23)
        cache = _layout(problem.cache, keys, values, 2 * GRANULE // TILE)
        (out,) = launch_function(
            library[problem.name], problem.name, q, *cache.values(), 23, Out((1, 7, 120))
        )
        assert_within(out, *_reference(problem, q, keys, values), problem.name)


@machines
def test_other_scales(on: str) -> None:
    for scale in (0.01, -0.3):
        _check(Attention(2, 1, 12, scale), on, 1, 20, 70)


EXTREMES = {
    "one key wins by far": lambda s, t: np.where(t == 5, 200.0, 0.0) + 0.0 * s,
    "each block beats the last": lambda s, t: t * 1.0 + 0.0 * s,
    "each block loses to the first": lambda s, t: -t * 1.0 + 0.0 * s,
    "very negative": lambda s, t: -1e4 - (t % 7) * 0.5 + 0.0 * s,
    "very positive": lambda s, t: 1e4 + (t % 7) * 0.5 + 0.0 * s,
    "all equal": lambda s, t: 0.0 * t + 0.0 * s,
    "beyond the range of exp": lambda s, t: np.where(t % 2, -1e6, 1e6) + 0.0 * s,
}


@every_machine
@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize("kind", list(EXTREMES))
def test_scores_of_any_size(on: str, kind: str, window: int | None) -> None:
    """Scores are made exact: the query is 1, and the key is the score."""
    seq, kv_len = 150, 150
    problem = Attention(1, 1, 1, 1.0, window)
    scores = EXTREMES[kind](np.arange(seq)[:, None], np.arange(kv_len)[None])[0]
    q, keys = np.ones((1, seq, 1, 1), np.float32), scores.astype(np.float32).reshape(1, kv_len, 1, 1)
    values = random(1, kv_len, 1, 1)
    out = _run(problem, on, q, keys, values)
    reference, _ = _reference(problem, q, keys, values)
    # The scores have no error; what is left is that of exp, and of the sum.
    allowed = (EXP * 4 + reduction("float32", kv_len)) * np.abs(values).max()
    assert_within(out, reference, np.float64(allowed), kind)


@machines
@caches
def test_what_a_query_does_not_see_does_not_reach_it(on: str, cache: str) -> None:
    """A NaN key: queries before it are exactly what they were, those from it on are NaN, and say so."""
    problem = _problem((3, 1), 20, cache=cache)
    q, keys, values = _operands(problem, 1, 130, 130)
    expected = _run(problem, on, q, keys, values)
    keys[0, 70, 0, 3] = np.nan
    out = _run(problem, on, q, keys, values)
    np.testing.assert_array_equal(out[:, :70], expected[:, :70])
    assert np.isnan(out[:, 70:]).all()


@machines
@caches
def test_a_value_that_is_no_number_reaches_who_sees_it(on: str, cache: str) -> None:
    problem = _problem((3, 1), 20, cache=cache)
    q, keys, values = _operands(problem, 1, 130, 130)
    values[0, 70, 0, 3] = np.nan
    out = _run(problem, on, q, keys, values).reshape(130, 3, 20)
    assert np.isnan(out[70:, :, 3]).all()


@pytest.mark.skipif(not machine().features >= INT8 | BF16, reason="needs a CPU with avx512_bf16")
@pytest.mark.parametrize("cache", ["bf16", "q8"])
@pytest.mark.parametrize(
    ("heads", "head_dim", "window"), [((9, 3), 64, None), ((3, 1), 7, None), ((6, 2), 40, 65)]
)
def test_a_processor_that_multiplies_whole_numbers_alone(
    heads: tuple[int, int], head_dim: int, window: int | None, cache: str
) -> None:
    """There are some with `vpdpwssd` that have no `vdpbf16ps`."""
    host = machine()
    flags = [flag for flag in cast("list[str]", host.options["mattr"]) if "bf16" not in flag]
    on = replace(host, features=host.features - BF16, options={**host.options, "mattr": flags})
    problem = _problem(heads, head_dim, window, cache)
    function = load(generate({problem.name: build(problem, on)}, on))[problem.name]
    for seq, kv_len in ((1, 1), (1, 130), (17, 17), (40, 200)):
        q, keys, values = _operands(problem, 1, seq, kv_len)
        stored = _layout(cache, keys, values, 4 * GRANULE // TILE).values()
        shape = (1, seq, problem.heads * head_dim)
        (out,) = launch_function(function, problem.name, q, *stored, kv_len, Out(shape))
        assert_within(out, *_reference(problem, q, keys, values), f"{problem.name}, {seq} up to {kv_len}")


@machines
@pytest.mark.parametrize("head_dim", [64, 640])
def test_sums_of_whole_numbers_do_not_overflow(on: str, head_dim: int) -> None:
    """All products of a score at their largest, and all those of a sum of values."""
    problem = Attention(2, 1, head_dim, 1e-3 / head_dim, cache="q8")
    ones = np.ones((1, 140, 1, head_dim), np.float32)
    for seq in (1, 20):
        for sign in (1, -1):
            q = np.full((1, seq, 2, head_dim), 3.0, np.float32)
            out = _run(problem, on, q, sign * ones, sign * ones)
            np.testing.assert_allclose(out, np.full_like(out, sign), rtol=2e-4)


@machines
def test_a_window_forgets(on: str) -> None:
    problem = _problem((3, 1), 20, window=9)
    q, keys, values = _operands(problem, 1, 1, 130)
    expected = _run(problem, on, q, keys, values)
    keys[0, :121], values[0, :121] = 1e20, 1e20
    np.testing.assert_allclose(_run(problem, on, q, keys, values), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("on", "heads", "window", "cache"),
    in_turns(
        (*shape, cache) for cache in CACHE_DTYPES for shape in (((9, 3), None), ((9, 3), 70), ((1, 1), None))
    ),
)
def test_results_do_not_depend_on_how_tokens_are_divided(
    on: str, heads: tuple[int, int], window: int | None, cache: str
) -> None:
    """To the bit: a prompt, its tokens one by one, and chunks, whose tasks have blocks or rows."""
    problem = _problem(heads, 20, window, cache)
    q, keys, values = _operands(problem, 1, 300, 300)
    whole = _run(problem, on, q, keys, values)
    for seq, kv_len in ((1, 1), (1, 16), (1, 64), (1, 65), (1, 128), (1, 129), (1, 300), (5, 130), (90, 300)):
        part = slice(kv_len - seq, kv_len)
        out = _run(problem, on, q[:, part], keys[:, :kv_len], values[:, :kv_len])
        np.testing.assert_array_equal(out, whole[:, part], err_msg=f"{seq} up to {kv_len}")
    three = [np.concatenate([x] * 3) for x in (q, keys, values)]
    np.testing.assert_array_equal(
        _run(problem, on, three[0], three[1], three[2]), np.concatenate([whole] * 3)
    )


@pytest.mark.parametrize("cache", CACHE_DTYPES)
@pytest.mark.parametrize(("kv_len", "window"), [(1, None), (130, None), (256, None), (300, None), (300, 140)])
def test_keys_are_asked_for_in_the_order_of_the_pairs(cache: str, kv_len: int, window: int | None) -> None:
    kv_heads, dim, capacity = 3, 40, 5 * GRANULE
    problem = Attention(2 * kv_heads, kv_heads, dim, 1.0, window, cache)
    first = max(kv_len - window, 0) // TILE if window else 0
    end, ahead = -(-kv_len // TILE), BLOCK // TILE

    def emit() -> None:
        operands = Operands.declare(problem, machine())
        out = b.view(operands.out, (2 * kv_heads * dim,))
        with T.serial(operands.pairs) as pair, T.serial(end - first) as index:
            asked = operands.following(operands.keys, pair, first + index, T.int64(first * TILE))
            elements = operands.keys.elements
            b.put(out, T.cast(asked.left, "float32"), (pair * (end - first) + index) * 2)
            b.put(
                out,
                T.cast(T.truncdiv(asked.jump, T.int64(elements)), "float32"),
                (pair * (end - first) + index) * 2 + 1,
            )

    probe = load(generate({"probe": b.prim_func("probe", emit)}, machine()))["probe"]
    keys, values = (random(1, capacity, kv_heads, dim, seed=seed) for seed in range(2))
    q, out = random(1, 1, 2 * kv_heads, dim), Out((1, 1, 2 * kv_heads * dim))
    (found,) = launch_function(probe, "probe", q, *encode(cache, keys, values).values(), kv_len, out)

    order = [(pair, tile) for pair in range(kv_heads) for tile in range(first, end)]
    answers = found.reshape(-1)[: 2 * len(order)].reshape(-1, 2).astype(int)
    for (pair, tile), (left, jump) in zip(order, answers, strict=True):
        # While so many tiles from this one on are worked on, as far as the pair has them.
        for further in range(min(ahead, end - tile)):
            place = pair * (capacity // TILE) + tile + ahead + further + (0 if further < left else jump)
            asked = divmod(place, capacity // TILE)
            at = order.index((pair, tile)) + further + ahead
            if end - first >= ahead and at < len(order):
                assert asked == order[at], "a block ahead in the order in which they are worked on"
            elif pair == kv_heads - 1:
                assert asked == (pair, tile + further), "behind all pairs: what is in the cache"
