"""How a weight matrix lies in memory. A layout belongs to the kernels that read it; packing happens once."""

from dataclasses import dataclass
from typing import ClassVar

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


Layout = Plain | Tiled | UserLayout


def parse(name: str) -> Layout:
    """The layout of this name."""
    if name == "plain":
        return Plain()
    return Tiled(int(name.removeprefix("tiled").removesuffix("_gated")), name.endswith("_gated"))


def _fill(panels: npt.NDArray[np.generic], weight: npt.NDArray[np.generic]) -> None:
    n, k = weight.shape
    cols = panels.shape[2]
    full = n // cols
    panels[:full] = weight[: full * cols].reshape(full, cols, k).transpose(0, 2, 1)
    if n % cols:
        panels[full, :, : n % cols] = weight[full * cols :].T
