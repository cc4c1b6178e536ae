"""The rest of a function as a function of its own, which takes what the registers hold where the first was left.

A machine that executes it goes on natively where an interpreter stopped: nothing is launched twice, and nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

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


def rest(program: Program, name: str, at: int) -> tuple[Program, str, tuple[int, ...]]:
    """A program that has the rest of one of another's functions, and what that calls.

    ::

        f(%0, %1):                         f@1(%0, %1):                      # what %1 and %2 held
          call add in: %0, %1 dst: %2        goto 2
          call add in: %2, %1 dst: %3        call add in: %2, %0 dst: %1     # not reached
          ret %3                             call add in: %1, %0 dst: %3
                                             ret %3

    Args:
        program: It is not changed.
        name: The function that was left.
        at: Index in the function of the instruction that comes next.

    Returns:
        The program, the new function's name, and the registers of the old one that it takes, in order.

    Raises:
        ArtifactError: There is no such function.
    """
    function = program.function(name)
    body = program.instructions[function.start : function.end]
    taken = _live(body, at)
    others = [register for register in range(function.registers) if register not in set(taken)]
    numbers = {old: new for new, old in enumerate((*taken, *others))}
    instructions: list[Instruction] = [
        Goto(1 + at),
        *(_renumbered(instruction, numbers) for instruction in body),
    ]
    new = replace(
        function,
        name=f"{name}@{at}",
        start=0,
        end=len(instructions),
        parameters=len(taken),
        names=tuple(f"register_{register}" for register in taken),
    )
    called = _called(program, body)
    functions: list[Function] = []
    for index, old in enumerate(program.functions):
        if old.kind is Kind.BYTECODE:  # what is not called keeps its place in the table, and does nothing
            kept = program.instructions[old.start : old.end] if index in called else (Return(VOID),)
            start = len(instructions)
            instructions += kept
            old = replace(old, start=start, end=start + len(kept))
        functions.append(old)
    changed = replace(program, functions=(*functions, new), instructions=tuple(instructions))
    return changed, new.name, taken


def _called(program: Program, body: Sequence[Instruction]) -> set[int]:
    """The functions of the table that some instructions call or pass on, and those that these do."""
    found: set[int] = set()
    waiting = [body]
    while waiting:
        for call in waiting.pop():
            if not isinstance(call, Call):
                continue
            passed = (one.value for one in call.arguments if one.source is Source.FUNCTION)
            for index in {call.function, *passed} - found:
                found.add(index)
                function = program.functions[index]
                waiting.append(program.instructions[function.start : function.end])
    return found


def _live(body: Sequence[Instruction], at: int) -> tuple[int, ...]:
    """The registers that are read from an instruction on before they are written, whichever way is taken."""
    targets = {index + _distance(instruction) for index, instruction in enumerate(body)}
    before: dict[int, frozenset[int]] = {}
    while True:
        known = dict(before)
        live: set[int] = set()
        wanted: frozenset[int] = frozenset()
        for index in reversed(range(len(body))):
            match body[index]:
                case Return(register):
                    live = {register}
                case Goto(offset):
                    live = set(before.get(index + offset, ()))
                case If(register, otherwise):
                    live |= {register, *before.get(index + otherwise, ())}
                case Call(target, _, arguments):
                    live.discard(target)
                    live.update(one.value for one in arguments if one.source is Source.REGISTER)
            if index in targets:
                before[index] = frozenset(live)
            if index == at:
                wanted = frozenset(live)
        if before == known:  # a loop's beginning is seen after its end
            return tuple(sorted(register for register in wanted if register < SPECIAL))


def _distance(instruction: Instruction) -> int:
    match instruction:
        case Goto(offset):
            return offset
        case If(_, otherwise):
            return otherwise
    return 0


def _renumbered(instruction: Instruction, numbers: Mapping[int, int]) -> Instruction:
    """The same instruction over other registers; those that are none stay as they are."""
    match instruction:
        case Return(register):
            return Return(numbers.get(register, register))
        case If(register, otherwise):
            return If(numbers.get(register, register), otherwise)
        case Call(target, function, arguments):
            renumbered = tuple(
                Argument(one.source, numbers.get(one.value, one.value))
                if one.source is Source.REGISTER
                else one
                for one in arguments
            )
            return Call(numbers.get(target, target), function, renumbered)
    return instruction
