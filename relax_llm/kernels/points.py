"""The sizes at which a kernel is tried: where kernels break."""

from collections.abc import Iterator, Sequence
from itertools import product

from relax_llm.artifact.kv_cache import GRANULE, TILE
from relax_llm.kernels.operators import Operator
from relax_llm.plan.sizes import Bounds, Box

_TILES = (4, 8, 16, 32, 64)
_MANY = 257
_MOST = 28  # Combinations of several sizes.


def sizes(operator: Operator, box: Box) -> Iterator[dict[str, int]]:
    """The sizes at which a kernel for a box is run.

    Along one axis: the ends of the range and their neighbours, the first four (each remainder of the smallest tile),
    for each tile height its first multiple in the range and its neighbours, and 257. Of several axes, fewer of each,
    and of the combinations as many as are needed for each to occur, up to a number.
    """
    if operator.axes == ("M",):
        yield from ({"M": m} for m in _along(box["M"]))
        return
    batches = [m for m in (1, 3) if {"batch": m} in Box((("batch", box["batch"]),))] or [box["batch"][0]]
    yielded: set[tuple[int, ...]] = set()
    queries, lengths = _few(box["seq"]), _few(box["kv_len"]) if "kv_len" in operator.axes else [0]
    combinations = [
        (batch, seq, kv_len)
        for (seq, kv_len), batch in product(product(queries, lengths), batches)
        if not kv_len or seq <= kv_len
    ]
    combinations += [
        (batches[0], seq, seq) for seq in queries if {"kv_len": seq} in Box((("kv_len", box["kv_len"]),))
    ]
    step = max(1, len(combinations) // _MOST)
    # The first and the last matter, and of those between every `step`th, which walks through all axes.
    for combination in [*combinations[::step], combinations[-1]] if combinations else []:
        if combination not in yielded:
            yielded.add(combination)
            batch, seq, kv_len = combination
            known = {"batch": batch, "seq": seq, "kv_len": kv_len}
            yield {axis: known[axis] for axis in operator.axes}


def _along(bounds: Bounds) -> list[int]:
    first, last = bounds
    edges = [first, *(-(-first // tile) * tile for tile in _TILES), *([last] if last is not None else [])]
    wanted = {_MANY, first + 2, first + 3, *(edge + step for edge in edges for step in (-1, 0, 1))}
    return sorted(m for m in wanted if m >= first and (last is None or m <= last))


def _few(bounds: Bounds) -> list[int]:
    first, last = bounds
    edges = [
        first,
        *(-(-first // tile) * tile for tile in (TILE, GRANULE)),
        *([last] if last is not None else []),
    ]
    wanted = {first + 129, *(edge + step for edge in edges for step in (-1, 0, 1))}
    return sorted(m for m in wanted if m >= first and (last is None or m <= last))


def status_of(operator: Operator, points: Sequence[dict[str, int]]) -> str:
    """What a kernel that passed at these sizes may say of itself."""
    if operator.axes == ("M",):
        return f"checked at M={', '.join(str(point['M']) for point in points)}"
    return f"checked at {len(points)} combinations of {', '.join(operator.axes)}"


def all_sizes(operator: Operator, point: dict[str, int]) -> dict[str, int]:
    """The sizes by which kernels are chosen, and those that follow from them: the cache's capacity in tiles."""
    if "kv_len" not in operator.axes:
        return point
    return {**point, "tiles": -(-point["kv_len"] // GRANULE) * GRANULE // TILE}
