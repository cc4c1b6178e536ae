"""Elementary functions over the whole range of float32, against float64, within what their docstrings state."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from relax_llm.kernels import builder as b, vectormath
from relax_llm.kernels.machine import LANES

from .bench import every_machine, generate, launch_function, machine_of, machines
from .guarded import Out

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Array = npt.NDArray[Any]

TINY = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)


def _sigmoid(x: Array) -> Array:
    decay = np.exp(-np.abs(x))
    result: Array = np.where(x >= 0, 1.0, decay) / (1.0 + decay)
    return result


def _erf(x: Array) -> Array:
    result: Array = torch.special.erf(torch.from_numpy(x)).numpy()
    return result


def _gelu(x: Array) -> Array:
    result: Array = 0.5 * x * torch.special.erfc(torch.from_numpy(-x / math.sqrt(2.0))).numpy()
    return result


REFERENCES: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp,
    "exp_nonpositive": lambda x: np.exp(np.minimum(x, 0.0)),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "gelu_tanh": lambda x: x * _sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)),
    "erf": _erf,
    "gelu": _gelu,
    "relu": lambda x: np.maximum(x, 0.0),
}


@cache
def _compiled(name: str, on: str, lanes: int) -> Callable[..., None]:
    def emit() -> None:
        rows = b.size("rows")
        x, out = b.argument("x", (rows, LANES)), b.argument("out", (rows, LANES))

        def task(row: Any) -> None:
            for start in range(0, LANES, lanes):
                value = getattr(vectormath, name)(b.load(x, row, start, lanes=lanes))
                b.store(out, value, row, start, lanes=lanes)

        b.tasks(rows, task)

    function: Callable[..., None] = generate(b.prim_func(name, emit), machine_of(on))[name]
    return function


def _apply(name: str, on: str, x: Array, lanes: int = LANES) -> Array:
    """Evaluate a function of `vectormath` on float32 values of any number."""
    padded = np.resize(x, -(-x.size // LANES) * LANES).reshape(-1, LANES)
    (out,) = launch_function(_compiled(name, on, lanes), name, padded, Out(padded.shape))
    return out.reshape(-1)[: x.size]


def _reference(name: str, x: Array) -> Array:
    with np.errstate(all="ignore"):
        result: Array = REFERENCES[name](x.astype(np.float64))
    return result


@lru_cache(maxsize=1)
def _whole_range() -> Array:
    """Finite values: a four-thousandth of all bit patterns, more where the functions bend, and the corners of each."""
    patterns = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32).view(np.float32)
    bends = np.linspace(-100, 100, 2**17, dtype=np.float32)
    corners = np.array(
        [
            0.0,
            1e-45,
            1e-40,
            TINY,
            1.0,
            87.3,
            87.33,
            87.4,
            88.0,
            88.37,
            88.38,
            88.72,
            88.73,
            104.0,
            1e4,
            1e30,
            LARGEST,
        ]
    )
    corners = np.concatenate([corners, -corners]).astype(np.float32)
    near = np.concatenate([np.nextafter(corners, np.float32(s * LARGEST)) for s in (-1, 1)])
    values = np.concatenate([patterns, bends, corners, near])
    finite: Array = values[np.isfinite(values)]
    return finite


def _ulps(ours: Array, reference: Array) -> Array:
    spacing = np.spacing(np.clip(np.abs(reference), TINY, LARGEST / 2).astype(np.float32)).astype(np.float64)
    return np.abs(ours.astype(np.float64) - reference) / spacing


def _assert_all(good: Array, x: Array, ours: Array, reference: Array) -> None:
    assert good.size, "nothing was compared"
    bad = np.flatnonzero(~good)
    assert bad.size == 0, (
        f"{bad.size} values, as f({x[bad[0]]!r}) = {ours[bad[0]]!r}, not {reference[bad[0]]!r}"
    )


@every_machine
@pytest.mark.parametrize(
    ("name", "low", "high", "ulps"),
    [("exp", -87.33, 88.37, 2), ("sigmoid", -87.33, LARGEST, 4), ("silu", -87.33, LARGEST, 4)],
)
def test_relative_errors(on: str, name: str, low: float, high: float, ulps: int) -> None:
    x = _whole_range()
    x = x[(x >= low) & (x <= high)]
    ours, reference = _apply(name, on, x), _reference(name, x)
    _assert_all(_ulps(ours, reference) <= ulps, x, ours, reference)


@machines
@pytest.mark.parametrize(
    ("name", "bound", "grows"),
    [
        ("silu", 2e-7, True),
        ("gelu_tanh", 2e-7, True),
        ("gelu", 3e-7, True),
        ("erf", 7e-7, False),
        ("relu", 0.0, False),
    ],
)
def test_absolute_errors(on: str, name: str, bound: float, grows: bool) -> None:
    x = _whole_range()
    ours, reference = _apply(name, on, x), _reference(name, x)
    allowed = bound * np.maximum(1.0, np.abs(x.astype(np.float64))) if grows else bound
    _assert_all(np.abs(ours.astype(np.float64) - reference) <= allowed, x, ours, reference)


@every_machine
def test_exp_of_nonpositive_numbers(on: str) -> None:
    """Within its bound, 1 at 0 and 0 below -87.7; so that a softmax gives no weight to what it masks."""
    x = _whole_range()
    x = x[(x <= 0) & (x >= -87.6)]
    fused = "fma" in machine_of(on).features
    ours, reference = _apply("exp_nonpositive", on, x), _reference("exp_nonpositive", x)
    _assert_all(_ulps(ours, reference) <= 3 + np.abs(x) / (30 if fused else 1), x, ours, reference)
    ends = np.array([0.0, -0.0, -87.7, -88.0, -1e4, -1e30, -LARGEST, -np.inf], np.float32)
    np.testing.assert_array_equal(_apply("exp_nonpositive", on, ends), [1, 1, 0, 0, 0, 0, 0, 0])


@machines
def test_beyond_its_range_exp_is_what_it_is_at_the_ends(on: str) -> None:
    below = np.array([-87.34, -88.0, -104.0, -1e4, -1e30, -LARGEST, -np.inf], np.float32)
    above = np.array([88.38, 89.0, 1e4, LARGEST, np.inf], np.float32)
    np.testing.assert_allclose(_apply("exp", on, below), TINY, rtol=4e-6)
    np.testing.assert_allclose(_apply("exp", on, above), math.exp(88.3762626647949), rtol=6e-6)
    assert 0 < _apply("sigmoid", on, below)[-1] < 5e-39
    below = np.concatenate([below[:-1], np.linspace(-88.5, -87.34, 1001, dtype=np.float32)])
    tail = _apply("silu", on, below).astype(np.float64) - _reference("silu", below)
    assert (np.abs(tail) <= 8.5e-39 * np.abs(below)).all()


@every_machine
@pytest.mark.parametrize("lanes", [1, LANES])
@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_not_a_number_and_signs(on: str, name: str, lanes: int) -> None:
    nan = np.full(LANES, np.nan, np.float32)
    nan[::2] = -np.nan
    assert np.isnan(_apply(name, on, nan, lanes)).all()
    if name != "exp_nonpositive":
        inf = float(_apply(name, on, np.array([np.inf], np.float32), lanes)[0])
        expected = {"exp": pytest.approx(2.406e38, rel=1e-3), "sigmoid": 1.0, "erf": 1.0}.get(name, math.inf)
        assert inf == expected
    zeros = _apply(name, on, np.array([0.0, -0.0], np.float32), lanes)
    np.testing.assert_array_equal(zeros, {"exp": 1.0, "exp_nonpositive": 1.0, "sigmoid": 0.5}.get(name, 0.0))


@machines
@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["exp", "gelu", "gelu_tanh"])
def test_every_number_of_lanes_computes_the_same(on: str, name: str, lanes: int) -> None:
    x = np.linspace(-90, 90, 1024, dtype=np.float32)
    whole = _apply(name, on, x).astype(np.float64)
    part = _apply(name, on, x, lanes).astype(np.float64)
    allowed = (
        np.maximum(np.abs(whole), TINY) * 2.0**-21 if name == "exp" else 2e-7 * np.maximum(1.0, np.abs(x))
    )
    assert (np.abs(whole - part) <= allowed).all()


@pytest.mark.slow
def test_monotone_where_softmax_needs_it() -> None:
    """exp of a smaller score is never larger, within its error; whole binades around 0 are tried."""
    x = -np.linspace(0, 88, 2**22, dtype=np.float32)
    ours = _apply("exp", "host", x).astype(np.float64)
    assert (ours[1:] <= ours[:-1] * (1 + 2.0**-22)).all()
    assert ours[0] == 1.0
