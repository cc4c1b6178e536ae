"""The packed layout, element by element, against its definition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from relax_llm.kernels.layout import Tiled, parse

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("cols", [16, 32])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 32, 33, 65])
def test_panels(n: int, cols: int, dtype: type) -> None:
    k, layout = 7, Tiled(cols)
    weight: Array = np.arange(1, n * k + 1, dtype=np.float32).reshape(n, k).astype(dtype)
    packed = layout.pack(weight)
    assert packed.shape == layout.shape(n, k) == (-(-n // cols), k, cols)
    assert packed.dtype == weight.dtype
    assert packed.flags.c_contiguous
    for panel, row, col in np.ndindex(packed.shape):
        at = panel * cols + col
        assert packed[panel, row, col] == (weight[at, row] if at < n else 0)


@pytest.mark.parametrize("cols", [16, 32])
@pytest.mark.parametrize("half", [1, 7, 8, 9, 15, 16, 17, 33])
def test_gated_panels(half: int, cols: int) -> None:
    """Each panel has cols/2 of the gate's outputs, then the same ones of up."""
    k, layout = 5, Tiled(cols, gated=True)
    weight = np.arange(1, 2 * half * k + 1, dtype=np.float32).reshape(2 * half, k)
    packed = layout.pack(weight)
    assert packed.shape == layout.shape(2 * half, k)
    for panel, row, col in np.ndindex(packed.shape):
        which, within = divmod(col, cols // 2)
        at = panel * (cols // 2) + within
        assert packed[panel, row, col] == (weight[which * half + at, row] if at < half else 0)


@pytest.mark.parametrize("layout", [Tiled(16), Tiled(32), Tiled(32, gated=True)])
def test_names_are_parsed(layout: Tiled) -> None:
    assert parse(layout.name) == layout


def test_a_transposed_view_is_packed_as_what_it_shows() -> None:
    weight = np.random.default_rng(0).standard_normal((9, 21)).astype(np.float32)
    np.testing.assert_array_equal(Tiled(16).pack(weight.T), Tiled(16).pack(weight.T.copy()))
