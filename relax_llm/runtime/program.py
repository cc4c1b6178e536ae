"""What a virtual machine executes, as data: functions, constants and instructions, to read and to change.

`relax_llm.runtime.program_bytes` reads and writes the bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum

from relax_llm.errors import ArtifactError

SPECIAL = 1 << 54
"""Registers from here on are none: nothing is kept in them."""

VOID = SPECIAL
"""As a destination: the result is dropped. As an argument: None."""

MACHINE = SPECIAL + 1
"""As an argument: the virtual machine itself."""

_ANY = -2  # what TVM writes as a kernel's number of parameters


class Kind(IntEnum):
    """What a function of the table is made of."""

    PACKED = 0
    """A compiled kernel of the library, or a function of TVM's runtime, known by its name."""
    BYTECODE = 1
    """Instructions."""
    COMPILED = 2
    """A function whose instructions were compiled; it has none."""


@dataclass(frozen=True)
class Function:
    """One entry of the function table.

    Attributes:
        kind: What it is made of.
        name: Its symbol.
        start: Index of its first instruction; 0 where it has none, and likewise below.
        end: Index behind its last instruction.
        parameters: Number of parameters. They come in the first registers.
        registers: Number of registers.
        names: The parameters' names.
    """

    kind: Kind
    name: str
    start: int = 0
    end: int = 0
    parameters: int = 0
    registers: int = 0
    names: tuple[str, ...] = ()


class Source(IntEnum):
    """Where an argument comes from."""

    REGISTER = 0
    IMMEDIATE = 1
    CONSTANT = 2
    FUNCTION = 3


@dataclass(frozen=True)
class Argument:
    """One argument of a call: a register, a number that stands for itself, a constant or a function by index."""

    source: Source
    value: int


@dataclass(frozen=True)
class Call:
    """Call a function of the table and keep its result in a register, or drop it where `target` is `VOID`."""

    target: int
    function: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Return:
    """Leave the function with what a register holds."""

    register: int


@dataclass(frozen=True)
class Goto:
    """Go on this many instructions further, or back."""

    offset: int


@dataclass(frozen=True)
class If:
    """Go on with the next instruction where a register is not 0, else this many further."""

    register: int
    otherwise: int


Instruction = Call | Return | Goto | If


@dataclass(frozen=True)
class DataType:
    """A type of elements, by DLPack's code, bits and lanes."""

    code: int
    bits: int
    lanes: int


@dataclass(frozen=True)
class Tensor:
    """A constant tensor on a device.

    Attributes:
        device: DLPack's device type and number.
        type: Of its elements.
        shape: Its sizes.
        data: Its elements, row by row.
    """

    device: tuple[int, int]
    type: DataType
    shape: tuple[int, ...]
    data: bytes


Constant = int | float | str | tuple[int, ...] | DataType | Tensor
"""A tuple is a shape."""


@dataclass(frozen=True)
class Program:
    """Everything that a virtual machine executes. It names the kernels it calls, and holds none.

    Attributes:
        functions: The function table; calls refer to it by index.
        constants: The constants; arguments refer to them by index.
        instructions: Of all functions, one after the other.
        scopes: Memory scopes of constants, by index; constants in ordinary memory have none.
    """

    functions: tuple[Function, ...]
    constants: tuple[Constant, ...]
    instructions: tuple[Instruction, ...]
    scopes: tuple[tuple[int, str], ...] = ()

    def function(self, name: str) -> Function:
        """The function of this name that has instructions.

        Raises:
            ArtifactError: There is none.
        """
        for function in self.functions:
            if function.name == name and function.kind is Kind.BYTECODE:
                return function
        raise ArtifactError(f"The program has no function {name!r} with instructions.")

    def calls(self, name: str) -> Iterator[tuple[int, str]]:
        """Index and callee of each call in a function, in the order of the instructions.

        Raises:
            ArtifactError: There is no such function.
        """
        function = self.function(name)
        for index in range(function.start, function.end):
            instruction = self.instructions[index]
            if isinstance(instruction, Call):
                yield index, self.functions[instruction.function].name

    def renamed(self, names: Mapping[str, str]) -> "Program":
        """The same program over other kernels: each call of one that `names` has calls the one it maps to.

        ::

            call matmul_n48_k64 in: %3, %5 dst: %void     ->     call mine in: %3, %5 dst: %void

        Raises:
            ArtifactError: The program calls no kernel of such a name.
        """
        packed = {function.name for function in self.functions if function.kind is Kind.PACKED}
        for name in names:
            if name not in packed:
                raise ArtifactError(f"The program calls no kernel {name!r}; no call can be exchanged.")
        functions = tuple(
            replace(function, name=names.get(function.name, function.name))
            if function.kind is Kind.PACKED
            else function
            for function in self.functions
        )
        return replace(self, functions=functions)

    def exchanged(self, calls: Mapping[int, str]) -> "Program":
        """The same program with other kernels called in single places, with the arguments that are there.

        Args:
            calls: Indices of instructions, as `calls` gives them, and the kernel that each calls from now on.

        Raises:
            ArtifactError: One of the instructions is no call.
        """
        functions, instructions = list(self.functions), list(self.instructions)
        places = {
            function.name: index for index, function in enumerate(functions) if function.kind is Kind.PACKED
        }
        for at, name in calls.items():
            instruction = instructions[at] if 0 <= at < len(instructions) else None
            if not isinstance(instruction, Call):
                raise ArtifactError(f"Instruction {at} of the program is no call; nothing to exchange.")
            if name not in places:
                places[name] = len(functions)
                functions.append(Function(Kind.PACKED, name, parameters=_ANY))
            instructions[at] = replace(instruction, function=places[name])
        return replace(self, functions=tuple(functions), instructions=tuple(instructions))
