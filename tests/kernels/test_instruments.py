"""The loops that measure what a machine can do: they compute what they say, and are there where it has instructions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from relax_llm.kernels.generate import generate
from relax_llm.kernels.instruments import (
    LOOPS,
    MULTIPLY_ADD,
    MULTIPLY_BF16,
    MULTIPLY_INT8,
    READ,
    instruments,
)
from relax_llm.kernels.intrinsics import BF16, INT8
from relax_llm.kernels.machine import LANES, machine
from relax_llm.kernels.threads import load

from .bench import launch_function
from .guarded import Out

if TYPE_CHECKING:
    from collections.abc import Callable


TASKS, STEPS = 3, 5
SUMS = machine().accumulators
COUNT = STEPS * SUMS + SUMS - 1  # what is less than one step is left out


@pytest.fixture(scope="module")
def library() -> Callable[[str], Any]:
    here = machine()
    loaded = load(generate(instruments(here), here))
    return lambda name: loaded[name]


def run(library: Callable[[str], Any], name: str, factor: np.generic, result: str) -> np.ndarray[Any, Any]:
    factors = np.full((TASKS, LANES), factor)
    (out,) = launch_function(library(name), name, factors, COUNT, Out((TASKS, LANES), result))
    return out


def test_sums_converge(library: Callable[[str], Any]) -> None:
    expected = sum(1 + (index - 1) / 2**STEPS for index in range(SUMS))
    np.testing.assert_allclose(run(library, MULTIPLY_ADD, np.float32(0.5), "float32"), expected, rtol=1e-6)


@pytest.mark.skipif(not machine().features >= BF16, reason="the processor has no instructions for bf16")
def test_pairs_of_bf16(library: Callable[[str], Any]) -> None:
    expected = sum(index + STEPS * 2 * 0.25 for index in range(SUMS))
    assert (run(library, MULTIPLY_BF16, np.int32(0x3F003F00), "float32") == expected).all()


@pytest.mark.skipif(not machine().features >= INT8, reason="the processor has no instructions for bytes")
def test_quads_of_bytes(library: Callable[[str], Any]) -> None:
    expected = sum(index + STEPS * 4 for index in range(SUMS))
    assert (run(library, MULTIPLY_INT8, np.int32(0x01010101), "int32") == expected).all()


def test_loops_are_counted(library: Callable[[str], Any]) -> None:
    for alone in (0, 1):
        (out,) = launch_function(library(LOOPS), LOOPS, COUNT, STEPS, alone, Out((TASKS, LANES)))
        assert (out[:, 0] == COUNT - 1 + 1 - 0.5**STEPS).all()


def test_everything_is_read(library: Callable[[str], Any]) -> None:
    memory = np.ones((TASKS, 2 * 8 * LANES), np.float32)
    (out,) = launch_function(library(READ), READ, memory, Out((TASKS, LANES)))
    assert (out == 2 * 8).all()


@pytest.mark.parametrize("name", ["x86-64", "x86-64-v3", "x86-64-v4", "aarch64"])
def test_a_processor_without_them_has_none(name: str) -> None:
    assert not instruments(machine(name)).keys() & {MULTIPLY_BF16, MULTIPLY_INT8}
