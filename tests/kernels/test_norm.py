"""RMSNorm and LayerNorm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from relax_llm.kernels.norm import Norm

from ..tolerances import ROUNDINGS, UNIT, assert_within, reduction
from .bench import every_machine, launch, machines, random
from .guarded import Out

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

HIDDEN = (1, 2, 15, 16, 17, 33, 77, 576)
ROWS = ((1, 1), (1, 4), (1, 5), (3, 1), (3, 7), (1, 65))  # four rows are the last that one core does alone
KINDS = {
    "rms": {},
    "layer": {"centered": True, "bias": True},
    "layer without bias": {"centered": True},
    "rms with bias": {"bias": True},
}
kinds = pytest.mark.parametrize("kind", list(KINDS))


def _reference(problem: Norm, x: Array, weight: Array, bias: Array | None) -> tuple[Array, Array]:
    """The norm in float64, and how far each of its elements may be missed."""
    unit, share = UNIT["float32"], reduction("float32", problem.hidden)
    x = x.astype(np.float64)
    centered, missed = x, np.zeros_like(x)
    if problem.centered:
        centered = x - x.mean(axis=-1, keepdims=True)
        # The mean is missed by a share of the mean magnitude; each difference is rounded, too.
        missed = share * np.abs(x).mean(axis=-1, keepdims=True) + unit * np.abs(x)
    variance = (centered**2).mean(axis=-1, keepdims=True)
    scale = 1.0 / np.sqrt(variance + problem.eps)
    plain = centered * scale * weight
    # The variance is missed through its own sum, and through the differences it is made of; its root halves that.
    relative = share + 2.0 * (missed * np.abs(centered)).mean(axis=-1, keepdims=True) * scale**2
    relative = relative + (missed**2).mean(axis=-1, keepdims=True) * scale**2
    allowed = np.abs(scale * weight) * missed + np.abs(plain) * (0.5 * relative + ROUNDINGS * unit)
    if bias is not None:
        plain = plain + bias
        allowed = allowed + unit * (np.abs(plain) + np.abs(bias))
    return plain, allowed + 1e-45


def _check(problem: Norm, on: str, x: Array) -> None:
    weight = random(problem.hidden, seed=1)
    bias = random(problem.hidden, seed=2) if problem.bias else None
    (out,) = launch(problem, on, x, weight, *([] if bias is None else [bias]), Out(x.shape))
    reference, allowed = _reference(problem, x, weight, bias)
    assert_within(out, reference, allowed, f"{problem.name} of {x.shape}")


@machines
@pytest.mark.parametrize(
    ("kind", "hidden"),
    [(kind, hidden) for kind in ("rms", "layer") for hidden in HIDDEN]
    + [("layer without bias", 17), ("rms with bias", 17)],
)
def test_sizes(on: str, kind: str, hidden: int) -> None:
    for batch, seq in ROWS:
        _check(Norm(hidden, 1e-5, **KINDS[kind]), on, random(batch, seq, hidden))


@machines
@kinds
@pytest.mark.parametrize(
    ("scale", "offset"),
    [(1.0, 1000.0), (1e-3, 100.0), (1e15, 0.0), (1e-6, 0.0), (1e-25, 0.0), (0.0, 0.0), (0.0, 3.0)],
)
def test_magnitudes(on: str, scale: float, offset: float, kind: str) -> None:
    """Rows that are nearly constant, far from zero, tiny against eps, or with squares that nearly overflow."""
    x = random(1, 5, 77) * np.float32(scale) + np.float32(offset)
    _check(Norm(77, 1e-6, **KINDS[kind]), on, x)


@every_machine
@kinds
def test_a_large_eps_counts(on: str, kind: str) -> None:
    _check(Norm(33, 0.5, **KINDS[kind]), on, random(2, 3, 33))


@machines
@kinds
def test_one_bad_row_stays_alone(on: str, kind: str) -> None:
    problem = Norm(33, 1e-5, **KINDS[kind])
    x = random(1, 9, 33)
    clean = x.copy()
    x[0, 4, 32] = np.nan
    vectors = [random(33, seed=1)] + ([random(33, seed=2)] if problem.bias else [])
    (out,) = launch(problem, on, x, *vectors, Out(x.shape))
    (expected,) = launch(problem, on, clean, *vectors, Out(x.shape))
    assert np.isnan(out[0, 4]).all()
    np.testing.assert_array_equal(np.delete(out, 4, axis=1), np.delete(expected, 4, axis=1))
