"""The packed layout, element by element, against its definition."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from relax_llm.formats import FORMATS
from relax_llm.kernels.layout import Packed, Plain, Tiled, TiledGroups, packed_for, parse

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


LAYOUTS: list[Any] = [
    *(Plain(name) for name in FORMATS),
    *(
        packed_for(name, cols, gated=gated)
        for name in FORMATS
        for cols in (16, 32)
        for gated in (False, True)
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_names_are_parsed(layout: Plain | Packed) -> None:
    assert parse(layout.name) == layout


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if isinstance(layout, Packed)], ids=str)
@pytest.mark.parametrize(("n", "k"), [(2, 1), (70, 33), (64, 64)])
def test_unpacking_undoes_packing(layout: Packed, n: int, k: int) -> None:
    form = FORMATS[layout.format]
    stored = form.encode(np.random.default_rng(0).standard_normal((n, k)).astype(np.float32))
    packed = layout.pack(stored)
    assert packed.shape == layout.shape(n, k)
    assert packed.dtype.name == layout.dtype
    assert packed.nbytes == math.prod(packed.shape) * packed.itemsize
    np.testing.assert_array_equal(layout.unpack(packed, n, k), stored)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["q8", "q6", "q4", "q4s"])
def test_groups_have_codes_by_quads_then_scales_then_minimums(name: str, gated: bool) -> None:
    """Written down once more from the description: where the code, scale and minimum of an element lie."""
    n, k, cols = 70, 67, 16
    layout, form = TiledGroups(cols, gated, name), FORMATS[name]
    stored = form.encode(np.random.default_rng(0).standard_normal((n, k)).astype(np.float32))
    parts, packed = layout.blocks.split(stored), layout.pack(stored)
    for row, step in product(range(n), range(k)):
        panel, place = divmod(row, cols)
        if gated:
            which, within = divmod(row, n // 2)
            panel, place = within // (cols // 2), within % (cols // 2) + which * (cols // 2)
        group, at = divmod(step, 32)
        block = packed[panel, group]
        if name == "q8":
            code, codes = block[:512].reshape(8, cols, 4)[at // 4, place, at % 4], 512
        else:
            byte, codes = block[:256].reshape(4, cols, 4)[at % 16 // 4, place, at % 4], 256
            code = byte >> 4 if at >= 16 else byte & 15
        if name == "q6":
            pairs, codes = block[256:384].reshape(2, cols, 4)[at % 8 // 4, place, at % 4], 384
            code |= (pairs >> at // 8 * 2 & 3) << 4
        halves = block[codes:].view(np.float16).reshape(-1, cols)
        assert code == parts.codes[row, group, at]
        assert halves[0, place] == parts.scales[row, group]
        if parts.minimums is not None:
            assert halves[1, place] == parts.minimums[row, group]


def test_a_transposed_view_is_packed_as_what_it_shows() -> None:
    weight = np.random.default_rng(0).standard_normal((9, 21)).astype(np.float32)
    np.testing.assert_array_equal(Tiled(16).pack(weight.T), Tiled(16).pack(weight.T.copy()))
