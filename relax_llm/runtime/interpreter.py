"""The virtual machine's instructions, executed one by one in Python over the same compiled kernels.

A kernel is called with the same tensors as by TVM's own machine, so the results are bitwise the same; between two
kernels everything may be looked at and changed.
"""

import ctypes
from collections.abc import Callable, Container
from threading import Lock
from typing import Any

import numpy as np

from relax_llm import ffi
from relax_llm.errors import ArtifactError
from relax_llm.runtime.program import (
    MACHINE,
    VOID,
    Argument,
    Call,
    Constant,
    DataType,
    Function,
    Goto,
    If,
    Kind,
    Program,
    Return,
    Source,
    Tensor,
)
from relax_llm.runtime.vm import VirtualMachine, tensor

_ADDRESS = "relax_llm.address"
_asking = Lock()  # the name is one for the process
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}

Values = tuple[tuple[bool, Any], ...]
"""For each argument of a call whether it is a register, and that register or the value itself."""


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
        self._decoded: dict[int, tuple[int, Values]] = {}

    def start(self, function: str, *arguments: Any) -> "Frame":
        """A call of a function, before its first instruction.

        Raises:
            ArtifactError: There is no such function, or it takes another number of arguments.
        """
        return Frame(self, self.program.function(function), arguments)

    def values(self, at: int, call: Call) -> Values:
        """The arguments of the call at an instruction."""
        known = self._decoded.get(at)
        if known is None:
            known = self._decoded[at] = at, tuple(self._argument(argument) for argument in call.arguments)
        return known[1]

    def callee(self, index: int) -> Callable[..., Any]:
        """A function of the table."""
        return self._functions[index]

    def _argument(self, argument: Argument) -> tuple[bool, Any]:
        if argument.source is Source.REGISTER:
            if argument.value == MACHINE:
                return False, self._context.address
            return (False, None) if argument.value == VOID else (True, argument.value)
        if argument.source is Source.CONSTANT:
            return False, self._constants[argument.value]
        if argument.source is Source.FUNCTION:
            return False, self._functions[argument.value]
        return False, argument.value

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
        registers: Values by number; None where there is none.
        at: Index of the next instruction.
        ended: Whether the function has returned.
        result: What it returned.
    """

    def __init__(self, interpreter: Interpreter, function: Function, arguments: tuple[Any, ...]) -> None:
        """Put the arguments into the first registers."""
        if len(arguments) != function.parameters:
            raise ArtifactError(
                f"{function.name} takes {function.parameters} arguments, and was given {len(arguments)}."
            )
        self._interpreter = interpreter
        self.registers: list[Any] = [*arguments, *[None] * (function.registers - len(arguments))]
        self.at = function.start
        self.ended = False
        self.result: Any = None

    def run_to(self, stops: Container[int]) -> Call | None:
        """Execute instructions up to the next call of one of some functions, which is not executed.

        Args:
            stops: Indices in the function table.

        Returns:
            The call; None when the function has ended.
        """
        instructions = self._interpreter.program.instructions
        while not self.ended:
            instruction = instructions[self.at]
            if isinstance(instruction, Call):
                if instruction.function in stops:
                    return instruction
                self.complete(
                    instruction,
                    self._interpreter.callee(instruction.function)(*self.arguments(instruction)),
                )
            elif isinstance(instruction, Return):
                self.result = None if instruction.register == VOID else self.registers[instruction.register]
                self.ended = True
                self.registers.clear()
            elif isinstance(instruction, Goto):
                self.at += instruction.offset
            elif isinstance(instruction, If):
                self.at += 1 if self.registers[instruction.register] else instruction.otherwise
        return None

    def arguments(self, call: Call) -> list[Any]:
        """What the call at the present instruction is given."""
        registers = self.registers
        return [
            registers[value] if register else value
            for register, value in self._interpreter.values(self.at, call)
        ]

    def complete(self, call: Call, result: Any) -> None:
        """Go on behind a call that has been made, with its result."""
        if call.target != VOID:
            self.registers[call.target] = result
        self.at += 1

    def finish(self) -> Any:
        """Execute everything that is left."""
        self.run_to(())
        return self.result


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
