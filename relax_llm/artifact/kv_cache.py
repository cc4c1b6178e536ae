"""How the KV cache lies in memory: what kernels, the compiler and the runtime must agree on.

The caches of a layer are two plain tensors, [batch, kv_heads, tiles, ...], each tile holding `TILE` positions:

=======  ==========================================  ==========================================
format   keys of a tile                              values of a tile
=======  ==========================================  ==========================================
f32      float32 [head_dim, TILE]                    float32 [TILE, head_dim]
bf16     uint16 [ceil(head_dim / 2), TILE, 2]        uint16 [TILE / 2, head_dim, 2]
=======  ==========================================  ==========================================

Keys have one position a lane, so that scores are computed for `TILE` positions at once without reducing across lanes;
values one channel a lane, which is what the weighted sum over positions reads. In bf16 two neighbours along what is
summed lie in one word, as products of pairs want them: two channels of a key, two positions of a value. The second
channel of the last pair of an odd head_dim is 0.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

TILE = 16
"""Positions in a tile."""

GRANULE = 64
"""Capacities are multiples of this many positions."""

CACHE_DTYPES: Mapping[str, str] = MappingProxyType({"f32": "float32", "bf16": "uint16"})
"""The formats, and the element type of each in memory; bf16 is kept as its bits."""


def cache_shapes(
    format: str, batch: Any, kv_heads: int, tiles: Any, head_dim: int
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Shapes of the key and the value cache of one layer."""
    outer = (batch, kv_heads, tiles)
    if format == "bf16":
        return (*outer, -(-head_dim // 2), TILE, 2), (*outer, TILE // 2, head_dim, 2)
    return (*outer, head_dim, TILE), (*outer, TILE, head_dim)
