"""Which launch reads what another has written: the data flow of a function, read off its instructions."""

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from relax_llm.artifact.manifest import Launch
from relax_llm.plan.plan import parts_of
from relax_llm.runtime.program import VOID, Call, Program, Source
from relax_llm.runtime.runner import Runner

Array = npt.NDArray[Any]


def readers(
    program: Program, function: str, launches: Sequence[Launch], kernels: frozenset[str]
) -> list[list[tuple[int, int]]]:
    """The launches that read each launch's output.

    Args:
        program: What the machine executes.
        function: Its name.
        launches: What the manifest says of them, in program order.
        kernels: The symbols that are launched.

    Returns:
        For each launch the (launch, argument) pairs that read it, in program order.
    """
    found: list[list[tuple[int, int]]] = [[] for _ in launches]
    wrote: dict[int, int] = {}  # the launch whose output a register holds
    order = iter(range(len(launches)))
    body = program.function(function)
    for instruction in program.instructions[body.start : body.end]:
        if not isinstance(instruction, Call):
            continue
        registers = [
            argument.value if argument.source is Source.REGISTER else None
            for argument in instruction.arguments
        ]
        name = program.functions[instruction.function].name
        if name in kernels:
            at = next(order)
            for position, (register, argument) in enumerate(
                zip(registers, launches[at].arguments, strict=True)
            ):
                if register is None:
                    continue
                if argument.role == "output":
                    wrote[register] = at
                elif register in wrote:
                    found[wrote[register]].append((at, position))
        elif instruction.target != VOID:
            # A view, as a reshape makes it, shows what its tensor holds; all else is new.
            first = registers[0] if registers else None
            if first in wrote and "reshape" in name and first is not None:
                wrote[instruction.target] = wrote[first]
            else:
                wrote.pop(instruction.target, None)
    return found


def factors(runner: Runner, function: str) -> list[Array | None]:
    """For each launch those of the channels it writes, f32 [K], where the matrices that read them say some.

    Its result is so many times smaller than by the checkpoint's weights; see `relax_llm.compiler.equalize`.
    """
    known, manifest = runner.artifact.channels, runner.artifact.manifest
    launches = manifest.functions[function]
    if not known:
        return [None] * len(launches)
    read = [
        None  # what its own norm makes is no launch's result
        if manifest.kernels[launch.kernel].problem.get("norm")
        else next((known[name] for name in _parameters(launch) if name in known), None)
        for launch in launches
    ]
    return [
        next((read[reader] for reader, position in those if position == 0), None)
        for those in readers(runner.program, function, launches, frozenset(manifest.kernels))
    ]


def _parameters(launch: Launch) -> list[str]:
    """Those that the weights of a launch are made of."""
    weights = [argument.name for argument in launch.arguments if argument.role == "weight"]
    return [f"{part}.weight" for name in weights for part in parts_of(name.removesuffix(".weight"))]
