"""Positions, and the cosines and sines of rotary embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from relax_llm.kernels.positions import Positions, RopeTable

from ..tolerances import TABLE, UNIT, assert_within
from .bench import every_machine, launch, machines
from .guarded import Out

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

STEPS = ((1, 1), (1, 2), (16, 16), (17, 17), (1, 65), (64, 65), (300, 1000), (1, 131072), (20, 131072))
"""(seq, kv_len); sixteen positions are the last that one core computes alone."""


@every_machine
def test_positions(on: str) -> None:
    for seq, kv_len in STEPS:
        (out,) = launch(Positions(), on, kv_len, Out((1, seq), "int32"))
        np.testing.assert_array_equal(out, np.arange(kv_len - seq, kv_len)[None])


def _frequencies(half: int, theta: float = 10000.0) -> tuple[float, ...]:
    return tuple(float(np.float32(theta ** (-i / half))) for i in range(half))


def _check(
    problem: RopeTable, on: str, seq: int, kv_len: int, frequencies: Array, extra: float = 0.0
) -> None:
    """Compare a table with angles in float64; `extra` is the relative error of the frequencies themselves."""
    (out,) = launch(problem, on, kv_len, Out((seq, 2, len(problem.inverse_frequencies))))
    angles = np.arange(kv_len - seq, kv_len)[:, None] * frequencies
    expected = problem.magnitude * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # An angle is rounded to float32, as in every implementation: far away that is more than the cosine's own error.
    allowed = abs(problem.magnitude) * (TABLE + np.abs(angles) * (UNIT["float32"] + extra))[:, None]
    assert_within(
        out, expected, np.broadcast_to(allowed, expected.shape), f"{problem.name}, {seq} up to {kv_len}"
    )


@every_machine
@pytest.mark.parametrize("half", [1, 3, 16, 40, 64])
@pytest.mark.parametrize("magnitude", [1.0, 0.7, 1.4142])
def test_rope_table(on: str, half: int, magnitude: float) -> None:
    problem = RopeTable(_frequencies(half), magnitude)
    for seq, kv_len in STEPS:
        _check(problem, on, seq, kv_len, np.array(problem.inverse_frequencies))


@every_machine
@pytest.mark.parametrize("half", [2, 5, 32])
def test_dynamic_rope_table(on: str, half: int) -> None:
    """Up to the original context the given frequencies; beyond it, those of a base that grows with the length."""
    theta, factor, original = 3000.0, 4.0, 81
    problem = RopeTable(_frequencies(half, theta), 1.0, (theta, factor, original))
    for seq, kv_len in ((1, 1), (81, 81), (1, 81), (1, 82), (82, 82), (16, 100), (17, 324), (324, 324)):
        frequencies, extra = np.array(problem.inverse_frequencies), 0.0
        if kv_len > original:
            dim = 2 * half
            base = theta * (factor * kv_len / original - (factor - 1.0)) ** (dim / (dim - 2))
            frequencies, extra = base ** (-np.arange(half) / half), UNIT["float32"]
        _check(problem, on, seq, kv_len, frequencies, extra)


@machines
def test_position_zero_is_no_rotation(on: str) -> None:
    (out,) = launch(RopeTable(_frequencies(8)), on, 5, Out((5, 2, 8)))
    np.testing.assert_array_equal(out[0, 0], 1.0)
    np.testing.assert_array_equal(out[0, 1], 0.0)
