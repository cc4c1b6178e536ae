"""The comparison fails on everything that must not pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .comparison import BOUND, assert_logits_agree, distance


def _logits() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).normal(size=(3, 7, 131)).astype(np.float32)


def test_equal_logits_agree() -> None:
    assert_logits_agree(_logits(), _logits(), "itself")
    assert distance(_logits(), _logits()) == 0.0


def test_one_value_beyond_the_bound_is_named() -> None:
    ours = _logits()
    ours[2, 5, 17] += 1.01 * BOUND * np.abs(ours[2, 5]).max()
    with pytest.raises(AssertionError, match=r"here: 1 of 21 positions.*the first is \(2, 5\)"):
        assert_logits_agree(ours, _logits(), "here")


def test_the_bound_is_relative_to_the_position_itself() -> None:
    reference = _logits()
    reference[1] *= 1000
    ours = reference.copy()
    ours[0, 0, 0] += 2 * BOUND * np.abs(reference[0, 0]).max()
    with pytest.raises(AssertionError, match="differ by more than"):
        assert_logits_agree(ours, reference, "beside large ones")


def test_another_argmax_is_caught_where_the_reference_is_decided() -> None:
    reference = _logits()
    scale = np.abs(reference[0, 0]).max() + 1
    reference[0, 0, 3], reference[0, 0, 4] = scale, scale * (1 - 1.5 * BOUND)
    ours = reference.copy()
    ours[0, 0, 3], ours[0, 0, 4] = scale * (1 - 0.9 * BOUND), scale * (1 - 0.7 * BOUND)
    with pytest.raises(AssertionError, match="another argmax"):
        assert_logits_agree(ours, reference, "near a tie")
    reference[0, 0, 4] = scale * (1 - 0.5 * BOUND)
    assert_logits_agree(ours, reference, "a tie")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_caught(bad: float) -> None:
    ours = _logits()
    ours[0, 0, 0] = bad
    with pytest.raises(AssertionError, match="not finite"):
        assert_logits_agree(ours, _logits(), "a hole")


def test_shape_and_dtype_are_checked() -> None:
    with pytest.raises(AssertionError, match="expected shape"):
        assert_logits_agree(_logits()[:1], _logits(), "one row")
    with pytest.raises(AssertionError, match="expected float32"):
        assert_logits_agree(_logits().astype(np.float64), _logits(), "wide")
