"""Programs as bytes and as data: nothing is lost, damage is found before the virtual machine sees it."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from relax_llm.errors import ArtifactError
from relax_llm.runtime import vm
from relax_llm.runtime.program import (
    MACHINE,
    VOID,
    Argument,
    Call,
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
from relax_llm.runtime.program_bytes import read, write
from tests.runtime.libraries import Sums, build

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EVERYTHING = Program(
    functions=(
        Function(Kind.PACKED, "kernel", parameters=-2),
        Function(Kind.BYTECODE, "größer", 0, 5, 1, 3, ("x",)),
        Function(Kind.COMPILED, "other", 0, 0, 2, 3, ("x", "")),
    ),
    constants=(
        -(2**63),
        0.1,
        float("inf"),
        "text, größer",
        "",
        (),
        (1, 2**40),
        DataType(2, 32, 4),
        Tensor((1, 0), DataType(0, 16, 1), (2, 3), bytes(range(12))),
        Tensor((1, 0), DataType(2, 64, 1), (), bytes(8)),
    ),
    instructions=(
        Call(
            2,
            0,
            (
                Argument(Source.REGISTER, 0),
                Argument(Source.REGISTER, VOID),
                Argument(Source.REGISTER, MACHINE),
                Argument(Source.IMMEDIATE, -5),
                Argument(Source.IMMEDIATE, 2**55 - 1),
                Argument(Source.IMMEDIATE, -(2**55) + 1),
                Argument(Source.CONSTANT, 9),
                Argument(Source.FUNCTION, 1),
            ),
        ),
        If(2, 2),
        Call(VOID, 2, ()),
        Goto(1),
        Return(2),
    ),
    scopes=((3, "global"), (0, "")),
)
"""One of everything."""

BYTES = write(EVERYTHING)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> vm.VirtualMachine:
    """Of a small library made by TVM."""
    return vm.VirtualMachine(build(Sums, tmp_path_factory.mktemp("library") / "lib.so"))


def test_everything_comes_back() -> None:
    assert read(BYTES) == EVERYTHING
    assert write(read(BYTES)) == BYTES


def test_tvms_own_bytes_come_back(machine: vm.VirtualMachine, tmp_path: Path) -> None:
    file = tmp_path / "program"
    machine._module.write_to_file(str(file))
    assert write(machine.program) == file.read_bytes()


def test_a_program_reads_as_tvm_shows_it(machine: vm.VirtualMachine) -> None:
    """The same functions, instructions, callees and registers as in TVM's own text."""
    shown = machine._module["as_text"]()
    program = machine.program
    for name in ("twice", "either"):
        text = shown.partition(f"@{name}:\n")[2].partition("\n\n")[0].splitlines()
        function = program.function(name)
        assert len(text) == function.end - function.start
        for line, instruction in zip(text, program.instructions[function.start : function.end], strict=True):
            assert line.split() == _shown(program, instruction).split()


def _shown(program: Program, instruction: Any) -> str:
    def register(number: int) -> str:
        return {VOID: "%void", MACHINE: "%vm"}.get(number, f"%{number}")

    match instruction:
        case Call(target, function, arguments):
            forms: dict[Source, Callable[[int], str]] = {
                Source.REGISTER: register,
                Source.IMMEDIATE: lambda value: f"i{value}",
                Source.CONSTANT: lambda value: f"c[{value}]",
                Source.FUNCTION: lambda value: f"f[{program.functions[value].name}]",
            }
            values = ", ".join(forms[argument.source](argument.value) for argument in arguments)
            return f"call {program.functions[function].name} in: {values} dst: {register(target)}"
        case Return(result):
            return f"ret {register(result)}"
        case Goto(offset):
            return f"goto {offset}"
        case If(condition, otherwise):
            return f"If {register(condition)}, {otherwise}"
    raise AssertionError(instruction)


def test_truncated() -> None:
    sections = set()
    for end in range(len(BYTES)):
        with pytest.raises(ArtifactError) as caught:
            read(BYTES[:end])
        said = re.fullmatch(
            r"The program is truncated: its ([a-z ]+) needs \d+ bytes at \d+, but it ends at \d+\.",
            str(caught.value),
        )
        assert said is not None, caught.value
        sections.add(said[1])
    assert sections == {"header", "function table", "memory scopes", "constants", "instructions"}


def test_what_follows_the_end() -> None:
    with pytest.raises(ArtifactError, match="in its instructions, 3 bytes follow its end"):
        read(BYTES + b"abc")


def test_foreign_bytes() -> None:
    with pytest.raises(ArtifactError, match="no program of TVM's virtual machine"):
        read(b"\x7fELF" + bytes(100))


def test_another_version() -> None:
    other = BYTES.replace(struct.pack("<Q", 4) + b"0.14", struct.pack("<Q", 4) + b"0.15", 1)
    with pytest.raises(ArtifactError, match=r"has version '0.15', but this version reads '0.14'"):
        read(other)


def _with(**changes: Any) -> bytes:
    return write(replace(EVERYTHING, **changes))


def _called(**changes: Any) -> bytes:
    first, *others = EVERYTHING.instructions
    return _with(instructions=(replace(first, **changes), *others))


def _function(**changes: Any) -> bytes:
    kernel, function, other = EVERYTHING.functions
    return _with(functions=(kernel, replace(function, **changes), other))


def _other_instruction(at: int, instruction: Any) -> bytes:
    instructions = list(EVERYTHING.instructions)
    instructions[at] = instruction
    return _with(instructions=tuple(instructions))


DAMAGED: dict[str, tuple[bytes, str]] = {
    "a kind of function": (
        BYTES.replace(struct.pack("<iQ", 0, 6) + b"kernel", struct.pack("<iQ", 7, 6) + b"kernel", 1),
        "function table, a function is of the unknown kind 7",
    ),
    "a name that is no text": (BYTES.replace(b"kernel", b"\xff\xfe\xff\xfe\xff\xfe", 1), "not UTF-8"),
    "a type of constant": (
        BYTES.replace(struct.pack("<id", 3, 0.1), struct.pack("<id", 4, 0.1), 1),
        "constants, a constant is of the unknown type 4",
    ),
    "a tensor's beginning": (
        BYTES.replace(struct.pack("<Q", 0xDD5E40F096B4A13F), struct.pack("<Q", 1), 1),
        "another beginning",
    ),
    "a tensor's size": (
        _with(constants=(Tensor((1, 0), DataType(0, 16, 1), (2, 3), bytes(11)),)),
        r"a tensor of shape \(2, 3\) has 11 bytes",
    ),
    "a tensor's negative sizes": (
        _with(constants=(Tensor((1, 0), DataType(0, 8, 1), (-2, -3), bytes(6)),)),
        r"a tensor of shape \(-2, -3\) has 6 bytes",
    ),
    "a function behind the end": (_function(end=6), "größer is said to be instructions 0 to 6 of 5"),
    "a function before the beginning": (_function(start=-1), "instructions -1 to 5"),
    "a function of nothing": (_function(start=5), "instructions 5 to 5"),
    "more parameters than registers": (_function(parameters=4), "4 parameters and 3 registers"),
    "a function without an end": (
        _other_instruction(4, Call(VOID, 0, ())),
        "größer does not end",
    ),
    "a callee": (_called(function=3), "instruction 0 of größer refers to what is not there"),
    "a target": (_called(target=3), "instruction 0 of größer"),
    "a special target": (_called(target=MACHINE), "instruction 0 of größer"),
    "a register": (_called(arguments=(Argument(Source.REGISTER, 3),)), "instruction 0"),
    "a register that is negative": (_called(arguments=(Argument(Source.REGISTER, -1),)), "instruction 0"),
    "a constant": (_called(arguments=(Argument(Source.CONSTANT, 10),)), "instruction 0"),
    "a function as an argument": (_called(arguments=(Argument(Source.FUNCTION, 3),)), "instruction 0"),
    "a result": (_other_instruction(4, Return(3)), "instruction 4"),
    "a condition": (_other_instruction(1, If(3, 2)), "instruction 1"),
    "a jump behind the end": (_other_instruction(3, Goto(2)), "instruction 3"),
    "a jump before the beginning": (_other_instruction(3, Goto(-4)), "instruction 3"),
    "a jump to itself": (_other_instruction(1, If(2, 0)), "instruction 1"),
    "an opcode": (BYTES[: -8 * 2] + struct.pack("<2q", 5, 2), "instruction 4 is none that is known"),
    "an instruction that is cut off": (
        BYTES[: -8 * 2] + struct.pack("<2q", 4, 2),
        "instruction 4 is cut off",
    ),
}


@pytest.mark.parametrize("case", list(DAMAGED))
def test_damaged(case: str) -> None:
    data, message = DAMAGED[case]
    with pytest.raises(ArtifactError, match=message):
        read(data)


def test_no_changed_byte_leads_anywhere_else() -> None:
    """A changed byte is refused, or it is another program; never another exception."""
    random = np.random.default_rng(0)
    refused = 0
    for at in range(len(BYTES)):
        changed = bytearray(BYTES)
        changed[at] ^= int(random.integers(1, 256))
        try:
            program = read(bytes(changed))
        except ArtifactError:
            refused += 1
        else:
            assert write(program) == bytes(changed)
    assert 0 < refused < len(BYTES)


def test_exchange_everywhere(machine: vm.VirtualMachine) -> None:
    x, w = np.arange(4, dtype=np.float32), np.ones(4, np.float32)
    c = np.array([1, 2, 3, 4], np.float32)
    np.testing.assert_array_equal(_run(machine, x, w), x + w + c)
    changed = machine.executing(machine.program.renamed({"add": "double"}))
    np.testing.assert_array_equal(_run(changed, x, w), x + 2 * w + 2 * c)
    np.testing.assert_array_equal(_run(machine, x, w), x + w + c)
    assert changed.program == machine.program.renamed({"add": "double"})


@pytest.mark.parametrize("which", [0, 1])
def test_exchange_one_call(machine: vm.VirtualMachine, which: int) -> None:
    x, w = np.arange(4, dtype=np.float32), np.ones(4, np.float32)
    c = np.array([1, 2, 3, 4], np.float32)
    at = [index for index, name in machine.program.calls("twice") if name == "add"][which]
    program = machine.program.exchanged({at: "double"})
    assert read(write(program)) == program
    changed = machine.executing(program)
    factors = [2 if index == which else 1 for index in range(2)]
    np.testing.assert_array_equal(_run(changed, x, w), x + factors[0] * w + factors[1] * c)
    assert program.exchanged({at: "add"}).instructions == machine.program.instructions


def _run(machine: vm.VirtualMachine, x: Any, w: Any) -> Any:
    return vm.numpy(machine["twice"](vm.tensor(x), vm.tensor(w)))


def test_kernels_on_their_own(machine: vm.VirtualMachine) -> None:
    x, y = np.arange(4, dtype=np.float32), np.zeros(4, np.float32)
    machine.kernel("double")(vm.tensor(x), vm.tensor(x), vm.tensor(y))
    np.testing.assert_array_equal(y, 3 * x)
    with pytest.raises(ArtifactError, match=r"lib.so has no kernel 'triple'"):
        machine.kernel("triple")


def test_exchanges_of_what_is_not_there(machine: vm.VirtualMachine) -> None:
    program = machine.program
    with pytest.raises(ArtifactError, match="calls no kernel 'subtract'"):
        program.renamed({"subtract": "add"})
    with pytest.raises(ArtifactError, match="calls no kernel 'twice'"):
        program.renamed({"twice": "add"})
    end = program.function("twice").end
    for at in (end - 1, -1, len(program.instructions)):
        with pytest.raises(ArtifactError, match=f"Instruction {at} of the program is no call"):
            program.exchanged({at: "add"})
    with pytest.raises(ArtifactError, match="no function 'add' with instructions"):
        program.function("add")
    with pytest.raises(ArtifactError, match=r"cannot execute the changed program: .*triple"):
        machine.executing(program.renamed({"add": "triple"}))
