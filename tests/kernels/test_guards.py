"""The bench must see what it is there to see: kernels that write where they should not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.machine import LANES

from ..tolerances import assert_within
from .bench import HOST, generate, launch_function, machine_of, random
from .guarded import Guarded, InOut, Out

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 5


def _function(emit: Callable[[Any, Any], None]) -> Callable[..., None]:
    def body() -> None:
        x, out = b.argument("x", (SIZE,)), b.argument("out", (SIZE,))
        emit(x, out)

    function: Callable[..., None] = generate(b.prim_func("probe", body), machine_of(HOST))["probe"]
    return function


def _copy(x: Any, out: Any) -> None:
    b.store(out, b.load(x, 0, lanes=SIZE), 0, lanes=SIZE)


def test_a_correct_kernel_passes() -> None:
    x = random(SIZE)
    (out,) = launch_function(_function(_copy), "probe", x, Out((SIZE,)))
    np.testing.assert_array_equal(out, x)


def test_a_write_after_the_output_is_seen() -> None:
    """A whole vector is written where only a part of it belongs to the output: the classic error at a tail."""
    function = _function(lambda x, out: b.store(out, b.splat(1.0), 0, lanes=LANES))
    with pytest.raises(AssertionError, match="wrote 44 bytes after it, from byte 0 on"):
        launch_function(function, "probe", random(SIZE), Out((SIZE,)))


def test_a_write_before_the_output_is_seen() -> None:
    def early(x: Any, out: Any) -> None:
        _copy(x, out)
        b.put(out, T.float32(1.0), -2)

    with pytest.raises(AssertionError, match="wrote 4 bytes before it, from byte -8 on"):
        launch_function(_function(early), "probe", random(SIZE), Out((SIZE,)))


def test_a_changed_input_is_seen() -> None:
    def greedy(x: Any, out: Any) -> None:
        _copy(x, out)
        b.put(x, T.float32(1.0), 2)

    with pytest.raises(AssertionError, match="input 0 was changed"):
        launch_function(_function(greedy), "probe", random(SIZE), Out((SIZE,)))


def test_an_element_that_is_not_written_is_seen() -> None:
    function = _function(lambda x, out: b.store(out, b.load(x, 0, lanes=4), 0, lanes=4))
    x = random(SIZE)
    (out,) = launch_function(function, "probe", x, Out((SIZE,)))
    with pytest.raises(AssertionError, match=r"1 of 5 values are not finite, first at \(4,\)"):
        assert_within(out, x.astype(np.float64), np.full(SIZE, 1e9), "probe")


def test_a_read_out_of_bounds_is_seen() -> None:
    def far(x: Any, out: Any) -> None:
        _copy(x, out)
        b.put(out, x[SIZE], 0)

    (out,) = launch_function(_function(far), "probe", random(SIZE), Out((SIZE,)))
    assert np.isnan(out[0])


def test_what_is_updated_in_place_comes_back() -> None:
    x = random(SIZE)
    (out,) = launch_function(_function(_copy), "probe", x, InOut(np.zeros(SIZE, np.float32)))
    np.testing.assert_array_equal(out, x)


def test_tolerances_are_of_each_element() -> None:
    reference = np.array([1e6, 1e-3])
    ours = np.array([1e6, 2e-3], np.float32)
    with pytest.raises(AssertionError, match=r"first at \(1,\)"):
        assert_within(ours, reference, np.abs(reference) * 1e-6, "two")
    assert_within(ours, reference, np.array([1.0, 1.1e-3]), "two")


def test_guarded_memory_is_aligned_and_poisoned() -> None:
    guarded = Guarded((3, 7), "float32")
    assert guarded.array.ctypes.data % 64 == 0
    assert np.isnan(guarded.array).all()
    guarded.array[2, 6] = 0.0
    guarded.assert_guards_intact("inside")
    with pytest.raises(AssertionError, match="was changed"):
        guarded.assert_unchanged("it")
