"""Ranges for kernels by precedence and predicted cost: what serves before anything was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from relax_llm.plan.kernel import Kernel
from relax_llm.plan.plan import Range
from relax_llm.plan.sizes import Box, cells, corner

_GRID = (
    *range(1, 17),
    20,
    24,
    28,
    32,
    40,
    48,
    56,
    64,
    80,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    2048,
    4096,
)
"""Sizes at which predicted costs are compared."""

_WORTH = 0.97
"""A kernel takes over from the one that serves the sizes below only where it is predicted to be this much faster."""


def cover(kernels: Sequence[Kernel], problem: Any, axes: Sequence[str]) -> tuple[Range, ...]:
    """Give every size to a kernel.

    The first kernel that says no cost and is valid serves; kernels with a cost compete for what such leave over.

    Args:
        kernels: In the order of their precedence; together valid for every size.
        problem: What costs are asked for.
        axes: Names of the sizes.
    """
    boxes = [kernel.sizes for kernel in kernels]
    if any(kernel.cost for kernel in kernels):
        boxes += [Box(tuple((axis, (size, None)) for axis in axes)) for size in _GRID]
    ranges: list[Range] = []
    before: Kernel | None = None
    for cell in cells(axes, boxes):
        before = _serving(kernels, problem, corner(cell), before)
        ranges.append(Range(cell, before.name))
    return merged(ranges)


def _serving(
    kernels: Sequence[Kernel], problem: Any, sizes: Mapping[str, int], before: Kernel | None
) -> Kernel:
    valid = [kernel for kernel in kernels if sizes in kernel.sizes]
    if valid[0].cost is None or len(valid) == 1:
        return valid[0]
    costs = [(kernel.cost(problem, sizes), kernel) for kernel in valid if kernel.cost is not None]
    least, best = min(costs, key=lambda pair: pair[0])
    for cost, kernel in costs:
        if kernel is before and least > _WORTH * cost:
            return kernel
    return best


def merged(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """The same ranges with neighbours of one kernel joined, as far as boxes can be."""
    found = list(ranges)
    changed = True
    while changed:
        changed = False
        for at in range(len(found)):
            for other in range(at + 1, len(found)):
                joined = _joined(found[at], found[other])
                if joined:
                    found[at] = joined
                    del found[other]
                    changed = True
                    break
            if changed:
                break
    return tuple(found)


def _joined(one: Range, other: Range) -> Range | None:
    """Two ranges as one, if they have one kernel, differ along one axis and touch there."""
    if one.kernel != other.kernel:
        return None
    differ = [axis for axis, bounds in one.sizes.bounds if other.sizes[axis] != bounds]
    if len(differ) != 1:
        return None
    low, high = sorted((one.sizes[differ[0]], other.sizes[differ[0]]), key=lambda bounds: bounds[0])
    if low[1] is None or low[1] + 1 != high[0]:
        return None
    whole = tuple((a, (low[0], high[1]) if a == differ[0] else b) for a, b in one.sizes.bounds)
    return Range(Box(whole), one.kernel)
