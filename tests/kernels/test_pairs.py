"""Products in bf16: those of the rounded activations, the same bits for every M, and NaN where there is one."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from relax_llm import cpu
from relax_llm.formats import FORMATS
from relax_llm.kernels.checking import check
from relax_llm.kernels.forms import realize
from relax_llm.kernels.intrinsics import BF16
from relax_llm.kernels.machine import machine
from relax_llm.kernels.matmul import Matmul, reference
from relax_llm.kernels.matmul.family import matmul_kernels
from relax_llm.kernels.matmul.shape import layout_for, pairs_blocking, tile_for
from relax_llm.kernels.norm import Norm
from relax_llm.plan.choosing import cover
from relax_llm.plan.kernel import Declined

from .bench import generate, launch_function, random
from .guarded import Out

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

    Array = npt.NDArray[Any]

pytestmark = pytest.mark.skipif(not cpu.features() >= BF16, reason="this processor has no products of bf16")

PAIRS = next(kernel for kernel in matmul_kernels(machine()) if kernel.name == "pairs")


def _problem(n: int, k: int, **fused: Any) -> Matmul:
    return Matmul(n, k, "bf16", activations="bf16", **fused)


@pytest.mark.parametrize(
    "problem",
    [
        _problem(1, 1),
        _problem(70, 33, activation="silu", gated=True),
        _problem(40, 1300, bias=True, residual=True),
        _problem(21, 2561),
        _problem(40, 64, bias=True, norm=Norm(64, 1e-5)),
        _problem(21, 2561, residual=True, norm=Norm(2561, 1e-5, centered=True, bias=True)),
    ],
    ids=lambda problem: problem.name,
)
def test_the_check_at_the_door(problem: Matmul, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 within the steps of the activations, and exactly where these are small integers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert check(realize(PAIRS, problem, machine()), machine()).startswith("checked at M=")


@cache
def _function(problem: Matmul) -> Callable[..., None]:
    func = PAIRS.make(problem).with_attr("global_symbol", "kernel")
    function: Callable[..., None] = generate(func, machine())["kernel"]
    return function


def _run(problem: Matmul, x: Array, weight: Array) -> Array:
    packed = layout_for(problem, machine()).pack(FORMATS["bf16"].encode(weight))
    (out,) = launch_function(_function(problem), "pairs", x, packed, Out((len(x), problem.outputs)))
    return out


@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 65, 1279, 1280, 1281, 2625])
def test_every_length_of_the_reduction(k: int) -> None:
    """What is left over behind whole vectors, turns and parts: the result is that of rounded activations."""
    problem = _problem(40, k)
    weight, x = random(40, k), random(15, k, seed=1)
    rounded = {
        "x": x.astype(ml_dtypes.bfloat16).astype(np.float32),
        "weight": weight.astype(ml_dtypes.bfloat16).astype(np.float32),
    }
    magnitudes = reference(problem, {name: np.abs(value) for name, value in rounded.items()})
    assert (np.abs(_run(problem, x, weight) - reference(problem, rounded)) <= 1e-5 * magnitudes).all()


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    problem = _problem(70, 2700)
    blocking = pairs_blocking(problem, machine())
    rows = 2 * blocking.tiles * tile_for(machine()).rows
    assert blocking.parts > 1
    assert blocking.blocks(rows) > 1
    weight, x = random(70, 2700), random(rows, 2700, seed=1)
    whole = _run(problem, x, weight)
    for part in (slice(0, 1), slice(3, 9), slice(100, 117), slice(rows - 1, rows)):
        np.testing.assert_array_equal(whole[part], _run(problem, x[part], weight))


def test_what_is_not_finite_stays_so_and_stays_in_its_row() -> None:
    problem = _problem(70, 101)
    weight, x = random(70, 101), random(12, 101, seed=1)
    clean = _run(problem, x, weight)
    broken = x.copy()
    broken[2, 40], broken[5, 100], broken[8, 0] = np.nan, np.inf, -np.inf
    out = _run(problem, broken, weight)
    assert not np.isfinite(out[[2, 5, 8]]).any()
    kept = [row for row in range(12) if row not in (2, 5, 8)]
    np.testing.assert_array_equal(out[kept], clean[kept])


def test_it_serves_only_what_allows_it() -> None:
    for activations in (None, "int8", "int16"):
        with pytest.raises(Declined, match="wants them in f32"):
            PAIRS.make(Matmul(32, 32, "bf16", activations=activations))


def test_one_row_is_multiplied_precisely_and_many_fast() -> None:
    tiled = [kernel for kernel in matmul_kernels(machine()) if kernel.layout == "tiled"]
    kernels = [kernel for kernel in tiled if "bf16" in kernel.weights]
    parts = cover(kernels, _problem(3072, 576), ("M",))
    assert [(part.kernel, part.sizes["M"]) for part in parts] == [("tiled", (1, 4)), ("pairs", (5, None))]
