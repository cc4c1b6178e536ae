"""The rest of a function as a function of its own: from every place, over branches, calls and loops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from relax_llm import ffi
from relax_llm.runtime import vm
from relax_llm.runtime.interpreter import Interpreter
from relax_llm.runtime.program import (
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
from relax_llm.runtime.program_bytes import read, write
from relax_llm.runtime.rest import rest
from tests.runtime.libraries import Sums, build

if TYPE_CHECKING:
    from typing import Any


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> vm.VirtualMachine:
    """Of the library of sums."""
    return vm.VirtualMachine(build(Sums, tmp_path_factory.mktemp("library") / "lib.so"))


class Nth:
    """As what to stop at: whatever is called after so many calls."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __contains__(self, function: object) -> bool:
        self.count -= 1
        return self.count < 0


def _from_everywhere(machine: vm.VirtualMachine, function: str, *arguments: Any) -> list[Any]:
    """What comes out when it is left before each of its calls, and run on natively."""
    interpreter = Interpreter(machine)
    results: list[Any] = []
    while True:
        frame = interpreter.start(function, *arguments)
        if frame.run_to(Nth(len(results))) is None:
            return results
        native, registers = interpreter.rest(frame, {})
        results.append(native(*registers))


@pytest.mark.parametrize("condition", [True, False])
def test_over_branches_and_calls_of_other_functions(machine: vm.VirtualMachine, condition: bool) -> None:
    x = np.arange(4, dtype=np.float32)
    arguments = (vm.tensor(np.array(condition)), vm.tensor(x))
    expected = vm.numpy(machine["either"](*arguments)).copy()
    results = _from_everywhere(machine, "either", *arguments)
    assert len(results) > 3
    for result in results:
        np.testing.assert_array_equal(vm.numpy(result), expected)


def test_other_kernels_in_the_rest(machine: vm.VirtualMachine) -> None:
    """Those that were launched before stay as they were."""
    x, w = np.arange(4, dtype=np.float32), np.ones(4, np.float32)
    interpreter = Interpreter(machine)
    (first, second) = (at for at, _ in interpreter.calls("twice", {"add"}).each)
    frame = interpreter.start("twice", vm.tensor(x), vm.tensor(w))
    frame.run_to(Nth([at for at, _ in _calls(machine, "twice")].index(second)))
    assert frame.at == second > first
    native, registers = interpreter.rest(frame, {"add": "double"})
    np.testing.assert_array_equal(vm.numpy(native(*registers)), x + w + 2 * np.array([1, 2, 3, 4]))


def _calls(machine: vm.VirtualMachine, name: str) -> list[tuple[int, Call]]:
    function = machine.program.function(name)
    body = machine.program.instructions[function.start : function.end]
    return [(at, one) for at, one in enumerate(body) if isinstance(one, Call)]


def _register(number: int) -> Argument:
    return Argument(Source.REGISTER, number)


COUNT = "tests.rest.count"

# total, n -> count(total) n times; register 2 is not read before it is written
LOOP: tuple[Instruction, ...] = (
    Call(2, 0, (Argument(Source.IMMEDIATE, 0), _register(1))),
    If(1, 4),
    Call(0, 0, (_register(0), Argument(Source.IMMEDIATE, 1))),
    Call(1, 0, (_register(1), Argument(Source.IMMEDIATE, -1))),
    Goto(-3),
    Return(0),
)


def test_over_loops(machine: vm.VirtualMachine) -> None:
    instructions = (*LOOP[:1], If(1, 4), *LOOP[2:])
    program = Program(
        (
            Function(Kind.PACKED, COUNT, parameters=-2),
            Function(Kind.BYTECODE, "loop", 0, len(instructions), 2, 3, ("total", "n")),
        ),
        (),
        instructions,
    )
    seen: list[tuple[int, int]] = []

    def count(a: int, b: int) -> int:
        seen.append((a, b))
        return a + b

    ffi.runtime().register_global_func(COUNT, count, override=True)
    looping = machine.executing(program)
    assert looping["loop"](10, 3) == 13
    whole = list(seen)
    interpreter = Interpreter(looping)
    for calls in range(len(whole)):
        seen.clear()
        frame = interpreter.start("loop", 10, 3)
        assert frame.run_to(Nth(calls)) is not None
        native, registers = interpreter.rest(frame, {})
        assert native(*registers) == 13
        assert seen == whole


@pytest.mark.parametrize(("at", "registers"), [(0, (0, 1)), (1, (0, 1)), (3, (0, 1)), (5, (0,))])
def test_what_it_takes_is_what_is_read(at: int, registers: tuple[int, ...]) -> None:
    program = Program(
        (
            Function(Kind.PACKED, COUNT, parameters=-2),
            Function(Kind.BYTECODE, "loop", 0, len(LOOP), 2, 3, ("total", "n")),
            Function(Kind.BYTECODE, "other", len(LOOP), len(LOOP) + 1, 0, 1),
        ),
        (),
        (*LOOP, Return(VOID)),
    )
    changed, name, taken = rest(program, "loop", at)
    assert taken == registers
    assert changed.function(name).parameters == len(registers)
    assert read(write(changed)) == changed
    assert [function.name for function in changed.functions] == [COUNT, "loop", "other", name]
    assert len(changed.instructions) == 1 + len(LOOP) + 2  # what is not called does nothing
