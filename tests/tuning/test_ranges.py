"""The division of sizes among kernels, against trying all of them."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings, strategies as st

from relax_llm.errors import InputError
from relax_llm.tuning.ranges import divide, expense

Matrix = npt.NDArray[np.float64]


def assigned(division: list[tuple[int, int]], sizes: int) -> list[int]:
    """The kernel of each size; a division must begin at the first and ascend."""
    starts = [start for start, _ in division]
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert starts[-1] < sizes
    ends = [*starts[1:], sizes]
    return [kernel for (start, kernel), end in zip(division, ends, strict=True) for _ in range(start, end)]


def cheapest(cost: Matrix, limit: int, price: float) -> float:
    """The least that any assignment costs, by trying all."""
    kernels, sizes = cost.shape
    best = np.inf
    for choice in product(range(kernels), repeat=sizes):
        if len(set(choice)) <= limit:
            changes = sum(a != b for a, b in pairwise(choice))
            best = min(best, sum(cost[k, i] for i, k in enumerate(choice)) + price * changes)
    return float(best)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Matrix, int, float]:
    kernels, sizes = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    numbers = st.one_of(st.integers(0, 6).map(float), st.just(np.inf))
    rows = draw(
        st.lists(st.lists(numbers, min_size=sizes, max_size=sizes), min_size=kernels, max_size=kernels)
    )
    return np.array(rows), draw(st.integers(1, 5)), draw(st.sampled_from([0.0, 0.5, 1.0, 2.5]))


@given(problems())
@settings(max_examples=300, deadline=None)
def test_as_cheap_as_the_best_of_all_assignments(problem: tuple[Matrix, int, float]) -> None:
    cost, limit, price = problem
    best = cheapest(cost, limit, price)
    if np.isinf(best):
        with pytest.raises(InputError, match="serve every size"):
            divide(cost, limit, price)
        return
    division = divide(cost, limit, price)
    kernels = assigned(division, cost.shape[1])
    assert len(set(kernels)) <= limit
    assert expense(cost, division, price) == pytest.approx(best)
    assert sum(cost[k, i] for i, k in enumerate(kernels)) + price * (len(division) - 1) == pytest.approx(best)


def test_a_kernel_may_serve_two_ranges() -> None:
    cost = np.array([[1.0, 9, 1], [9, 1, 9]])
    assert divide(cost, 2) == [(0, 0), (1, 1), (2, 0)]
    assert divide(cost, 2, price=5.0) == [(0, 0)]
    assert divide(cost, 1) == [(0, 0)]


def test_the_limit_counts_kernels_and_the_best_pair_is_not_the_best_single_and_a_second() -> None:
    generalist = [3.0, 3, 3, 3]
    low, high = [1.0, 1, 9, 9], [9.0, 9, 1, 1]
    cost = np.array([generalist, low, high])
    assert divide(cost, 1) == [(0, 0)]
    assert divide(cost, 2) == [(0, 1), (2, 2)]


@pytest.mark.parametrize("limit", [0, -3])
def test_no_kernels_serve_nothing(limit: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        divide(np.ones((2, 3)), limit)


def test_more_kernels_than_sets_can_be_compared() -> None:
    """30 kernels in threes: each third of the sizes has one that is best, found by exchanges."""
    rng = np.random.default_rng(0)
    cost = rng.uniform(5, 6, (30, 90))
    for third, kernel in enumerate((7, 19, 3)):
        cost[kernel, 30 * third : 30 * (third + 1)] = 1.0
    many: Any = divide(cost, 8, price=0.01)
    assert {kernel for _, kernel in many} == {7, 19, 3}
    assert [start for start, _ in many] == [0, 30, 60]
