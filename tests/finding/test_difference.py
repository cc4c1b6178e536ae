"""How far apart two tensors are, and how far they may be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from relax_llm.numerics import bounds
from relax_llm.numerics.difference import difference, divergence


def _tensor(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_nothing_between_a_tensor_and_itself() -> None:
    found = difference(_tensor(2, 3, 8), _tensor(2, 3, 8))
    assert (found.max_abs, found.relative, found.ulp) == (0, 0, 0)
    assert found.cosine == pytest.approx(1)
    assert difference(np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32)).relative == 0


def test_the_worst_element_for_its_row_is_named() -> None:
    right = np.array([[1000.0, 1.0], [1.0, 0.5]], np.float32)
    ours = right + np.array([[1.0, 0.0], [0.0, -0.25]], np.float32)
    found = difference(ours, right)
    assert (found.max_abs, found.relative, found.index) == (1.0, 0.25, (1, 1))
    assert (found.value, found.reference) == (0.25, 0.5)


def test_what_was_added_to_a_residual_is_measured_by_itself() -> None:
    """A residual of 1000 excuses what is wrong with its own element, and with no other of the row."""
    residual = np.array([[1000.0, 0.0, 2.0]])
    right = residual + np.array([[1.0, -2.0, 0.5]])
    ours = right + np.array([[0.5, 0.0, 0.2]])
    found = difference(ours, right, residual)
    assert found.index == (0, 2)
    assert found.relative == pytest.approx(0.2 / (2.0 + 2.0))


@pytest.mark.parametrize("value", [1.0, -1.0, 1e-30, -3e20])
def test_ulps_are_numbers_between(value: float) -> None:
    right = np.full(4, value, np.float32)
    ours = right.copy()
    for _ in range(3):
        ours[2] = np.nextafter(ours[2], np.float32(np.inf))
    assert difference(ours, right).ulp == 3
    around = np.array([np.nextafter(np.float32(0), np.float32(1))])
    assert difference(around, -around).ulp == 2


def test_a_row_of_zeros_has_no_scale() -> None:
    zeros = np.zeros((2, 3), np.float32)
    assert difference(zeros + np.float32(1e-9), zeros).relative == math.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_differs_but_from_itself(bad: float) -> None:
    right = _tensor(2, 4)
    ours = right.copy()
    ours[1, 2] = bad
    found = difference(ours, right)
    assert (found.relative, found.max_abs, found.ulp, found.index) == (math.inf, math.inf, math.inf, (1, 2))
    assert difference(right, ours).relative == math.inf
    assert difference(ours, ours).relative == 0


def test_whole_numbers() -> None:
    found = difference(np.array([[1, 2]], np.int32), np.array([[1, 3]], np.int32))
    assert (found.max_abs, found.ulp) == (1, math.inf)


def test_divergence() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.25]))
    assert divergence(logits + 7, logits) == pytest.approx(0, abs=1e-15)
    other = np.log(np.array([0.25, 0.5, 0.25]))
    assert divergence(other, logits) == pytest.approx(0.25 * math.log(2))
    assert divergence(np.array([np.nan, 0, 0]), logits) == math.inf


@pytest.mark.parametrize(
    ("operator", "problem"),
    [
        ("matmul", {"k": 576}),
        ("norm", {"hidden": 576}),
        ("attention", {"head_dim": 64}),
        ("append", {"rope": True}),
        ("rope_table", {}),
        ("fused", {}),
    ],
)
def test_bounds_are_above_rounding_and_below_mistakes(operator: str, problem: dict[str, Any]) -> None:
    """A term that is lost from a sum of n is about a share of 1/n of it; one from softmax 1/kv_len."""
    bound = bounds.share(operator, problem, 300, ("f32", "f32"))
    assert 2 * bounds.UNIT < bound < 1 / 4096


def test_bounds_of_what_computes_nothing_and_of_other_formats() -> None:
    assert bounds.share("embedding", {}, 5, ("f32", "f32")) == 0
    assert bounds.share("last_token", {}, 5, ("bf16", "bf16")) == 0
    product = {"k": 64, "gated": False}
    plain = bounds.share("matmul", product, 5, ("q4", "q4"))
    assert plain == bounds.share("matmul", product, 5, ("f32", "f32"))
    widths = [bounds.share("matmul", product, 5, (name, "f32")) for name in ("f16", "bf16", "q8", "q4")]
    assert widths == sorted(widths)
    assert widths[0] > plain
    assert bounds.share("matmul", product, 5, ("f32", "q8")) == widths[2]
