"""Kernels over rows that are cut into pieces: the largest of logits, and their probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from relax_llm.kernels.argmax import Argmax
from relax_llm.kernels.operators import operator_of
from relax_llm.kernels.softmax import Softmax

from .bench import HOST, launch, random
from .guarded import Out

WIDE = 150_001  # Three pieces of argmax, with a rest behind the last block.


@pytest.mark.parametrize("at", [0, 63, 64, 50_047, 50_048, 99_999, 149_999, 150_000])
def test_the_largest_of_a_long_row_is_found_wherever_it_is(at: int) -> None:
    x = random(1, 2, WIDE)
    x[0, 0, at] = x[0, 1, WIDE - 1 - at] = 9
    (out,) = launch(Argmax(WIDE), HOST, x, Out((1, 2, 1), "int32"))
    assert out[0, :, 0].tolist() == [at, WIDE - 1 - at]


@pytest.mark.parametrize(
    "value", [np.inf, 2.0, -0.0, np.nan, -np.nan], ids=["inf", "finite", "zero", "nan", "negative nan"]
)
def test_of_equal_ones_in_different_pieces_the_first_is_taken(value: float) -> None:
    x = np.full((1, 1, WIDE), -3, np.float32)
    x[0, 0, [70_001, 70_002, 120_000, WIDE - 1]] = value
    x[0, 0, 120_001] = 0.0 if value == 0 else -1.0  # another zero is no larger
    if np.isnan(value):
        x[0, 0, 5] = np.inf  # which NaN outranks
    (out,) = launch(Argmax(WIDE), HOST, x, Out((1, 1, 1), "int32"))
    assert out.item() == x.argmax() == 70_001


def test_where_all_is_ruled_out_the_first_is_taken() -> None:
    x = np.full((1, 1, WIDE), -np.inf, np.float32)
    (out,) = launch(Argmax(WIDE), HOST, x, Out((1, 1, 1), "int32"))
    assert out.item() == 0


@pytest.mark.parametrize("width", [8192, 20_003])
def test_probabilities_of_a_long_row(width: int) -> None:
    """Pieces differ in their largest element by more than a float's range of exponents, one has nothing but -inf."""
    problem = Softmax(width, tempered=True)
    x = random(1, 4, width)
    x[0, 1] *= 100
    x[0, 2, : width // 2] -= 1000
    x[0, 3, width // 4 :] = -np.inf
    values = {"x": x, "temperature": np.array([[1.0, 0.7, 2.0, 0.3]], np.float32)}
    (out,) = launch(problem, HOST, *values.values(), Out(x.shape))
    said = operator_of(problem).expected(problem, {"batch": 1, "seq": 4}, values, False)["out"]
    assert (np.abs(out[0] - said.right) <= said.bound).all()
    assert np.abs(out.sum(axis=-1) - 1).max() < 1e-5
    assert (out[0, 3, width // 4 :] == 0).all()


@pytest.mark.parametrize("width", [8192, 20_003])
def test_a_row_does_not_depend_on_those_beside_it(width: int) -> None:
    x = random(1, 3, width)
    (whole,) = launch(Softmax(width), HOST, x, Out(x.shape))
    for row in range(3):
        (alone,) = launch(Softmax(width), HOST, x[:, row : row + 1].copy(), Out((1, 1, width)))
        np.testing.assert_array_equal(alone[0, 0], whole[0, row])


@pytest.mark.parametrize("spoil", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("width", [33, 20_003])
def test_what_has_no_probabilities_is_nan(spoil: float, width: int) -> None:
    x = random(1, 2, width)
    x[0, 0, width // 2 if spoil != -np.inf else slice(None)] = spoil
    (out,) = launch(Softmax(width), HOST, x, Out(x.shape))
    assert np.isnan(out[0, 0]).all()
    assert np.isfinite(out[0, 1]).all()
