"""Products in integers: within what the problem allows, the same bits for every M, and NaN where there is one."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from relax_llm import cpu
from relax_llm.formats import FORMATS
from relax_llm.kernels.checking import check
from relax_llm.kernels.forms import realize
from relax_llm.kernels.machine import machine
from relax_llm.kernels.matmul import Matmul, reference
from relax_llm.kernels.matmul.family import matmul_kernels
from relax_llm.kernels.matmul.integer import FEATURES
from relax_llm.kernels.matmul.shape import layout_for
from relax_llm.kernels.norm import Norm
from relax_llm.plan.choosing import cover
from relax_llm.plan.kernel import Declined

from .bench import generate, launch_function, random
from .guarded import Out

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

    from relax_llm.plan.kernel import Kernel

    Array = npt.NDArray[Any]

pytestmark = pytest.mark.skipif(not cpu.features() >= FEATURES, reason="this processor has no VNNI")

LAYER_NORM = Norm(1301, 1e-5, centered=True, bias=True)
PLAIN = Matmul(70, 100, "q8", activations="int8")
WAYS = [
    (PLAIN, "integer8"),
    (PLAIN, "integer16"),
    *((Matmul(70, 100, weights, activations="int7"), "integer8") for weights in ("q8", "q4s", "q4")),
]


def _kernel(name: str) -> Kernel:
    return next(kernel for kernel in matmul_kernels(machine()) if kernel.name == name)


@pytest.mark.parametrize(
    ("problem", "name"),
    [
        (Matmul(70, 33, "q4s", activation="silu", gated=True, activations="int16"), "integer16"),
        (Matmul(40, 1300, "q4", bias=True, residual=True, activations="int16"), "integer16"),
        (Matmul(70, 1300, "q8", activation="silu", gated=True, activations="int8"), "integer8"),
        (Matmul(21, 19, "q4", bias=True, activations="int8"), "integer8"),
        (Matmul(70, 1300, "q4", bias=True, gated=True, activations="int7"), "integer8"),
        (Matmul(37, 75, "q4s", residual=True, activations="int7"), "integer8"),
        (Matmul(33, 40, "q4", activations="int7"), "integer16"),
        (Matmul(70, 1300, "q6", residual=True, activations="int16"), "integer16"),
        (Matmul(40, 64, "q8", bias=True, activations="int8", norm=Norm(64, 1e-5)), "integer8"),
        (Matmul(38, 1301, "q4", gated=True, activations="int7", norm=LAYER_NORM), "integer8"),
        (Matmul(21, 1301, "q8", residual=True, activations="int16", norm=LAYER_NORM), "integer16"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_the_check_at_the_door(
    problem: Matmul, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 within the steps of the activations, and exactly where these are integers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert check(realize(_kernel(name), problem, machine()), machine()).startswith("checked at M=")


@cache
def _function(problem: Matmul, name: str) -> Callable[..., None]:
    func = _kernel(name).make(problem).with_attr("global_symbol", "kernel")
    function: Callable[..., None] = generate(func, machine())["kernel"]
    return function


def _run(problem: Matmul, name: str, x: Array, weight: Array) -> Array:
    packed = layout_for(problem, machine()).pack(FORMATS[problem.weight_format].encode(weight))
    (out,) = launch_function(_function(problem, name), name, x, packed, Out((len(x), problem.outputs)))
    return out


@pytest.mark.parametrize(
    ("weights", "activations", "name"),
    [("q8", "int8", "integer8"), ("q4", "int8", "integer16"), ("q4", "int7", "integer8")],
)
def test_a_row_does_not_depend_on_those_beside_it(weights: str, activations: str, name: str) -> None:
    problem = Matmul(70, 2100, weights, activations=activations)  # more than one part of the reduction
    weight, x = random(70, 2100), random(400, 2100, seed=1)  # more than one block of rows
    whole = _run(problem, name, x, weight)
    for rows in (slice(0, 1), slice(3, 9), slice(100, 117), slice(399, 400)):
        np.testing.assert_array_equal(whole[rows], _run(problem, name, x[rows], weight))


def test_the_more_is_kept_the_nearer_it_is() -> None:
    weight, x = random(70, 100), random(33, 100, seed=1)
    right = _right(PLAIN, x, weight)
    coarse = replace(PLAIN, activations="int7")
    ways = ((coarse, "integer8"), (PLAIN, "integer8"), (PLAIN, "integer16"))
    errors = [float(np.sqrt(np.square(_run(*way, x, weight) - right).mean())) for way in ways]
    assert 1.2 * errors[1] < errors[0] < 2 * errors[1]
    assert errors[1] > 100 * errors[2]


def _right(problem: Matmul, x: Array, weight: Array) -> Array:
    format = FORMATS[problem.weight_format]
    return reference(problem, {"x": x, "weight": format.decode(format.encode(weight), problem.k)})


@pytest.mark.parametrize(("problem", "name"), WAYS)
def test_what_is_not_finite_stays_so_and_stays_in_its_row(problem: Matmul, name: str) -> None:
    weight, x = random(70, 100), random(12, 100, seed=1)
    clean = _run(problem, name, x, weight)
    broken = x.copy()
    broken[2, 40], broken[5, 99], broken[8, 0] = np.nan, np.inf, -np.inf
    out = _run(problem, name, broken, weight)
    assert not np.isfinite(out[[2, 5, 8]]).any()
    kept = [row for row in range(12) if row not in (2, 5, 8)]
    np.testing.assert_array_equal(out[kept], clean[kept])


@pytest.mark.parametrize(("problem", "name"), WAYS)
def test_zeros_and_the_smallest_and_largest_numbers(problem: Matmul, name: str) -> None:
    weight, x = random(70, 100), random(9, 100, seed=1)
    x[1] = 0
    x[2] *= np.float32(1e-40)
    x[3, :32] = 0
    x[4] *= np.float32(1e30)
    x[5] *= np.float32(1e36)
    out = _run(problem, name, x, weight)
    assert (out[1] == 0).all()
    assert np.abs(out[2]).max() < 1e-36
    right = _right(problem, x, weight)
    for row in (3, 4):
        assert np.abs(out[row] - right[row]).max() < 0.05 * np.abs(right[row]).max()
    if problem.activations == "int7":  # no power of two leaves room for what is as large
        assert np.isnan(out[5]).all()
    else:
        assert np.abs(out[5] - right[5]).max() < 0.05 * np.abs(right[5]).max()


def test_a_scale_is_the_smallest_power_of_two_that_covers_its_group() -> None:
    """Where the largest of a group is 127 times a power of two it has the largest code, and just above half of that."""
    problem = Matmul(1, 32, "q8", activations="int7")
    weight = np.zeros((1, 32), np.float32)
    weight[0, 0] = 1.0
    for exponent in (-100, -1, 0, 7, 80):
        unit = np.float32(2.0) ** exponent
        x = np.zeros((3, 32), np.float32)
        x[:, 1] = np.array([127, np.nextafter(np.float32(127), np.float32(200)), 63.5], np.float32) * unit
        x[:, 0] = 0.7 * unit
        out = _run(problem, "integer8", x, weight)
        # A unit is the step of the first; of the second it is twice that, of the third half.
        np.testing.assert_allclose(out[:, 0], np.array([1, 0, 0.5], np.float32) * unit, rtol=1e-3)


def test_they_serve_only_what_allows_it() -> None:
    for name, allowed in (("integer8", {"int7", "int8"}), ("integer16", {"int7", "int8", "int16"})):
        for activations in (None, "int7", "int8", "int16"):
            problem = Matmul(32, 32, "q4", activations=activations)
            if activations in allowed:
                _kernel(name).make(problem)
            else:
                with pytest.raises(Declined, match=f"wants them in {activations or 'f32'}"):
                    _kernel(name).make(problem)


def test_few_rows_are_multiplied_precisely_and_many_fast() -> None:
    tiled = [kernel for kernel in matmul_kernels(machine()) if kernel.layout == "tiled"]
    for weights in ("q8", "q6", "q4", "q4s"):
        kernels = [kernel for kernel in tiled if weights in kernel.weights]
        for activations in ("int7", "int8"):
            parts = cover(kernels, Matmul(3072, 576, weights, activations=activations), ("M",))
            assert [(part.kernel, part.sizes["M"]) for part in parts] == [
                ("integer16", (1, 8)),
                ("integer8", (9, None)),
            ]
