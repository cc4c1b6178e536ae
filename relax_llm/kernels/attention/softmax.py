"""The softmax of a tile over a block: scores are masked and become weights, and partials are merged.

Partials of neighbouring positions are merged by bringing them to one largest score (Milakov and Gimelshein 2018;
FlashAttention, Dao et al. 2022).
"""

from contextlib import nullcontext

from tvm import ir
from tvm.tirx.script.builder import ir as T

from relax_llm.artifact.kv_cache import TILE
from relax_llm.kernels import builder as b
from relax_llm.kernels.attention.tile import BLOCK, Tile
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.codes import inverse_of, magnitude, rounded, scale_of
from relax_llm.kernels.inner import inner, memory, number, pointer
from relax_llm.kernels.intrinsics import imported, round_bf16
from relax_llm.kernels.machine import LANES
from relax_llm.kernels.vectormath import exp_nonpositive

_LOWEST = -1.0e30
"""The largest score of no positions. Finite, so that differences from it are no NaN."""

_HIDDEN = -3.0e38
"""The score of a position that a row does not see: its weight is 0 even beside `_LOWEST`."""

_PAIR = 2  # tiles of scores that become weights at once


def mask(tile: Tile, group: int, window: int | None) -> ir.GlobalVar:
    """The function that takes scores away from rows that do not see the position.

    ::

        mask(height, scores [height, BLOCK], first, offset, tiles)

    Row r is a head of query (first + r) // group, which sees the positions up to `offset` more than that, and of
    these only a window. Scores of tiles that all rows see are not touched.
    """

    def emit() -> None:
        height, scores_at = number("height"), pointer("scores")
        first, offset, tiles = number("first"), number("offset"), number("tiles")
        scores = memory(scores_at, (tile.rows, BLOCK))
        seen = T.truncdiv(T.max(offset + T.truncdiv(first, T.int64(group)) + 1, 0), T.int64(TILE))
        begin = b.let("begin", seen if window is None else T.int64(0))
        with T.serial(height) as r:
            last = b.let("last", T.cast(offset + T.truncdiv(first + r, T.int64(group)), "int32"))
            with T.serial(tiles - begin) as i:
                at = b.let("at", (begin + i) * TILE)
                lane = T.ramp(T.cast(at, "int32"), 1, LANES)
                visible = lane <= T.broadcast(last, LANES)
                if window is not None:
                    visible = T.And(visible, lane > T.broadcast(last - window, LANES))
                b.store(scores, T.Select(visible, b.load(scores, r, at), b.splat(_HIDDEN)), r, at)

    name = f"attention_mask_group{group}" + (f"_window{window}" if window else "")
    return inner(name, (tile.machine,), emit, entry=True)


def weights(tile: Tile) -> ir.GlobalVar:
    """The function that turns scores into e**(score - largest), and begins a partial.

    ::

        weights(height, scores [height, BLOCK], (words [height, BLOCK / 2]), (scales), partial, tiles)

    The largest scores and the sums of weights go to the partial. Weights take the place of the scores; as pairs they
    are written to `words`, and the sum is that of the weights before rounding. Codes have `scales`, by which the
    weights are multiplied, but not those in the sum; where a row does not see the position, its scale may be anything.
    """

    def emit() -> None:
        height, scores_at = number("height"), pointer("scores")
        words_at = pointer("words", tile.factors) if tile.pairs else None
        scales_at = pointer("scales") if tile.codes else None
        partial_at, tiles = pointer("partial"), number("tiles")
        scores, partial = memory(scores_at, (tile.rows, BLOCK)), memory(partial_at, (tile.partial,))
        words = memory(words_at, (tile.rows, tile.weight_factors), tile.factors) if tile.pairs else None
        scales = memory(scales_at, (BLOCK,)) if tile.codes else None
        scale_at = tile.weight_factors - LANES

        def largest(r: Expr, count: int) -> None:
            top = b.local((LANES,))
            b.store(top, b.splat(_LOWEST), 0)
            for at in range(0, count * TILE, LANES):
                b.store(top, T.max(b.load(top, 0), b.load(scores, r, at)), 0)
            b.put(partial, b.fold(b.load(top, 0), T.max), r)

        def weigh(r: Expr, count: int) -> None:
            top, total, most = b.let("top", partial[r]), b.local((LANES,)), b.local((LANES,), "int32")
            b.store(total, b.splat(0.0), 0)
            found = []
            for at in range(0, count * TILE, LANES):
                score = b.load(scores, r, at)
                weight = b.let("weight", exp_nonpositive(score - b.splat(top)))
                b.store(total, b.load(total, 0) + weight, 0)
                if scales is not None:
                    last = T.min(T.int64(at), (tiles - 1) * TILE) if at == (count - 1) * TILE else at
                    scaled = T.Select(score > b.splat(_LOWEST), weight * b.load(scales, last), b.splat(0.0))
                    weight = b.let("scaled", scaled)
                if tile.integers:
                    size = magnitude(weight)
                    b.store(most, T.max(b.load(most, 0), size) if at else size, 0)
                found.append(weight)
                if not tile.bf16:
                    b.store(scores, weight, r, at)
                elif at % (2 * LANES):
                    b.store(words, round_bf16(*found[-2:]), r, at // (2 * LANES) * LANES)
            b.store(partial, b.load(total, 0), tile.weights_at(r))
            if tile.integers:
                b.store(words, b.load(most, 0), r, scale_at)

        def encode(r: Expr, count: int) -> None:
            largest = b.let("largest", b.fold(b.load(words, r, scale_at), T.max))
            b.put(words, scale_of(largest, tile.most), r, scale_at)
            inverse = b.let("inverse", inverse_of(largest, tile.most))
            for at in range(0, count * TILE, LANES):
                codes = T.Cast(f"int16x{LANES}", rounded(b.load(scores, r, at) * b.splat(inverse)))
                b.store(words, T.reinterpret(f"int32x{LANES // 2}", codes), r, at // 2, lanes=LANES // 2)

        with imported() if tile.bf16 else nullcontext():
            b.store(partial, b.splat(_LOWEST), 0)
            odd = b.let("odd", T.truncmod(tiles, T.int64(_PAIR)))
            with b.when(odd != 0), T.serial(height) as r:
                b.store(scores, b.splat(_HIDDEN), r, tiles * TILE)
            for count in range(_PAIR, BLOCK // TILE + 1, _PAIR):
                with b.when(tiles + odd == count):
                    # For all rows first: a processor would wait for each row's, whose lanes depend on each other.
                    with T.serial(height) as r:
                        largest(r, count)
                    with T.serial(height) as r:
                        weigh(r, count)
                    if tile.integers:
                        with T.serial(height) as r:
                            encode(r, count)

    return inner(tile.named("attention_weights"), (tile.machine,), emit, entry=True)


def merge(tile: Tile) -> ir.GlobalVar:
    """The function that joins the partial of some positions to that of all before them.

    ::

        merge(before, partial, height)
    """

    def emit() -> None:
        addresses, height = [pointer("before"), pointer("partial")], number("height")
        parts = [memory(at, (tile.partial,)) for at in addresses]
        tops = [b.let("top", b.load(part, 0)) for part in parts]
        top = b.let("top", T.max(*tops))
        scales = [b.local((LANES,)) for _ in parts]
        for scale, old in zip(scales, tops, strict=True):
            b.store(scale, exp_nonpositive(old - top), 0)
        b.store(parts[0], top, 0)

        with T.serial(height) as r:

            def join(start: Expr, lanes: int, r: Expr = r) -> None:
                at = b.let("at", start)
                old, new = (
                    b.load(part, at, lanes=lanes) * b.splat(scale[r], lanes)
                    for part, scale in zip(parts, scales, strict=True)
                )
                b.store(parts[0], old + new, at, lanes=lanes)

            join(tile.weights_at(r), LANES)
            for start, lanes in b.chunks(tile.dim):
                join(tile.values_at(r) + start, lanes)

    return inner(f"attention_merge_d{tile.dim}", (tile.machine,), emit, entry=True)
