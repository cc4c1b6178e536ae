"""How a weight matrix lies in memory. A layout belongs to the kernels that read it; packing happens once."""

from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from relax_llm.plan.kernel import Layout as UserLayout


@dataclass(frozen=True)
class Plain:
    """[N, K], as in the checkpoint."""

    name: str = "plain"
    dtype: ClassVar[str] = "float32"

    def shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the matrix."""
        return n, k

    def pack(self, weight: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """The matrix, its rows one after the other in memory."""
        return np.ascontiguousarray(weight)


@dataclass(frozen=True)
class PlainBits:
    """[N, K] in bf16, its bits as uint16."""

    name: str = "plain_bf16"
    dtype: ClassVar[str] = "uint16"

    def shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the matrix."""
        return n, k

    def pack(self, weight: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """The matrix, rounded to bf16 where it is of another float type."""
        return np.ascontiguousarray(weight.astype(ml_dtypes.bfloat16).view(np.uint16))


@dataclass(frozen=True)
class Tiled:
    """Panels of `cols` outputs, each stored reduction-major: [ceil(N / cols), K, cols], the last one padded with zeros.

    A micro-kernel reads one panel as a single stream, `cols` neighbours at a time, for every number of rows.

    Attributes:
        cols: Outputs in a panel.
        gated: The matrix is two stacked ones, gate above up; each panel holds cols/2 gate and the matching cols/2 up
            outputs, so that one tile has both operands of the product gate * up.
    """

    cols: int
    gated: bool = False
    dtype: ClassVar[str] = "float32"

    @property
    def name(self) -> str:
        """The name that recipes and manifests use."""
        return f"tiled{self.cols}" + ("_gated" if self.gated else "")

    def panels(self, n: int) -> int:
        """How many panels hold a matrix of n outputs."""
        return -(-n // self.cols)

    def shape(self, n: int, k: int) -> tuple[int, int, int]:
        """Shape of the packed matrix of n outputs over k inputs."""
        return self.panels(n), k, self.cols

    def pack(self, weight: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """Pack a matrix.

        Args:
            weight: [N, K]; N is even when gated.

        Returns:
            A new array of `shape(N, K)` and the same dtype.
        """
        n, k = weight.shape
        packed = np.zeros(self.shape(n, k), weight.dtype)
        if self.gated:
            half = self.cols // 2
            for which in range(2):
                part = weight[which * (n // 2) : (which + 1) * (n // 2)]
                _fill(packed[:, :, which * half : (which + 1) * half], part)
        else:
            _fill(packed, weight)
        return packed


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
    dtype: ClassVar[str] = "uint16"

    @property
    def name(self) -> str:
        """The name that recipes and manifests use."""
        return f"tiled{self.cols}_bf16" + ("_gated" if self.gated else "")

    def panels(self, n: int) -> int:
        """How many panels hold a matrix of n outputs."""
        return -(-n // self.cols)

    def shape(self, n: int, k: int) -> tuple[int, int, int, int]:
        """Shape of the packed matrix of n outputs over k inputs."""
        return self.panels(n), -(-k // 2), self.cols, 2

    def pack(self, weight: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """Pack a matrix.

        Args:
            weight: [N, K], bf16, or another float type that is rounded to it; N is even when gated.

        Returns:
            A new uint16 array of `shape(N, K)`.
        """
        n, k = weight.shape
        panels = Tiled(self.cols, self.gated).pack(weight.astype(ml_dtypes.bfloat16).view(np.uint16))
        pairs = np.zeros((self.panels(n), k + k % 2, self.cols), np.uint16)
        pairs[:, :k] = panels
        halves = pairs.reshape(self.panels(n), -1, 2, self.cols)
        return np.ascontiguousarray(halves.transpose(0, 1, 3, 2))


Layout = Plain | PlainBits | Tiled | TiledPairs | UserLayout


def parse(name: str) -> Layout:
    """The layout of this name."""
    if name in ("plain", "plain_bf16"):
        return Plain() if name == "plain" else PlainBits()
    gated, plain = name.endswith("_gated"), name.removesuffix("_gated")
    kind = TiledPairs if plain.endswith("_bf16") else Tiled
    return kind(int(plain.removesuffix("_bf16").removeprefix("tiled")), gated)


def _fill(panels: npt.NDArray[np.generic], weight: npt.NDArray[np.generic]) -> None:
    n, k = weight.shape
    cols = panels.shape[2]
    full = n // cols
    panels[:full] = weight[: full * cols].reshape(full, cols, k).transpose(0, 2, 1)
    if n % cols:
        panels[full, :, : n % cols] = weight[full * cols :].T
