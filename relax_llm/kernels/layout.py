"""How a weight matrix lies in memory. A layout belongs to the kernels that read it; packing happens once."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from relax_llm.formats import Blocks, format_named
from relax_llm.plan.kernel import Layout as UserLayout

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Plain:
    """The matrix as its format encodes it, one row after the other: [N, K], or blocks [N, bytes of a row].

    Attributes:
        format: The weight format.
    """

    format: str = "f32"

    @property
    def name(self) -> str:
        """The name that recipes and manifests use."""
        return "plain" + _suffix(self.format)

    @property
    def dtype(self) -> str:
        """Element type in memory."""
        return format_named(self.format).dtype

    def shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the matrix."""
        return format_named(self.format).shape(n, k)

    def pack(self, stored: Array) -> Array:
        """The encoded matrix itself, its rows one after the other in memory."""
        return np.ascontiguousarray(stored)


@dataclass(frozen=True)
class Tiled:
    """Panels of `cols` outputs, each stored reduction-major: [ceil(N / cols), K, cols], the last one padded with zeros.

    A micro-kernel reads one panel as a single stream, `cols` neighbours at a time, for every number of rows.

    Attributes:
        cols: Outputs in a panel.
        gated: The matrix is two stacked ones, gate above up; each panel holds cols/2 gate and the matching cols/2 up
            outputs, so that one tile has both operands of the product gate * up.
        format: "f32", or "f16" as bits.
    """

    cols: int
    gated: bool = False
    format: str = "f32"

    @property
    def name(self) -> str:
        """The name that recipes and manifests use."""
        return _tiled_name(self)

    @property
    def dtype(self) -> str:
        """Element type in memory."""
        return format_named(self.format).dtype

    def panels(self, n: int) -> int:
        """How many panels hold a matrix of n outputs."""
        return -(-n // self.cols)

    def shape(self, n: int, k: int) -> tuple[int, int, int]:
        """Shape of the packed matrix of n outputs over k inputs."""
        return self.panels(n), k, self.cols

    def pack(self, stored: Array) -> Array:
        """Pack a matrix.

        Args:
            stored: [N, K]; N is even when gated.

        Returns:
            A new array of `shape(N, K)` and the same dtype.
        """
        return panels_of(stored, self.cols, gated=self.gated)

    def unpack(self, packed: Array, n: int, k: int) -> Array:
        """The encoded matrix [n, k] that `pack` was given."""
        return matrix_of(packed, n, gated=self.gated)[:, :k]


@dataclass(frozen=True)
class TiledPairs:
    """`Tiled` in bf16, with neighbours along K side by side: [ceil(N / cols), ceil(K / 2), cols, 2].

    One load gives two steps of the reduction for half as many outputs: the first of a pair is widened to f32 by a
    shift, the second by a mask, and where a processor multiplies pairs they are its operands as they are. Elements are
    the bits of bf16 as uint16; the last pair of an odd K is filled up with zeros.

    Attributes:
        cols: Outputs in a panel.
        gated: As in `Tiled`.
    """

    cols: int
    gated: bool = False
    format: ClassVar[str] = "bf16"
    dtype: ClassVar[str] = "uint16"

    @property
    def name(self) -> str:
        """The name that recipes and manifests use."""
        return _tiled_name(self)

    def panels(self, n: int) -> int:
        """How many panels hold a matrix of n outputs."""
        return -(-n // self.cols)

    def shape(self, n: int, k: int) -> tuple[int, int, int, int]:
        """Shape of the packed matrix of n outputs over k inputs."""
        return self.panels(n), -(-k // 2), self.cols, 2

    def pack(self, stored: Array) -> Array:
        """Pack a matrix.

        Args:
            stored: [N, K], the bits of bf16; N is even when gated.

        Returns:
            A new uint16 array of `shape(N, K)`.
        """
        n, k = stored.shape
        pairs = np.zeros((self.panels(n), k + k % 2, self.cols), np.uint16)
        pairs[:, :k] = panels_of(stored, self.cols, gated=self.gated)
        halves = pairs.reshape(self.panels(n), -1, 2, self.cols)
        return np.ascontiguousarray(halves.transpose(0, 1, 3, 2))

    def unpack(self, packed: Array, n: int, k: int) -> Array:
        """The encoded matrix [n, k] that `pack` was given."""
        panels = packed.transpose(0, 1, 3, 2).reshape(len(packed), -1, self.cols)
        return matrix_of(panels, n, gated=self.gated)[:, :k]


@dataclass(frozen=True)
class TiledGroups:
    """`Tiled` for formats in blocks: uint8 [ceil(N / cols), groups, bytes of a group], a stream of groups of 32 steps.

    A group of a panel has the codes of its `cols` outputs, then their scales, then their minimums where the format has
    some::

        8 bits   codes [8 quads, cols, 4]    scales f16 [cols]
        6 bits   codes [4 + 2 quads, cols, 4]    scales f16 [cols]
        4 bits   codes [4 quads, cols, 4]    scales f16 [cols]    minimums f16 [cols]

    Codes are unsigned. Four neighbours along K, a quad, lie side by side, so that a vector of 64 bytes holds quads of
    16 outputs: what `vpdpbusd` multiplies with four activations in every lane. A byte of 4-bit codes has the code of
    step k in its low nibble and that of step k + 16 in its high one: a vector holds quads j and j + 4. Of codes of 6
    bits four quads hold the low bits in this way, and two more the high ones of quads j, j + 2, j + 4 and j + 6. With
    32 columns every part of a group is whole cache lines: 17 of them in q8, 13 in q6, 10 in q4, 9 in q4s.

    Attributes:
        cols: Outputs in a panel.
        gated: As in `Tiled`.
        format: The weight format.
    """

    cols: int
    gated: bool = False
    format: str = "q8"
    dtype: ClassVar[str] = "uint8"

    @property
    def name(self) -> str:
        """The name that recipes and manifests use."""
        return _tiled_name(self)

    @property
    def blocks(self) -> Blocks:
        """The weight format."""
        format = format_named(self.format)
        assert isinstance(format, Blocks)
        return format

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes in a group of a panel."""
        return self.cols * self.blocks.code_bytes

    @property
    def group_bytes(self) -> int:
        """Bytes of a group of a panel."""
        return self.cols * self.blocks.block_bytes

    def panels(self, n: int) -> int:
        """How many panels hold a matrix of n outputs."""
        return -(-n // self.cols)

    def shape(self, n: int, k: int) -> tuple[int, int, int]:
        """Shape of the packed matrix of n outputs over k inputs."""
        return self.panels(n), self.blocks.groups(k), self.group_bytes

    def pack(self, stored: Array) -> Array:
        """Pack a matrix.

        Args:
            stored: uint8 [N, bytes of a row], blocks of the format; N is even when gated.

        Returns:
            A new uint8 array of `shape(N, K)`.
        """
        n, format = len(stored), self.blocks
        groups = stored.shape[1] // format.block_bytes
        rows = rows_of_panels(stored, self.cols, gated=self.gated)  # [panels, cols, bytes of a row]
        blocks = rows.reshape(self.panels(n), self.cols, groups, format.block_bytes).transpose(0, 2, 1, 3)
        head = format.block_bytes - format.code_bytes
        codes = blocks[..., head:].reshape(self.panels(n), groups, self.cols, -1, 4).swapaxes(2, 3)
        packed = np.empty(self.shape(n, groups * format.group), np.uint8)
        packed[..., : self.code_bytes] = codes.reshape(self.panels(n), groups, -1)
        if format.code_bits == 8:
            packed[..., : self.code_bytes] ^= np.uint8(format.zero)
        for at in range(0, head, 2):  # scales, then minimums
            part = slice(self.code_bytes + at * self.cols, self.code_bytes + (at + 2) * self.cols)
            packed[..., part] = blocks[..., at : at + 2].reshape(self.panels(n), groups, -1)
        return packed

    def unpack(self, packed: Array, n: int, k: int) -> Array:
        """The encoded matrix of n rows over k inputs that `pack` was given."""
        format = self.blocks
        panels, groups, _ = packed.shape
        assert groups == format.groups(k)
        head = format.block_bytes - format.code_bytes
        blocks = np.empty((panels, groups, self.cols, format.block_bytes), np.uint8)
        codes = packed[..., : self.code_bytes].reshape(panels, groups, -1, self.cols, 4).swapaxes(2, 3)
        blocks[..., head:] = codes.reshape(panels, groups, self.cols, -1)
        if format.code_bits == 8:
            blocks[..., head:] ^= np.uint8(format.zero)
        for at in range(0, head, 2):
            part = slice(self.code_bytes + at * self.cols, self.code_bytes + (at + 2) * self.cols)
            blocks[..., at : at + 2] = packed[..., part].reshape(panels, groups, self.cols, 2)
        rows = blocks.transpose(0, 2, 1, 3).reshape(panels, self.cols, -1)
        return matrix_of(rows.swapaxes(1, 2), n, gated=self.gated)


Packed = Tiled | TiledPairs | TiledGroups
Layout = Plain | Packed | UserLayout


def packed_for(format: str, cols: int, *, gated: bool = False) -> Packed:
    """The layout in panels that holds a format."""
    if isinstance(format_named(format), Blocks):
        return TiledGroups(cols, gated, format)
    return TiledPairs(cols, gated) if format == "bf16" else Tiled(cols, gated, format)


def parse(name: str) -> Plain | Packed:
    """The layout of this name: "plain", "plain_q4", "tiled32", "tiled32_bf16_gated"."""
    kind, *rest = name.split("_")
    gated = rest[-1:] == ["gated"]
    format = "".join(rest[:-1] if gated else rest) or "f32"
    if kind == "plain":
        return Plain(format)
    return packed_for(format, int(kind.removeprefix("tiled")), gated=gated)


def rows_of_panels(matrix: Array, cols: int, *, gated: bool) -> Array:
    """The rows of a matrix [N, ...] dealt out to panels [panels, cols, ...], missing ones as zeros."""
    if gated:
        gate, up = np.split(matrix, 2)
        halves = [rows_of_panels(part, cols // 2, gated=False) for part in (gate, up)]
        return np.concatenate(halves, axis=1)
    missing = -len(matrix) % cols
    if missing:
        matrix = np.concatenate([matrix, np.zeros((missing, *matrix.shape[1:]), matrix.dtype)])
    return matrix.reshape(-1, cols, *matrix.shape[1:])


def panels_of(matrix: Array, cols: int, *, gated: bool) -> Array:
    """A matrix [N, K] as panels [panels, K, cols]."""
    return np.ascontiguousarray(rows_of_panels(matrix, cols, gated=gated).swapaxes(1, 2))


def matrix_of(panels: Array, n: int, *, gated: bool) -> Array:
    """The matrix [n, K] of panels [panels, K, cols]: what `panels_of` was given."""
    rows = panels.swapaxes(1, 2)
    if gated:
        half = rows.shape[1] // 2
        parts = [rows[:, :half], rows[:, half:]]
        return np.concatenate([part.reshape(-1, rows.shape[2])[: n // 2] for part in parts])
    matrix: Array = rows.reshape(-1, rows.shape[2])[:n]
    return matrix


def _suffix(format: str) -> str:
    """What a format adds to a layout's name."""
    return "" if format == "f32" else f"_{format}"


def _tiled_name(layout: "Packed") -> str:
    return f"tiled{layout.cols}{_suffix(layout.format)}" + ("_gated" if layout.gated else "")
