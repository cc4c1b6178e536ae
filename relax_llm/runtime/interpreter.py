"""The virtual machine's instructions, executed one by one in Python over the same compiled kernels.

A kernel is called with the same tensors as by TVM's own machine, so the results are bitwise the same; between two
kernels everything may be looked at and changed.
"""

import ctypes
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from threading import Lock
from typing import Any

import numpy as np

from relax_llm import ffi
from relax_llm.errors import ArtifactError
from relax_llm.runtime.program import (
    MACHINE,
    SPECIAL,
    VOID,
    Argument,
    Call,
    Constant,
    DataType,
    Function,
    Goto,
    If,
    Instruction,
    Kind,
    Program,
    Return,
    Source,
    Tensor,
)
from relax_llm.runtime.rest import rest
from relax_llm.runtime.vm import VirtualMachine, tensor

_ADDRESS = "relax_llm.address"
_REMEMBERED = 8
_asking = Lock()  # the name is one for the process
_Gather = Callable[[list[Any]], Sequence[Any]]
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}


@dataclass(frozen=True)
class _Decoded:
    """A function's instructions, made ready.

    Attributes:
        steps: For each instruction, itself; and for a call what gathers its arguments from the registers, its callee,
            that one's index in the function table, and the target.
        values: What calls take that is in no register; they follow the registers.
    """

    steps: tuple[tuple[Instruction, _Gather | None, Callable[..., Any] | None, int, int], ...]
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Calls:
    """The calls of some functions in another one, in the order of its instructions.

    Attributes:
        each: Place and instruction of each.
        names: What each calls.
        order: Which of them stands at a place.
        stops: What they call, as indices in the function table.
    """

    each: tuple[tuple[int, Call], ...]
    names: tuple[str, ...]
    order: Mapping[int, int]
    stops: frozenset[int]


class Interpreter:
    """Executes a machine's program. It has registers for each call, so several may be under way."""

    def __init__(self, machine: VirtualMachine) -> None:
        """Look up what the program calls.

        Raises:
            ArtifactError: It calls what the library does not have, or has a constant of a type that is not known.
        """
        self.machine = machine
        self.program = machine.program
        self._context = _Context(machine)
        self._constants = [_value(constant) for constant in self.program.constants]
        self._functions = [self._callable(function) for function in self.program.functions]
        self._decoded: dict[str, _Decoded] = {}
        self._calls: dict[str, Calls] = {}
        self._rests: dict[tuple[str, int, bool], tuple[Callable[..., Any], tuple[int, ...]]] = {}

    def start(self, function: str, *arguments: Any) -> "Frame":
        """A call of a function, before its first instruction.

        Raises:
            ArtifactError: There is no such function, or it takes another number of arguments.
        """
        return Frame(self, self.program.function(function), arguments)

    def decoded(self, function: Function) -> _Decoded:
        """The instructions of a function, made ready once."""
        if function.name not in self._decoded:
            values: list[Any] = []
            steps: list[tuple[Instruction, _Gather | None, Callable[..., Any] | None, int, int]] = []
            for instruction in self.program.instructions[function.start : function.end]:
                if not isinstance(instruction, Call):
                    steps.append((instruction, None, None, -1, VOID))
                    continue
                places = []
                for argument in instruction.arguments:
                    if argument.source is Source.REGISTER and argument.value < SPECIAL:
                        places.append(argument.value)
                    else:
                        places.append(function.registers + len(values))
                        values.append(self._value(argument))
                callee = self._functions[instruction.function]
                steps.append((instruction, _gather(places), callee, instruction.function, instruction.target))
            self._decoded[function.name] = _Decoded(tuple(steps), tuple(values))
        return self._decoded[function.name]

    def calls(self, name: str, callees: Container[str]) -> Calls:
        """The calls of some functions, by name, in a function."""
        if name not in self._calls:
            function, table = self.program.function(name), self.program.functions
            body = enumerate(self.program.instructions[function.start : function.end])
            each = tuple(
                (at, call)
                for at, call in body
                if isinstance(call, Call) and table[call.function].name in callees
            )
            self._calls[name] = Calls(
                each,
                tuple(table[call.function].name for _, call in each),
                {at: index for index, (at, _) in enumerate(each)},
                frozenset(call.function for _, call in each),
            )
        return self._calls[name]

    def rest(self, frame: "Frame", names: Mapping[str, str]) -> tuple[Callable[..., Any], list[Any]]:
        """What is left of a call, for TVM's own machine: a function and what to call it with.

        Args:
            frame: Where the call stands.
            names: Kernels that others take the place of, as `Program.renamed` takes them.
        """
        key = frame.function.name, frame.at, bool(names)
        if key not in self._rests:
            program, name, taken = rest(self.program.renamed(names), frame.function.name, frame.at)
            if len(self._rests) >= _REMEMBERED:
                del self._rests[next(iter(self._rests))]
            self._rests[key] = self.machine.executing(program)[name], taken
        function, taken = self._rests[key]
        return function, [frame.registers[register] for register in taken]

    def _value(self, argument: Argument) -> Any:
        """What an argument that is in no register is."""
        if argument.source is Source.REGISTER:
            return self._context.address if argument.value == MACHINE else None
        if argument.source is Source.CONSTANT:
            return self._constants[argument.value]
        if argument.source is Source.FUNCTION:
            return self._functions[argument.value]
        return argument.value

    def _callable(self, function: Function) -> Callable[..., Any]:
        if function.kind is Kind.PACKED:
            if self.machine.has_kernel(function.name):
                return self.machine.kernel(function.name)
            found: Callable[..., Any] | None = ffi.runtime().get_global_func(
                function.name, allow_missing=True
            )
            if found is None:
                raise ArtifactError(f"The program calls {function.name!r}, which is not there.")
            return found
        if function.kind is Kind.BYTECODE:
            return lambda *arguments: Frame(self, function, arguments).finish()
        raise ArtifactError(
            f"The function {function.name!r} was compiled; its instructions cannot be executed."
        )


class Frame:
    """One call of a function: its registers, and the instruction that comes next.

    Attributes:
        function: What was called.
        registers: Values by number, None where there is none; behind them, what calls take that is in none.
        at: Index of the next instruction in the function.
        ended: Whether the function has returned.
        result: What it returned.
    """

    def __init__(self, interpreter: Interpreter, function: Function, arguments: tuple[Any, ...]) -> None:
        """Put the arguments into the first registers."""
        if len(arguments) != function.parameters:
            raise ArtifactError(
                f"{function.name} takes {function.parameters} arguments, and was given {len(arguments)}."
            )
        decoded = interpreter.decoded(function)
        self.function = function
        self._steps = decoded.steps
        self.registers: list[Any] = [
            *arguments,
            *[None] * (function.registers - len(arguments)),
            *decoded.values,
        ]
        self.at = 0
        self.ended = False
        self.result: Any = None

    def run_to(self, stops: Container[int]) -> Call | None:
        """Execute instructions up to the next call of one of some functions, which is not executed.

        Args:
            stops: Indices in the function table.

        Returns:
            The call; None when the function has ended.
        """
        steps, registers = self._steps, self.registers
        while not self.ended:
            instruction, gather, callee, function, target = steps[self.at]
            if gather is not None and callee is not None:
                if function in stops:
                    assert isinstance(instruction, Call)
                    return instruction
                result = callee(*gather(registers))
                if target != VOID:
                    registers[target] = result
                self.at += 1
            elif isinstance(instruction, Return):
                self.result = None if instruction.register == VOID else registers[instruction.register]
                self.ended = True
                registers.clear()
            elif isinstance(instruction, Goto):
                self.at += instruction.offset
            elif isinstance(instruction, If):
                self.at += 1 if registers[instruction.register] else instruction.otherwise
        return None

    def arguments(self) -> list[Any]:
        """What the call at the present instruction is given."""
        gather = self._steps[self.at][1]
        return [] if gather is None else list(gather(self.registers))

    def finish(self) -> Any:
        """Execute everything that is left."""
        self.run_to(())
        return self.result


def _gather(places: list[int]) -> _Gather:
    """What gives the values at some places of a list, as quickly as Python can."""
    if not places:
        return lambda registers: ()
    if len(places) == 1:
        (place,) = places
        return lambda registers: (registers[place],)
    return itemgetter(*places)


class _Context:
    """A virtual machine that executes nothing, for the functions of TVM's runtime that want to be given one."""

    def __init__(self, machine: VirtualMachine) -> None:
        """Have a program of one call tell the machine's address."""
        found: list[ctypes.c_void_p] = []
        program = Program(
            functions=(
                Function(Kind.PACKED, _ADDRESS, parameters=1),
                Function(Kind.BYTECODE, "address", 0, 2, 0, 1),
            ),
            constants=(),
            instructions=(Call(VOID, 0, (Argument(Source.REGISTER, MACHINE),)), Return(VOID)),
        )
        with _asking:
            ffi.runtime().register_global_func(_ADDRESS, found.append, override=True)
            self._machine = machine.executing(program)
        self._machine["address"]()
        (self.address,) = found


def _value(constant: Constant) -> Any:
    """A constant as kernels and TVM's runtime take it."""
    runtime = ffi.runtime()
    if isinstance(constant, tuple):
        return runtime.Shape(constant)
    if isinstance(constant, DataType):
        return runtime.dtype(_dtype(constant))
    if isinstance(constant, Tensor):
        array = np.frombuffer(constant.data, np.dtype(_dtype(constant.type))).reshape(constant.shape)
        return tensor(array.copy())
    return constant


def _dtype(kind: DataType) -> str:
    if kind.code not in _CODES:
        raise ArtifactError(f"The program has a constant of the type {kind}, which is not known.")
    name = _CODES[kind.code] + ("" if kind.code == 6 else str(kind.bits))
    return name if kind.lanes == 1 else f"{name}x{kind.lanes}"
