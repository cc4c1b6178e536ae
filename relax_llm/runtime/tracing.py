"""Runs with a clock read before and after every launch, by compiled code: no Python runs between two kernels.

A traced run is that of a further virtual machine over the same library and tensors, in whose program calls of the
library's clock stand around each launch. Plain runs have nothing of it.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm.artifact.artifact import Artifact
from relax_llm.artifact.costs import own_sizes, products_of
from relax_llm.artifact.formulas import evaluate
from relax_llm.errors import ArtifactError
from relax_llm.plan.kernel import AXES
from relax_llm.runtime import choices, vm
from relax_llm.runtime.choices import Place, Rule
from relax_llm.runtime.control import Control, Line
from relax_llm.runtime.dispatch import OPEN
from relax_llm.runtime.program import (
    SPECIAL,
    VOID,
    Argument,
    Call,
    Function,
    Goto,
    If,
    Instruction,
    Kind,
    Program,
    Return,
    Source,
)
from relax_llm.tracing.limits import Limits
from relax_llm.tracing.trace import Trace, TracedCall, TracedLaunch

CLOCK = "relax_llm_clock"
"""What every library has: (times [rows, 2], row, clock) writes the time to a row, as seconds and nanoseconds."""

Times = npt.NDArray[np.int64]

_NANO = 10**9
_ANY = -2  # what TVM writes as a kernel's number of parameters


class Tracer:
    """What of a runner is traced."""

    def __init__(
        self, artifact: Artifact, machine: vm.VirtualMachine, control: Control, limits: Callable[[], Limits]
    ) -> None:
        """Nothing is.

        Args:
            artifact: What is run.
            machine: That of plain runs.
            control: Which kernels are chosen otherwise.
            limits: Measures what the machine can do.
        """
        self._artifact, self._machine, self._control = artifact, machine, control
        self._limits = limits
        self._traces: list[tuple[Trace, int]] = []
        self._machines: dict[bool, vm.VirtualMachine] = {}
        self._times: dict[str, Times] = {}

    @property
    def active(self) -> bool:
        """Whether a call must go by here."""
        return bool(self._traces)

    @contextmanager
    def tracing(self, limits: Limits | None, lock: threading.Lock) -> Iterator[Trace]:
        """See `Runner.tracing`."""
        trace = Trace(limits or self._limits)
        with lock:
            self._clocked(self._control.active)
            self._traces.append((trace, _now()))
        try:
            yield trace
        finally:
            with lock:
                self._traces = [other for other in self._traces if other[0] is not trace]

    def call(self, function: str, sizes: Mapping[str, int], *arguments: Any) -> Any:
        """Call a function and trace it; the lock is the caller's to hold.

        Args:
            function: Its name.
            sizes: Its batch, seq and kv_len.
            arguments: As the function takes them.
        """
        controlled = self._control.active
        compiled = self._clocked(controlled)[function]
        line, rules = self._control.line(function), tuple(self._control.rules(function))
        times = self._times[function]
        times[:] = 0
        stamps = vm.tensor(times)
        begun = _now()
        try:
            if controlled:
                return self._control.told(line, rules, sizes, lambda: compiled(*arguments, stamps))
            return compiled(*arguments, stamps)
        finally:
            run = _Run(function, dict(sizes), begun, _now(), _spans(times), line, rules)
            for trace, origin in self._traces:
                trace.add(run.traced(origin, self._artifact))

    def _clocked(self, controlled: bool) -> vm.VirtualMachine:
        """The machine that reads the clock, made when it is first wanted."""
        if controlled not in self._machines:
            if not self._machine.has_kernel(CLOCK):
                raise ArtifactError(f"{self._artifact.path} has no clock in its library; compile it again.")
            manifest, program = self._artifact.manifest, self._machine.program
            if controlled:
                places = choices.places(self._artifact)
                program = program.renamed({symbol: symbol + OPEN for _, symbol in places})
            kernels = frozenset(manifest.kernels)
            kernels |= {symbol + OPEN for symbol in manifest.dispatchers}
            made, rows = clocked(program, kernels, frozenset(manifest.functions))
            for function, launches in manifest.functions.items():
                if rows[function] != 2 * len(launches):
                    raise ArtifactError(
                        f"{self._artifact.path}: {function} makes {rows[function] // 2} launches, but the manifest "
                        f"says {len(launches)}; compile again."
                    )
                self._times.setdefault(function, np.zeros((rows[function], 2), np.int64))
            self._machines[controlled] = self._machine.executing(made)
        return self._machines[controlled]


def clocked(
    program: Program, kernels: frozenset[str], functions: frozenset[str]
) -> tuple[Program, dict[str, int]]:
    """The same program with the clock read before and after every launch.

    ::

        f(%0, %1):                                    f(%0, %1, %2):
          call matmul in: %0, %1, %2 dst: %void         call relax_llm_clock in: %2, 0, 1 dst: %void
          ret %2                                        call matmul in: %0, %1, %3 dst: %void
                                                        call relax_llm_clock in: %2, 1, 1 dst: %void
                                                        ret %3

    Args:
        program: It is not changed.
        kernels: The symbols whose calls are launches.
        functions: Where to do so. Each takes one more argument at its end: the table of times.

    Returns:
        The program, and the rows that the table of each function must have.
    """
    table = [*program.functions, Function(Kind.PACKED, CLOCK, parameters=_ANY)]
    starts = [0] * (len(program.instructions) + 1)  # where each instruction comes to stand
    made: list[Instruction] = []
    rows: dict[str, int] = {}
    inside: dict[int, Function] = {
        at: function
        for function in program.functions
        if function.kind is Kind.BYTECODE and function.name in functions
        for at in range(function.start, function.end)
    }
    jumps: list[tuple[int, int, int]] = []
    for at, instruction in enumerate(program.instructions):
        starts[at] = len(made)
        if isinstance(instruction, Goto):
            jumps.append((len(made), at, at + instruction.offset))
        elif isinstance(instruction, If):
            jumps.append((len(made), at, at + instruction.otherwise))
        function = inside.get(at)
        if function is None:
            made.append(instruction)
            continue
        moved = _moved(instruction, function.parameters)
        if isinstance(moved, Call) and table[moved.function].name in kernels:
            row = rows.get(function.name, 0)
            stamps = [_stamp(len(program.functions), function.parameters, row + side) for side in (0, 1)]
            made += [stamps[0], moved, stamps[1]]
            rows[function.name] = row + 2
        else:
            made.append(moved)
    starts[-1] = len(made)
    for place, source, target in jumps:
        offset, jump = starts[target] - starts[source], made[place]
        made[place] = replace(jump, offset=offset) if isinstance(jump, Goto) else _if(jump, offset)
    for index, function in enumerate(program.functions):
        if function.kind is Kind.BYTECODE:
            table[index] = replace(function, start=starts[function.start], end=starts[function.end])
            if function.name in functions:
                table[index] = replace(
                    table[index],
                    parameters=function.parameters + 1,
                    registers=function.registers + 1,
                    names=(*function.names, "times"),
                )
    return replace(program, functions=tuple(table), instructions=tuple(made)), {
        name: rows.get(name, 0) for name in functions
    }


def _stamp(clock: int, register: int, row: int) -> Call:
    return Call(
        VOID,
        clock,
        (
            Argument(Source.REGISTER, register),
            Argument(Source.IMMEDIATE, row),
            Argument(Source.IMMEDIATE, time.CLOCK_MONOTONIC),
        ),
    )


def _moved(instruction: Instruction, parameters: int) -> Instruction:
    """The instruction where one more parameter stands in front of all other registers."""

    def register(number: int) -> int:
        return number + 1 if parameters <= number < SPECIAL else number

    match instruction:
        case Call(target, function, arguments):
            given = tuple(
                replace(one, value=register(one.value)) if one.source is Source.REGISTER else one
                for one in arguments
            )
            return Call(register(target), function, given)
        case Return(number):
            return Return(register(number))
        case If(number, otherwise):
            return If(register(number), otherwise)
    return instruction


def _if(instruction: Instruction, otherwise: int) -> If:
    assert isinstance(instruction, If)
    return replace(instruction, otherwise=otherwise)


@dataclass(frozen=True)
class _Run:
    """What is known of a call when it has ended; the rest is worked out when somebody looks.

    Attributes:
        spans: Begin and end of each launch, in the clock's nanoseconds; 0 where there is none.
        line: The function's launches.
        rules: What chose the kernels of those that have a choice.
    """

    function: str
    sizes: Mapping[str, int]
    begun: int
    ended: int
    spans: Times
    line: Line
    rules: Sequence[Rule]

    def traced(self, origin: int, artifact: Artifact) -> TracedCall:
        """The call, in a trace that began at `origin`."""
        thread = threading.get_native_id(), threading.current_thread().name
        return TracedCall(
            self.function,
            self.sizes,
            self.begun - origin,
            self.ended - origin,
            thread,
            lambda: tuple(self._launches(origin, artifact)),
        )

    def _launches(self, origin: int, artifact: Artifact) -> Iterator[TracedLaunch]:
        rules = iter(self.rules)
        kernels = artifact.manifest.kernels
        costs: dict[tuple[str, tuple[tuple[str, int], ...]], tuple[float, float]] = {}
        for index, ((launch, where), span) in enumerate(
            zip(self.line.launches, self.spans.tolist(), strict=True)
        ):
            rule = next(rules) if isinstance(where, Place) else None
            begun, ended = span
            if not ended:  # the call failed before or in it
                continue
            kernel = kernels[launch.kernel]
            own = own_sizes(kernel.operator, launch, self.sizes)
            if isinstance(where, Place) and rule is not None:
                name = where.kernels[rule(tuple(own[axis] for axis in where.axes))][0]
            else:
                assert not isinstance(where, Place)
                name = where.kernel
            key = launch.kernel, tuple(own.items())
            if key not in costs:
                costs[key] = evaluate(kernel.flops, own), evaluate(kernel.bytes, own)
            axes = AXES.get(kernel.operator, tuple(self.sizes))
            yield TracedLaunch(
                self.function,
                index,
                launch.site,
                kernel.operator,
                name,
                launch.kernel,
                {axis: own[axis] for axis in axes},
                begun - origin,
                ended - origin,
                *costs[key],
                products_of(kernel),
            )


def _spans(times: Times) -> Times:
    stamps: Times = times[:, 0] * _NANO + times[:, 1]
    return stamps.reshape(-1, 2)


def _now() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)
