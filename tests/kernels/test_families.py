"""The kernels over a packed weight give the same bits, for every size that they serve, and say what they cost."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from relax_llm.formats import FORMATS
from relax_llm.kernels.layout import Tiled, TiledPairs, parse
from relax_llm.kernels.matmul import Matmul, reference
from relax_llm.kernels.matmul.family import matmul_kernels
from relax_llm.kernels.matmul.shape import first_blocked, layout_for, tile_for
from relax_llm.plan.choosing import cover

from ..tolerances import assert_within, reduction
from .bench import HOST, generate, launch_function, machine_of, machines, random
from .guarded import Out

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from relax_llm.plan.kernel import Kernel

    Array = npt.NDArray[Any]

PROBLEMS = (
    Matmul(70, 33, bias=True, residual=True),
    Matmul(100, 1300, activation="silu", gated=True),  # more than one part, the last one shorter
    Matmul(64, 655),
)


def _kernel(on: str, name: str) -> Kernel:
    return next(kernel for kernel in matmul_kernels(machine_of(on)) if kernel.name == name)


@cache
def _function(problem: Matmul, on: str, name: str) -> Callable[..., None]:
    func = _kernel(on, name).make(problem).with_attr("global_symbol", "kernel")
    function: Callable[..., None] = generate(func, machine_of(on))["kernel"]
    return function


def _run(problem: Matmul, on: str, name: str, inputs: dict[str, Array]) -> Array:
    packed = layout_for(problem, machine_of(on)).pack(inputs["weight"])
    optional = [inputs[key] for key in ("bias", "residual") if key in inputs]
    rows = len(inputs["x"])
    (out,) = launch_function(
        _function(problem, on, name), name, inputs["x"], packed, *optional, Out((rows, problem.outputs))
    )
    return out


def _inputs(problem: Matmul, rows: int) -> dict[str, Array]:
    inputs = {
        "x": random(rows, problem.k),
        "weight": random(problem.n, problem.k, seed=1) / np.float32(problem.k**0.5),
    }
    if problem.bias:
        inputs["bias"] = random(problem.n, seed=2)
    if problem.residual:
        inputs["residual"] = random(rows, problem.outputs, seed=3)
    return inputs


@machines
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_blocked_gives_the_bits_of_tiled(on: str, problem: Matmul) -> None:
    """At its first size, at tile edges, and at sizes of several blocks of rows."""
    rows, first = tile_for(machine_of(on)).rows, first_blocked(machine_of(on))
    for m in (first, first + 1, 2 * rows, 2 * rows + 1, 3 * rows - 1, 16 * rows + 1, 33 * rows):
        inputs = _inputs(problem, m)
        one, other = (_run(problem, on, name, inputs) for name in ("tiled", "blocked"))
        np.testing.assert_array_equal(one, other, err_msg=f"M = {m}")


@machines
def test_a_long_reduction_and_several_blocks_of_rows(on: str) -> None:
    """Against float64: parts of the reduction are carried on, and each block of rows begins anew."""
    problem = PROBLEMS[2]
    m = 17 * tile_for(machine_of(on)).rows + 3
    inputs = _inputs(problem, m)
    right = reference(problem, inputs)
    scale = np.abs(inputs["x"]).astype(np.float64) @ np.abs(inputs["weight"]).astype(np.float64).T
    for name in ("tiled", "blocked"):
        out = _run(problem, on, name, inputs)
        assert_within(out, right, scale * reduction("float32", problem.k), f"{name} at M = {m}")


@machines
def test_a_row_is_the_same_in_every_number_of_rows(on: str) -> None:
    """Bitwise, whichever kernel serves: prefill and decode round alike."""
    problem = PROBLEMS[2]
    inputs = _inputs(problem, 60)
    whole = _run(problem, on, "blocked", inputs)
    for m in (1, 2, 5, 7, 8, 13, 14, 27, 60):
        part = _run(problem, on, "tiled", {**inputs, "x": np.ascontiguousarray(inputs["x"][:m])})
        np.testing.assert_array_equal(part, whole[:m], err_msg=f"M = {m}")


@pytest.mark.parametrize(("n", "k"), [(576, 576), (576, 1536), (49152, 576), (4096, 14336)])
@pytest.mark.parametrize("on", [HOST, "x86-64-v4", "x86-64-v3", "x86-64", "aarch64"])
def test_costs_rise_with_the_rows(on: str, n: int, k: int) -> None:
    """From where multiply-adds take longer than reading the weight."""
    problem = Matmul(n, k)
    for kernel in matmul_kernels(machine_of(on)):
        if kernel.cost is None or "f32" not in kernel.weights:
            continue
        (first, _) = kernel.sizes["M"]
        costs = [kernel.cost(problem, {"M": m}) for m in (first, 4 * first, 16 * first, 64 * first)]
        assert 0 < costs[0] <= costs[1] < costs[2] < costs[3], kernel.name


def test_long_reductions_of_many_rows_are_blocked() -> None:
    """What the costs are for: x of 14336 columns does not stay in the caches of a core, unless it is copied."""
    every = matmul_kernels(machine_of("x86-64-v4"))
    kernels = [kernel for kernel in every if kernel.layout == "tiled" and "f32" in kernel.weights]
    serving = {
        m: next(part.kernel for part in cover(kernels, Matmul(4096, 14336), ("M",)) if {"M": m} in part.sizes)
        for m in (1, 8, 128, 1024)
    }
    assert serving == {1: "tiled", 8: "tiled", 128: "blocked", 1024: "blocked"}


ENCODED = (
    Matmul(70, 33, weight_format="bf16", bias=True, residual=True),
    Matmul(100, 1302, weight_format="bf16", activation="silu", gated=True),
    Matmul(64, 655, weight_format="bf16"),
    Matmul(70, 33, weight_format="f16", bias=True, residual=True),
    Matmul(40, 655, weight_format="q8"),
    Matmul(70, 1302, weight_format="q4", activation="silu", gated=True),
    Matmul(70, 67, weight_format="q4s", residual=True),
    Matmul(70, 67, weight_format="q6"),
)


@machines
@pytest.mark.parametrize("problem", ENCODED, ids=lambda problem: problem.name)
def test_encoded_weights_are_widened_exactly(on: str, problem: Matmul) -> None:
    """Against float64 on the decoded weight: a format adds no error of its own, so the bound is that of f32."""
    rows = tile_for(machine_of(on)).rows
    format = FORMATS[problem.weight_format]
    for m in (1, 2, rows, rows + 1, 3 * rows + 1, 17 * rows):
        inputs = _inputs(problem, m)
        encoded = {**inputs, "weight": format.encode(inputs["weight"])}
        exact = {**inputs, "weight": format.decode(encoded["weight"], problem.k)}
        out = _run(problem, on, "tiled", encoded)
        if m > rows:
            np.testing.assert_array_equal(out, _run(problem, on, "blocked", encoded), err_msg=f"M = {m}")
        wide = replace(problem, weight_format="f32")
        np.testing.assert_array_equal(out, _run(wide, on, "tiled", exact), err_msg=f"M = {m}")
        if problem.gated:
            continue  # the f32 kernel, whose bits these are, is held to its bound elsewhere
        scale = np.abs(inputs["x"]).astype(np.float64) @ np.abs(exact["weight"]).astype(np.float64).T + 10
        right = reference(wide, exact)
        assert_within(out, right, scale * reduction("float32", problem.k), f"{problem.name} at M = {m}")


@pytest.mark.parametrize(
    "layout", [TiledPairs(16), TiledPairs(32, gated=True)], ids=lambda layout: layout.name
)
def test_pairs_lie_side_by_side(layout: TiledPairs) -> None:
    n, k = 70, 5
    weight = (np.arange(n * k) % 251).reshape(n, k).astype(np.float32)  # exact in bf16
    packed = layout.pack(FORMATS["bf16"].encode(weight))
    assert packed.shape == layout.shape(n, k)
    values = packed.view(ml_dtypes.bfloat16).astype(np.float32)
    plain = Tiled(layout.cols, layout.gated).pack(weight)  # [panels, K, cols]
    for step in range(k):
        np.testing.assert_array_equal(values[:, step // 2, :, step % 2], plain[:, step])
    assert not values[:, -1, :, 1].any()
    assert parse(layout.name) == layout
