"""Building kernels and launching them on guarded memory."""

from __future__ import annotations

import itertools
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tvm_ffi

from relax_llm import cpu
from relax_llm.kernels import generate as code
from relax_llm.kernels.library import build
from relax_llm.kernels.machine import Machine, machine
from relax_llm.kernels.problem import Problem
from relax_llm.kernels.threads import load

from .guarded import Guarded, InOut, Out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Argument = Array | Out | InOut | int

HOST = "host"
"""Stands for `machine()`: this processor with all that it adds to its level."""


def _runs_here(name: str) -> bool:
    return name == HOST or (cpu.architecture() == "x86_64" and cpu.X86_LEVELS[name] <= cpu.features())


def needs(name: str) -> pytest.MarkDecorator:
    """Skip where this processor cannot run the machine's code."""
    return pytest.mark.skipif(not _runs_here(name), reason=f"this processor is not {name}")


def _parametrized(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("on", [pytest.param(name, marks=needs(name)) for name in names])


every_machine = _parametrized(HOST, "x86-64-v3", "x86-64-v2", "x86-64")
"""Parametrize a test by every machine whose code this processor can run."""

machines = _parametrized(HOST, "x86-64-v3", "x86-64")
"""Those with tiles of their own: x86-64-v2 has the registers of x86-64, so its kernels are the same."""


def in_turns(cases: Iterable[Sequence[Any]]) -> list[Any]:
    """For each case, of which it becomes the first value: this processor, and of the other `machines` one in turns."""
    others = itertools.cycle(("x86-64-v3", "x86-64"))
    return [pytest.param(on, *case, marks=needs(on)) for case in cases for on in (HOST, next(others))]


@lru_cache
def machine_of(name: str) -> Machine:
    """The machine of a name in `MACHINES`, or of any other that `machine` knows."""
    return machine() if name == HOST else machine(name)


def generate(func: Any, on: Machine) -> Any:
    """Generate code for one function, as the compiler does for a whole model."""
    return load(code.generate({str(func.attrs["global_symbol"]): func}, on))


@cache
def compiled(problem: Problem, name: str) -> Callable[..., None]:
    """The machine code of a problem's kernel; built once in a session."""
    function: Callable[..., None] = generate(build(problem, machine_of(name)), machine_of(name))[problem.name]
    return function


def launch(problem: Problem, name: str, *arguments: Argument) -> list[Array]:
    """Run a kernel on guarded memory.

    Args:
        problem: What is solved.
        name: The machine.
        arguments: In the kernel's order: arrays are inputs, which must stay as they are; `Out` and `InOut` are written;
            a number is a size.

    Returns:
        The `Out` and `InOut` tensors.
    """
    return launch_function(compiled(problem, name), problem.name, *arguments)


def launch_function(function: Callable[..., None], what: str, *arguments: Argument) -> list[Array]:
    """Run any function as `launch` runs a kernel."""
    placed: list[Guarded | int] = []
    for argument in arguments:
        if isinstance(argument, Out):
            placed.append(Guarded(argument.shape, argument.dtype))
        elif isinstance(argument, InOut):
            placed.append(Guarded(argument.values.shape, argument.values.dtype.name, argument.values))
        elif isinstance(argument, np.ndarray):
            placed.append(Guarded(argument.shape, argument.dtype.name, argument))
        else:
            placed.append(argument)
    function(*[tvm_ffi.from_dlpack(value.array) if isinstance(value, Guarded) else value for value in placed])
    results = []
    for index, (argument, value) in enumerate(zip(arguments, placed, strict=True)):
        if not isinstance(value, Guarded):
            continue
        value.assert_guards_intact(f"{what}, argument {index}")
        if isinstance(argument, np.ndarray):
            value.assert_unchanged(f"{what}: input {index}")
        else:
            results.append(value.array)
    return results


def random(*shape: int, seed: int = 0) -> Array:
    """float32 values of unit variance."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)
