"""Programs as bytes, in the format of TVM's virtual machine (`VMExecutable`, format 2, version 0.14).

All numbers are little-endian. Text and lists begin with their length::

    u64 magic, text version
    functions:    [i32 kind, text name, i64 start, end, parameters, registers, [text parameter]]
    scopes:       [i64 constant, text scope]
    constants:    [i32 type, value]
    instructions: [i64 place in the code], [i64 word of the code]

An instruction is a few words: 1, target, function, n, n arguments (call); 2, register (return); 3, offset (go to);
4, register, offset (if). An argument has its source in the upper 8 bits and a signed number in the lower 56.
"""

import math
import struct
from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

import numpy as np
import numpy.typing as npt

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

T = TypeVar("T")

VERSION = "0.14"

_MAGIC = 0xD225DE2F4214151E
_TENSOR_MAGIC = 0xDD5E40F096B4A13F
_INT, _FLOAT, _DTYPE, _TEXT, _SHAPE, _TENSOR = 1, 3, 5, 65, 69, 70  # TVM's indices of types
_CALL, _RETURN, _GOTO, _IF = 1, 2, 3, 4
_VALUE_BITS = 56


class _Reader:
    """Bytes, read from front to back."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.section = data, 0, "header"

    def take(self, size: int) -> bytes:
        """The next bytes."""
        if size > len(self.data) - self.at:
            raise ArtifactError(
                f"The program is truncated: its {self.section} needs {size} bytes at {self.at}, but it ends at "
                f"{len(self.data)}."
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str) -> int:
        """A whole number, by `struct`'s letter."""
        return int(struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0])

    def text(self) -> str:
        """Length and UTF-8."""
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise self.wrong(f"text before byte {self.at} is not UTF-8") from None

    def words(self, size: int | None = None) -> npt.NDArray[np.int64]:
        """Numbers of 64 bits; as many as a length before them says, where no size is given."""
        size = self.number("Q") if size is None else size
        return np.frombuffer(self.take(8 * size), "<i8")

    def each(self, item: Callable[[], T]) -> tuple[T, ...]:
        """Length and items."""
        return tuple([item() for _ in range(self.number("Q"))])

    def wrong(self, what: str) -> ArtifactError:
        """An error in this section."""
        return ArtifactError(f"The program is damaged: in its {self.section}, {what}.")


def read(data: bytes) -> Program:
    """Read what `write` or TVM wrote.

    Raises:
        ArtifactError: The bytes are no program, or of another version, truncated, or contradict themselves.
    """
    reader = _Reader(data)
    if reader.number("Q") != _MAGIC:
        raise ArtifactError("These bytes are no program of TVM's virtual machine.")
    version = reader.text()
    if version != VERSION:
        raise ArtifactError(
            f"The program has version {version!r}, but this version reads {VERSION!r}; compile it again."
        )
    reader.section = "function table"
    functions = reader.each(lambda: _function(reader))
    reader.section = "memory scopes"
    scopes = reader.each(lambda: (reader.number("q"), reader.text()))
    reader.section = "constants"
    constants = reader.each(lambda: _constant(reader))
    reader.section = "instructions"
    instructions = _instructions(reader)
    if reader.at != len(data):
        raise reader.wrong(f"{len(data) - reader.at} bytes follow its end")
    program = Program(functions, constants, instructions, scopes)
    _check(program, reader)
    return program


def write(program: Program) -> bytes:
    """A program as TVM's virtual machine loads it; `read` gives the same program again."""
    codes = [_code(instruction) for instruction in program.instructions]
    starts = list(accumulate((len(code) for code in codes), initial=0))[:-1]
    return b"".join(
        [
            struct.pack("<Q", _MAGIC),
            _text(VERSION),
            _list([_function_bytes(function) for function in program.functions]),
            _list([struct.pack("<q", constant) + _text(scope) for constant, scope in program.scopes]),
            _list([_constant_bytes(constant) for constant in program.constants]),
            _words(starts),
            _words([word for code in codes for word in code]),
        ]
    )


def _function(reader: _Reader) -> Function:
    kind = reader.number("i")
    if kind not in tuple(Kind):
        raise reader.wrong(f"a function is of the unknown kind {kind}")
    name = reader.text()
    start, end, parameters, registers = (int(word) for word in reader.words(4))
    return Function(Kind(kind), name, start, end, parameters, registers, reader.each(reader.text))


def _function_bytes(function: Function) -> bytes:
    return (
        struct.pack("<i", function.kind)
        + _text(function.name)
        + struct.pack("<4q", function.start, function.end, function.parameters, function.registers)
        + _list([_text(name) for name in function.names])
    )


def _constant(reader: _Reader) -> Constant:
    kind = reader.number("i")
    if kind == _INT:
        return reader.number("q")
    if kind == _FLOAT:
        return float(struct.unpack("<d", reader.take(8))[0])
    if kind == _DTYPE:
        return _dtype(reader)
    if kind == _TEXT:
        return reader.text()
    if kind == _SHAPE:
        return tuple(reader.words().tolist())
    if kind == _TENSOR:
        return _tensor(reader)
    raise reader.wrong(f"a constant is of the unknown type {kind}")


def _constant_bytes(constant: Constant) -> bytes:
    if isinstance(constant, int):
        return struct.pack("<iq", _INT, constant)
    if isinstance(constant, float):
        return struct.pack("<id", _FLOAT, constant)
    if isinstance(constant, str):
        return struct.pack("<i", _TEXT) + _text(constant)
    if isinstance(constant, tuple):
        return struct.pack("<i", _SHAPE) + _words(constant)
    if isinstance(constant, DataType):
        return struct.pack("<i", _DTYPE) + _dtype_bytes(constant)
    return b"".join(
        [
            struct.pack("<iQQiii", _TENSOR, _TENSOR_MAGIC, 0, *constant.device, len(constant.shape)),
            _dtype_bytes(constant.type),
            struct.pack(f"<{len(constant.shape)}q", *constant.shape),
            struct.pack("<q", len(constant.data)),
            constant.data,
        ]
    )


def _dtype(reader: _Reader) -> DataType:
    return DataType(*struct.unpack("<BBH", reader.take(4)))


def _dtype_bytes(dtype: DataType) -> bytes:
    return struct.pack("<BBH", dtype.code, dtype.bits, dtype.lanes)


def _tensor(reader: _Reader) -> Tensor:
    if (reader.number("Q"), reader.number("Q")) != (_TENSOR_MAGIC, 0):
        raise reader.wrong("a tensor has another beginning than TVM writes")
    device = (reader.number("i"), reader.number("i"))
    dimensions = reader.number("i")
    dtype = _dtype(reader)
    if dimensions < 0:
        raise reader.wrong(f"a tensor has {dimensions} dimensions")
    shape = tuple(reader.words(dimensions).tolist())
    size = reader.number("q")
    if min(shape, default=0) < 0 or size != math.prod(shape) * -(-dtype.bits * dtype.lanes // 8):
        raise reader.wrong(f"a tensor of shape {shape} has {size} bytes")
    return Tensor(device, dtype, shape, reader.take(size))


def _instructions(reader: _Reader) -> tuple[Instruction, ...]:
    starts, words = reader.words().tolist(), reader.words().tolist()
    instructions: list[Instruction] = []
    at = 0
    for start in starts:
        if start != at:
            raise reader.wrong(f"instruction {len(instructions)} begins at word {start} and not at {at}")
        try:
            instruction = _instruction(words, at)
        except IndexError:
            raise reader.wrong(f"instruction {len(instructions)} is cut off") from None
        if instruction is None:
            raise reader.wrong(f"instruction {len(instructions)} is none that is known")
        instructions.append(instruction)
        at += 4 + len(instruction.arguments) if isinstance(instruction, Call) else len(_code(instruction))
    if at != len(words):
        raise reader.wrong(f"{len(words) - at} words belong to no instruction")
    return tuple(instructions)


def _instruction(words: list[int], at: int) -> Instruction | None:
    match words[at]:
        case 1:  # call
            count = words[at + 3]
            if count < 0 or at + 4 + count > len(words):
                raise IndexError
            arguments = []
            for word in words[at + 4 : at + 4 + count]:
                source = (word >> _VALUE_BITS) & 0xFF
                if source not in tuple(Source):
                    return None
                value = word & ((1 << _VALUE_BITS) - 1)
                signed = value - (1 << _VALUE_BITS) if value >> (_VALUE_BITS - 1) else value
                arguments.append(Argument(Source(source), signed))
            return Call(words[at + 1], words[at + 2], tuple(arguments))
        case 2:
            return Return(words[at + 1])
        case 3:
            return Goto(words[at + 1])
        case 4:
            return If(words[at + 1], words[at + 2])
    return None


def _code(instruction: Instruction) -> list[int]:
    match instruction:
        case Call(target, function, arguments):
            mask = (1 << _VALUE_BITS) - 1
            words = [argument.source << _VALUE_BITS | argument.value & mask for argument in arguments]
            return [_CALL, target, function, len(words), *words]
        case Return(register):
            return [_RETURN, register]
        case Goto(offset):
            return [_GOTO, offset]
        case If(register, otherwise):
            return [_IF, register, otherwise]


def _check(program: Program, reader: _Reader) -> None:
    """Refuse what would lead the virtual machine, which does not look, out of its own tables."""
    limits = {Source.CONSTANT: len(program.constants), Source.FUNCTION: len(program.functions)}
    for function in program.functions:
        if function.kind is not Kind.BYTECODE:
            continue
        if not 0 <= function.start < function.end <= len(program.instructions):
            raise reader.wrong(
                f"{function.name} is said to be instructions {function.start} to {function.end} of "
                f"{len(program.instructions)}"
            )
        if not 0 <= function.parameters <= function.registers < SPECIAL:
            raise reader.wrong(
                f"{function.name} has {function.parameters} parameters and {function.registers} registers"
            )
        for at in range(function.start, function.end):
            if not _fits(program.instructions[at], at, function, limits):
                raise reader.wrong(f"instruction {at} of {function.name} refers to what is not there")
        if not isinstance(program.instructions[function.end - 1], Return | Goto):
            raise reader.wrong(f"{function.name} does not end")


def _fits(instruction: Instruction, at: int, function: Function, limits: dict[Source, int]) -> bool:
    match instruction:
        case Call(target, callee, arguments):
            return (
                (0 <= target < function.registers or target == VOID)
                and 0 <= callee < limits[Source.FUNCTION]
                and all(
                    argument.source is Source.IMMEDIATE
                    or 0 <= argument.value < limits.get(argument.source, function.registers)
                    or (argument.source is Source.REGISTER and argument.value in (VOID, MACHINE))
                    for argument in arguments
                )
            )
        case Return(register):
            return 0 <= register < function.registers or register in (VOID, MACHINE)
        case Goto(offset):
            return function.start <= at + offset < function.end
        case If(register, otherwise):
            return 0 <= register < function.registers and at < at + otherwise < function.end


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _list(items: list[bytes]) -> bytes:
    return struct.pack("<Q", len(items)) + b"".join(items)


def _words(words: list[int] | tuple[int, ...]) -> bytes:
    return struct.pack("<Q", len(words)) + np.array(words, "<i8").tobytes()
