"""Dividing sizes among kernels: the ranges of least expected time, for a limited number of kernels.

Exact, by dynamic programming over the sizes for each set of kernels that can still win.
"""

from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt

from relax_llm.errors import InputError

Matrix = npt.NDArray[np.float64]

_SETS = 20_000
"""Sets of kernels that are compared one by one; where there are more, sets are improved kernel by kernel."""


def divide(cost: Matrix, limit: int, price: float = 0.0) -> list[tuple[int, int]]:
    """The cheapest division of sizes into ranges.

    Args:
        cost: Expected seconds of each kernel at each size, [kernels, sizes]; infinite where it is not valid.
        limit: The most kernels that may be used.
        price: What each range beyond the first costs: a branch in the dispatcher, and a guard against dividing by
            noise.

    Returns:
        (index of the first size, index of the kernel), ascending.

    Raises:
        InputError: No set of kernels within the limit serves every size.
    """
    starts = _blocks(cost)
    blocks: Matrix = np.add.reduceat(cost, starts, axis=1)
    chosen = _search(blocks, limit, price)
    return [(int(starts[block]), kernel) for block, kernel in chosen]


def expense(cost: Matrix, division: list[tuple[int, int]], price: float = 0.0) -> float:
    """What a division costs."""
    ends = [*(start for start, _ in division[1:]), cost.shape[1]]
    parts = (
        float(cost[kernel, start:end].sum()) for (start, kernel), end in zip(division, ends, strict=True)
    )
    return sum(parts) + price * (len(division) - 1)


def _blocks(cost: Matrix) -> npt.NDArray[np.intp]:
    """Where the order of the kernels changes: nowhere else does it pay to change from one to another."""
    order = np.argsort(cost, axis=0, kind="stable")
    changed = (order[:, 1:] != order[:, :-1]) | (np.isinf(cost[:, 1:]) != np.isinf(cost[:, :-1]))
    return np.concatenate([[0], np.flatnonzero(changed.any(axis=0)) + 1])


def _search(cost: Matrix, limit: int, price: float) -> list[tuple[int, int]]:
    kernels = len(cost)
    size = min(limit, kernels)
    if size < 1:
        raise InputError(f"The limit of kernels must be at least 1, not {limit}.")
    sets = combinations(range(kernels), size) if comb(kernels, size) <= _SETS else _climb(cost, size)
    # Without the price of ranges a set costs the sum of its minima: a lower bound, by which the search can end early.
    bounds = sorted((float(cost[list(members)].min(axis=0).sum()), members) for members in sets)
    best: tuple[float, list[tuple[int, int]]] | None = None
    for bound, members in bounds:
        if np.isinf(bound) or (best is not None and bound >= best[0]):
            break
        total, division = _shortest(cost, members, price)
        if best is None or total < best[0]:
            best = (total, division)
    if best is None:
        raise InputError(f"No {size} of the {kernels} kernels serve every size; allow more kernels.")
    return best[1]


def _climb(cost: Matrix, size: int) -> list[tuple[int, ...]]:
    """A good set where there are too many to compare: the best additions one by one, then exchanges while they pay."""

    def bound(members: list[int]) -> float:
        # Sizes that nothing serves yet count as a hundred times the worst, so that additions first cover all.
        worst = 100 * cost[np.isfinite(cost)].max()
        return float(np.minimum(cost[members].min(axis=0), worst).sum())

    members: list[int] = []
    while len(members) < size:
        left = [kernel for kernel in range(len(cost)) if kernel not in members]
        members.append(min(left, key=lambda kernel: bound([*members, kernel])))
    improved = True
    while improved:
        improved = False
        for index in range(size):
            for kernel in range(len(cost)):
                trial = [*members[:index], kernel, *members[index + 1 :]]
                if kernel not in members and bound(trial) < bound(members):
                    members, improved = trial, True
    return [tuple(sorted(members))]


def _shortest(cost: Matrix, members: tuple[int, ...], price: float) -> tuple[float, list[tuple[int, int]]]:
    """The cheapest division among some kernels: dynamic programming over the blocks, by the kernel that serves each."""
    part = cost[list(members)]
    total = part[:, 0].copy()
    came = np.zeros(part.shape, np.intp)  # [kernels, blocks]: which kernel served the block before
    stay = np.arange(len(members))
    for block in range(1, part.shape[1]):
        cheapest = int(np.argmin(total))
        change = total[cheapest] + price < total
        came[:, block] = np.where(change, cheapest, stay)
        total = np.where(change, total[cheapest] + price, total) + part[:, block]
    at = int(np.argmin(total))
    end = float(total[at])
    served = [at]
    for block in range(part.shape[1] - 1, 0, -1):
        at = int(came[at, block])
        served.append(at)
    served.reverse()
    return end, [
        (block, members[kernel])
        for block, kernel in enumerate(served)
        if block == 0 or served[block - 1] != kernel
    ]
