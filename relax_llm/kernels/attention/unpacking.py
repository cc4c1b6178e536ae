"""Codes of a cache become words: a task unpacks a block of keys and values once for all its tiles."""

from dataclasses import dataclass

from tvm import ir
from tvm.tirx.script.builder import ir as T

from relax_llm.artifact.kv_cache import TILE
from relax_llm.kernels import builder as b
from relax_llm.kernels.attention.operands import Operands, ceil_div, floor_div
from relax_llm.kernels.attention.tile import BLOCK, FAR, Tile
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.halves import pair_of_floats
from relax_llm.kernels.inner import inner, memory, number, pointer
from relax_llm.kernels.machine import LANES

_TILES = BLOCK // TILE  # of positions in a block


def unpack(tile: Tile, rows: int, width: int) -> ir.GlobalVar:
    """The function that widens codes in tiles of `rows` by `width`: to pairs of neighbouring rows, or as they are.

    ::

        unpack(codes [tiles, rows, width], words, tiles)

    A row behind an odd last one counts as 0.
    """

    def emit() -> None:
        codes_at, words_at = pointer("codes", "int8"), pointer("words", tile.words)
        tiles = number("tiles")
        each = -(-rows // 2) if tile.halves else rows
        codes = memory(codes_at, (FAR, rows, width), "int8")
        words = memory(words_at, (FAR, each, width), tile.words)

        def floats(index: Expr, row: Expr, start: int, lanes: int) -> Expr:
            kind = "float32" if lanes == 1 else f"float32x{lanes}"
            return T.Cast(kind, b.load(codes, index, row, start, lanes=lanes))

        def pair(index: Expr, at: Expr, *, single: bool) -> None:
            for start, lanes in b.chunks(width):
                low = floats(index, 2 * at, start, lanes)
                high = None if single else floats(index, 2 * at + 1, start, lanes)
                b.store(words, pair_of_floats(low, high, lanes), index, at, start, lanes=lanes)

        with T.serial(tiles) as index:
            if tile.halves:
                with T.serial(rows // 2) as at:
                    pair(index, at, single=False)
                if rows % 2:
                    pair(index, T.int64(rows // 2), single=True)
            else:
                with T.serial(rows) as row:
                    for start, lanes in b.chunks(width):
                        b.store(words, floats(index, row, start, lanes), index, row, start, lanes=lanes)

    kind = "pairs" if tile.halves else "floats"
    return inner(f"attention_unpack_{kind}_{rows}x{width}", (tile.machine,), emit, entry=True)


@dataclass(frozen=True)
class Unpacked:
    """Memory of a task for a block of keys and values as they are multiplied, and for their scales.

    Attributes:
        tile: Of the rows that they are multiplied with.
        words: [2, words of a block].
        scales: Of keys and of values, [BLOCK + TILE] each, 0 where there is no position.
    """

    tile: Tile
    words: Expr
    scales: tuple[Expr, Expr]

    @staticmethod
    def of(tile: Tile) -> "Unpacked":
        """New memory."""
        words = b.scratch((2, _TILES * max(tile.key_words, tile.value_words)), tile.words)
        return Unpacked(tile, words, (b.stack((BLOCK + TILE,)), b.stack((BLOCK + TILE,))))

    def keys(self, slot: Expr) -> Expr:
        """The address of the keys of one of the block's tiles of positions."""
        return T.address_of(self.words[0, slot * self.tile.key_words])

    def values(self, slot: Expr) -> Expr:
        """The address of its values."""
        return T.address_of(self.words[1, slot * self.tile.value_words])

    def fill(self, operands: Operands, pair: Expr, block: Expr, begin: Expr, latest: Expr) -> None:
        """Unpack what is seen of a pair's block, from the positions `begin` to `latest`, to its place there."""
        dim = self.tile.dim
        first = b.let("first_tile", T.max(block * _TILES, floor_div(begin, TILE)))
        end = T.min((block + 1) * _TILES, ceil_div(latest + 1, TILE))
        count = b.let("tiles", end - first)
        slot = b.let("in_block", first - block * _TILES)
        key, value = operands.keys.at(pair, first), operands.values.at(pair, first)
        b.call(unpack(self.tile, dim, TILE), key, self.keys(slot), count)
        b.call(unpack(self.tile, TILE, dim), value, self.values(slot), count)
        for scale, kept in zip(operands.scales, self.scales, strict=True):
            with T.serial(count) as index:
                at = b.let("at", (first + index) * TILE)
                position, after = T.ramp(T.cast(at, "int32"), 1, LANES), T.cast(operands.kv_len, "int32")
                there = position < T.broadcast(after, LANES)
                known = T.Select(there, b.load(scale, pair, at), b.splat(0.0))
                b.store(kept, known, (slot + index) * TILE)
            b.store(kept, b.splat(0.0), (slot + count) * TILE)
