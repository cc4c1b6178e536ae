"""Fitted laws, against times that obey known ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from relax_llm.tuning.law import TILES, Curve, Law, fit

from .laws import GEMV, LARGE, SMALL, at

MEASURED = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    12,
    13,
    16,
    24,
    25,
    32,
    33,
    48,
    57,
    64,
    96,
    128,
    200,
    256,
    512,
    1024,
    2048,
)
ALL = np.arange(1, 4097)


def points(law: Law, noise: float = 0.0) -> dict[int, float]:
    rng = np.random.default_rng(1)
    return {size: at(law, size) * float(np.exp(noise * rng.standard_normal())) for size in MEASURED}


@pytest.mark.parametrize("law", [GEMV, SMALL, LARGE], ids=["gemv", "small", "large"])
def test_a_known_law_is_recovered(law: Law) -> None:
    found = fit(points(law))
    assert np.allclose(found.seconds(ALL), law.seconds(ALL), rtol=1e-6)
    if law.per_tile:
        assert found.tile == law.tile


@given(
    st.floats(0, 1e-4), st.floats(0, 1e-4), st.floats(0, 1e-4), st.floats(5e-7, 1e-4), st.sampled_from(TILES)
)
@settings(max_examples=100, deadline=None)
def test_any_law_is_predicted_where_it_was_not_measured(
    floor: float, fixed: float, per_tile: float, per_row: float, tile: int
) -> None:
    law = Law(floor, fixed, per_tile, per_row, tile)
    within = ALL[: MEASURED[-1]]
    misses = np.abs(Curve.through(points(law)).seconds(within) / law.seconds(within) - 1)
    assert np.mean(misses) < 0.01
    assert np.max(misses) < 0.3  # where the floor ends in the middle of a tile that no measured size is in


def test_noise_is_not_magnified() -> None:
    found = Curve.through(points(LARGE, noise=0.01)).seconds(ALL)
    assert np.max(np.abs(found / LARGE.seconds(ALL) - 1)) < 0.08
    assert np.mean(np.abs(found / LARGE.seconds(ALL) - 1)) < 0.02


def test_a_curve_passes_through_what_was_measured_whatever_the_law() -> None:
    odd = {1: 10e-6, 2: 50e-6, 3: 20e-6, 64: 21e-6, 65: 400e-6}
    curve = Curve.through(odd)
    assert {size: curve.at(size) for size in odd} == pytest.approx(odd)
    between = curve.at(20)
    assert 15e-6 < between < 60e-6


@pytest.mark.parametrize("size", [1, 16])
def test_of_one_point_a_time_that_grows_with_the_rows(size: int) -> None:
    curve = Curve.through({size: 32e-6})
    assert curve.at(size) == pytest.approx(32e-6)
    assert curve.at(1) == pytest.approx(32e-6)
    assert curve.at(10 * size) == pytest.approx(320e-6)


def test_terms_are_never_negative() -> None:
    falling = {1: 50e-6, 2: 40e-6, 4: 30e-6, 8: 20e-6}
    law = fit(falling)
    assert min(law.floor, law.fixed, law.per_tile, law.per_row) >= 0
