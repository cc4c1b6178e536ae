"""How a product is cut: register tiles, parts of the reduction, blocks of rows, groups of panels."""

from dataclasses import dataclass

from relax_llm.kernels.layout import Packed, packed_for
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.matmul.problem import Matmul

UNROLL = 4
"""Steps of the reduction in one turn of a micro-kernel's loop."""

_TILED_STEPS = 320  # of the reduction at a time: a part of a panel and the next stay in a second-level cache
_BLOCKED_STEPS = 640
_WHOLE = 32  # steps that a part is a multiple of: groups of quantized weights stay in one piece
PIECE = _BLOCKED_STEPS + 16
"""Elements between rows of a piece of x: an odd number of cache lines, and one for all products of a library."""

TOGETHER = 54
"""Rows up to which all are one block, so that cores share out columns; from there on rows are in halves."""

_TILES = 16  # at most in a block of rows
_BLOCKED_TILES = 8  # so many that a piece of x takes a quarter of a second-level cache
_FEWEST = 4  # in a block of rows: fewer would read the weight too often
_BLOCK = 1 << 18  # f32 of x in a block of rows, where it is more than `_FEWEST` tiles
_GROUP = 20  # panels at most in a group; twice as many where no sums are carried between parts


@dataclass(frozen=True)
class Tile:
    """The register tile of a micro-kernel: `rows` of x by `cols` outputs, all held in vector registers."""

    rows: int
    cols: int

    @property
    def alone(self) -> int:
        """The most rows that are one tile; those up to a full tile are two, so that each has less to prefetch."""
        return -(-self.rows // 2)

    @property
    def least(self) -> int:
        """The fewest rows of a tile where there are more rows than a tile has."""
        return (self.rows + 1) // 2


def tile_for(machine: Machine) -> Tile:
    """The tile that fills this machine's registers, but for the operands of two steps of the reduction."""
    held = machine.vector_registers * machine.vector_bits // (32 * LANES)
    cols = 32 if held >= 16 else 16
    return Tile(max(1, held * 13 // 16 * LANES // cols), cols)


def layout_for(problem: Matmul, machine: Machine) -> Packed:
    """The weight layout of this machine's kernels."""
    return packed_for(problem.weight_format, tile_for(machine).cols, gated=problem.gated)


@dataclass(frozen=True)
class Blocking:
    """How a kernel cuts its work.

    Attributes:
        tile: The register tile.
        k: The reduction length.
        steps: Steps in each part of the reduction, whole turns of the loop; the last part may have fewer.
        tiles: Tiles in a block of rows, at most.
        group: Panels that a task has, at most.
    """

    tile: Tile
    k: int
    steps: int
    tiles: int
    group: int = 1

    @property
    def parts(self) -> int:
        """Parts of the reduction."""
        return -(-self.k // self.steps)

    def groups(self, panels: int) -> int:
        """Groups of panels: an even number, for cores come in pairs."""
        return 2 * -(-panels // (2 * self.group)) if panels > 1 else 1

    def count(self, m: int) -> int:
        """Tiles that M rows are cut into, where M is known; see `operands.cut`."""
        fewest = max(-(-m // self.tile.rows), min(2, -(-m // self.tile.alone)))
        return fewest if self._together(m, fewest) else fewest + fewest % 2

    def blocks(self, m: int) -> int:
        """Blocks of M rows, where M is known."""
        tiles = self.count(m)
        return 1 if self._together(m, tiles) else 2 * -(-tiles // (2 * self.tiles))

    def _together(self, m: int, tiles: int) -> bool:
        return m <= TOGETHER and tiles <= self.tiles


def tiled_blocking(problem: Matmul, machine: Machine) -> Blocking:
    """The cuts of `tiled`."""
    tile = tile_for(machine)
    most = max(_FEWEST, min(_TILES, _BLOCK // (problem.k * tile.rows)))
    return Blocking(tile, problem.k, _steps(problem.k, _TILED_STEPS), most)


def blocked_blocking(problem: Matmul, machine: Machine) -> Blocking:
    """The cuts of `blocked`."""
    steps = _steps(problem.k, _BLOCKED_STEPS)
    group = 2 * _GROUP if steps >= problem.k else _GROUP
    return Blocking(tile_for(machine), problem.k, steps, _BLOCKED_TILES, group)


def pairs_blocking(problem: Matmul, machine: Machine) -> Blocking:
    """The cuts of `pairs`, whose steps are pairs along k."""
    tile, count = tile_for(machine), -(-problem.k // 2)
    most = max(_FEWEST, min(_TILES, _BLOCK // (count * tile.rows)))
    return Blocking(tile, count, _steps(count, _BLOCKED_STEPS), most)


def _steps(k: int, most: int) -> int:
    """Steps of each part: at most `most`, about the same in all."""
    count = -(-k // most)
    return -(-k // (count * _WHOLE)) * _WHOLE


def first_blocked(machine: Machine) -> int:
    """The fewest rows that `blocked` takes: all its tiles have then at least half of their height."""
    return tile_for(machine).rows + 1
