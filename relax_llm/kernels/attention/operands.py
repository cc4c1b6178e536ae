"""The arguments of a launch, as matrices, and what follows from their sizes."""

from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from relax_llm.artifact.kv_cache import TILE
from relax_llm.kernels import builder as b
from relax_llm.kernels.attention.problem import Attention
from relax_llm.kernels.attention.tile import BLOCK, Tile
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.cache import declare_cache
from relax_llm.kernels.machine import Machine


@dataclass(frozen=True)
class Stored:
    """Keys or values in their cache, or their scales.

    Attributes:
        matrix: [pairs, elements].
        elements: Of a tile of positions.
    """

    matrix: Expr
    elements: int

    def at(self, pair: Expr, tile: Expr) -> Expr:
        """The address of a tile of positions."""
        return T.address_of(self.matrix[pair, tile * self.elements])


@dataclass(frozen=True)
class Asked:
    """What is asked for while tiles are worked on, as many as these are.

    Attributes:
        at: The address of the first.
        left: How many lie there. What is asked for behind them is elsewhere:
        jump: so many elements from where it would be.
    """

    at: Expr
    left: Expr
    jump: Expr


@dataclass(frozen=True)
class Operands:
    """The arguments of a kernel. A *pair* is one of a sequence and a key head.

    Attributes:
        problem: What is computed.
        tile: In which rows are worked on; a row is a query and a head of those that share a key head.
        seq: Queries of a sequence.
        kv_len: Positions in the caches, those of the queries included.
        pairs: How many.
        q: [batch, seq, heads, head_dim].
        keys: Of each pair.
        values: Of each pair.
        scales: Of keys and of values; none where the caches have none.
        out: [batch, seq, heads, head_dim].
        rows: Rows of a pair.
        past: Positions before those of the queries.
        row_tiles: Tiles of a pair's rows.
        first_block: The first block that a query sees.
        blocks: Blocks from there on.
    """

    problem: Attention
    tile: Tile
    seq: Expr
    kv_len: Expr
    pairs: Expr
    q: Expr
    keys: Stored
    values: Stored
    scales: list[Stored]
    out: Expr
    rows: Expr
    past: Expr
    row_tiles: Expr
    first_block: Expr
    blocks: Expr

    @staticmethod
    def declare(problem: Attention, machine: Machine) -> "Operands":
        """Declare the arguments: q, the cache, kv_len and out [batch, seq, heads * head_dim]."""
        heads, kv_heads, dim = problem.heads, problem.kv_heads, problem.head_dim
        tile = Tile(dim, machine, problem.cache)
        batch, seq, tiles = b.size("batch"), b.size("seq"), b.size("tiles")
        q = b.argument("q", (batch, seq, heads, dim))
        cache = declare_cache(problem.cache, batch, kv_heads, tiles, dim)
        kv_len = b.scalar("kv_len")
        out = b.argument("out", (batch, seq, heads * dim))

        out = b.view(out, (batch, seq, heads, dim))
        pairs = batch * kv_heads
        keys, values = (
            Stored(b.view(cache[name], (pairs, tiles * elements), tile.stored), elements)
            for name, elements in (("k_cache", tile.stored_keys), ("v_cache", tile.stored_values))
        )
        scales = [
            Stored(b.view(cache[name], (pairs, tiles * TILE)), TILE)
            for name in cache
            if name.endswith("scale")
        ]
        rows, past = b.let("rows", seq * problem.group), b.let("past", kv_len - seq)
        row_tiles = b.let("row_tiles", ceil_div(seq * problem.group, tile.rows))
        first_block = T.int64(0)
        if problem.window:
            first_block = floor_div(T.max(past - (problem.window - 1), 0), BLOCK)
        first_block = b.let("first_block", first_block)
        blocks = b.let("blocks", ceil_div(kv_len, BLOCK) - first_block)
        return Operands(
            problem,
            tile,
            seq,
            kv_len,
            pairs,
            q,
            keys,
            values,
            scales,
            out,
            rows,
            past,
            row_tiles,
            first_block,
            blocks,
        )

    def following(self, stored: Stored, pair: Expr, tile: Expr, begin: Expr) -> Asked:
        """What is asked for of a cache: what is a block ahead where one pair's tiles follow those of another.

        Args:
            stored: Keys, values, or scales.
            pair: Whose tiles are worked on.
            tile: The first of these.
            begin: The first position that is seen.
        """
        end = ceil_div(self.kv_len, TILE)
        ahead = b.let("ahead", tile + BLOCK // TILE)
        # Behind the last pair, what is worked on itself: it is in the cache.
        jump = b.let(
            "jump",
            T.Select(
                pair + 1 < self.pairs,
                stored.matrix.shape[1] + (floor_div(begin, TILE) - end) * stored.elements,
                T.int64(-(BLOCK // TILE) * stored.elements),
            ),
        )
        return Asked(stored.at(pair, ahead), b.let("left", T.max(end - ahead, 0)), jump)


def floor_div(count: Expr, size: int) -> Expr:
    """How many whole sizes there are in a count, which is not negative."""
    return T.truncdiv(count, T.int64(size))


def ceil_div(count: Expr, size: int) -> Expr:
    """How many sizes there are, the last of which may not be whole."""
    return T.truncdiv(count + (size - 1), T.int64(size))
