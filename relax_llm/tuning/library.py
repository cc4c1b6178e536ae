"""A library with every kernel of a contest, each to be launched as the model would launch it."""

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tvm import ir
from tvm.tirx import PrimFunc

from relax_llm.errors import CompileError
from relax_llm.kernels import threads
from relax_llm.kernels.dispatch import Branch, dispatcher, internal, rests
from relax_llm.kernels.forms import Realized
from relax_llm.kernels.generate import generate
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.operators import operator_of
from relax_llm.kernels.problem import Problem
from relax_llm.plan.plan import Range
from relax_llm.plan.sizes import Box


@dataclass(frozen=True)
class Entrant:
    """A kernel to be launched for a problem.

    Attributes:
        symbol: What to call it in the library.
        problem: What the model wants computed.
        realized: The kernel, which may compute less than the problem; the rest is computed behind it.
    """

    symbol: str
    problem: Problem
    realized: Realized


class _Module:
    """Functions by name, each once."""

    def __init__(self) -> None:
        self.functions: dict[ir.GlobalVar, PrimFunc] = {}
        self._variables: dict[str, ir.GlobalVar] = {}

    def add(self, name: str, func: PrimFunc, var: ir.GlobalVar | None = None) -> ir.GlobalVar:
        if name not in self._variables:
            self._variables[name] = var or ir.GlobalVar(name)
            self.functions[self._variables[name]] = func
        return self._variables[name]


def link(entrants: Sequence[Entrant], machine: Machine, path: Path) -> None:
    """Compile all kernels and link them.

    Args:
        entrants: The kernels.
        machine: The one to generate for, which runs them.
        path: Where to put the library: whole or not at all.

    Raises:
        CompileError: Code generation or linking failed.
    """
    module = _Module()
    objects: dict[str, bytes] = {}
    for entrant in entrants:
        _add(module, entrant, machine)
        for index, data in enumerate(entrant.realized.objects):
            objects[f"{entrant.realized.symbol}_{index}"] = data
    fresh = path.with_name(f"{path.stem}.{os.getpid()}.{secrets.token_hex(4)}")
    fresh.mkdir(parents=True)
    made = fresh / "kernels.so"
    try:
        threads.link(generate(module.functions, machine), made, list(objects.values()))
        made.replace(path)
    except (RuntimeError, ValueError, TypeError) as error:
        raise CompileError(f"Generating code for {machine.name} failed: {error}") from error
    finally:
        for file in fresh.iterdir():
            file.unlink()
        fresh.rmdir()


def _add(module: _Module, entrant: Entrant, machine: Machine) -> None:
    """Add a function that the model could call, with this kernel alone behind it."""
    realized, problem = entrant.realized, entrant.problem
    var, func, sizes = internal(realized.func, realized.operands, realized.symbol)
    kernel = module.add(realized.symbol, func.without_attr("global_symbol"), var)
    rest = [
        left and module.add(left[0].name_hint, left[1].without_attr("global_symbol"), left[0])
        for left in rests(problem, realized.problem, machine)
    ]
    branch = Branch(realized.kernel.name, realized.problem, realized.operands, sizes, kernel, *rest)
    everything = Range(Box().within(operator_of(problem).axes), branch.name)
    module.add(entrant.symbol, dispatcher(problem, realized.layout, [branch], [everything], entrant.symbol))
