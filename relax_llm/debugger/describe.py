"""A launch and its tensors in words, for 80 columns."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm.debugger.session import Session
from relax_llm.debugger.statistics import Statistics, histogram, statistics
from relax_llm.errors import InputError
from relax_llm.runtime.launch import Launch, Operand
from relax_llm.runtime.listing import Listed

Array = npt.NDArray[Any]

LISTINGS = ("source", "tir", "llvm", "assembly")
"""In what forms a kernel can be read."""


def where(session: Session) -> str:
    """Where the run stands, in a line or two, with why it stopped there."""
    steps = session.steps
    if steps.ended:
        return f"{steps.function} has ended after {len(steps)} launches.\n{expected(session)}"
    launch = session.launch
    stop = steps.stop
    lines = [f"{stop}"] if stop is not None and stop.breakpoint.number else []
    if session.interrupted:
        lines.append("interrupted")
    state = f"{launch.done}{took(launch)}" if launch.done else "about to be made"
    return "\n".join([*lines, f"{launch}, {state}"])


def expected(session: Session) -> str:
    """What the model expects next, where the call has ended."""
    tokenizer = session.runner.tokenizer
    try:
        likeliest = session.likeliest(5)
    except InputError as error:
        return str(error)
    shown = [
        f"{token if tokenizer is None else repr(tokenizer.decode([token], skip_special_tokens=False))} {share:.1%}"
        for token, share in likeliest
    ]
    return f"expected next: {', '.join(shown)}"


def took(launch: Launch) -> str:
    """How long it took, and how much it did in that time."""
    if not launch.seconds:
        return ""
    rates = (
        f"{launch.flops / launch.seconds / 1e9:.3g} GFLOP/s, {launch.bytes / launch.seconds / 1e9:.3g} GB/s"
    )
    return f" in {launch.seconds * 1e6:.1f} us: {rates}"


def information(session: Session) -> str:
    """All that is known of the present launch."""
    launch = session.launch
    return (
        f"launch  {launch.index} of {len(session.steps)} in {launch.function}: {launch.site}\n{about(launch)}"
    )


def about(launch: Launch) -> str:
    """What a launch computes with which kernel, and on what."""
    others = [name for name in launch.kernels if name != launch.kernel]
    instead = f"; {', '.join(others)} could serve" if others else ""
    sizes = ", ".join(f"{name} = {size}" for name, size in launch.sizes.items())
    return (
        f"kernel  {launch.kernel}, for {launch.operator}: {launch.why}{instead}\n"
        f"sizes   {sizes}; {launch.flops:,.0f} flops, {launch.bytes:,.0f} bytes\n"
        f"state   {launch.done + took(launch) if launch.done else 'about to be made'}\n"
        f"{tensors(launch)}"
    )


def tensors(launch: Launch) -> str:
    """One line for each argument; what has a name has it in a second line."""
    rows = [" n  role       shape               type          min       max      mean  bad"]
    for index, operand in enumerate(launch.arguments):
        if operand.role == "size":
            rows.append(f"{index:>2}  size       {operand.name} = {operand.value}")
            continue
        shape = "x".join(map(str, operand.value.shape)) or "scalar"
        head = f"{index:>2}  {operand.role:<10} {shape:<19} {operand.value.dtype.name:<9}"
        if operand.role == "output" and not launch.done:
            rows.append(f"{head} not computed yet")
        else:
            rows.append(head + _numbers(statistics(operand.value)))
        if operand.name:
            rows.append(f"    {operand.name}")
    return "\n".join(rows)


def _numbers(known: Statistics) -> str:
    bad = known.nans + known.infinities
    return f"{_short(known.minimum)} {_short(known.maximum)} {_short(known.mean)} {bad:>4}"


def _short(value: float) -> str:
    return f"{'-' if math.isnan(value) else f'{value:.3g}':>9}"


def tensor(launch: Launch, number: int, part: Any = ...) -> str:
    """Statistics, a histogram and numbers of one argument, or of a part of it.

    Raises:
        InputError: There is no such tensor, or it has no such part.
    """
    operand = argument(launch, number)
    array = part_of(operand.value, part)
    known = statistics(array)
    shape = "x".join(map(str, array.shape)) or "one number"
    name = f" {operand.name}" if operand.name else ""
    lines = [
        f"{number}: {operand.role}{name}, {shape}, {array.dtype.name}",
        f"min {known.minimum:.6g}, max {known.maximum:.6g}, mean {known.mean:.6g}, {known.nans} NaN, "
        f"{known.infinities} infinite of {known.size:,}",
    ]
    if array.size > 1:
        lines += histogram(array)
    if array.size > _FEW:
        lines.append(f"the first numbers: {_text(array.reshape(-1)[:_FIRST])}")
    else:
        lines.append(_text(array))
    return "\n".join(lines)


_FEW, _FIRST = 64, 8


def _text(array: Array) -> str:
    return np.array2string(array, precision=4, max_line_width=80)


def shown(launch: Launch, turn: int) -> str:
    """One tensor after the other as `tensor` shows it; first what was computed, or what will be computed on.

    Args:
        launch: Whose tensors.
        turn: Which of them; after the last comes the first again.
    """
    numbers = [
        index
        for index, operand in enumerate(launch.arguments)
        if operand.role != "size" and (launch.done or operand.role != "output")
    ]
    if not numbers:
        return ""
    first = len(numbers) - 1 if launch.done else 0
    return tensor(launch, numbers[(first + turn) % len(numbers)])


def argument(launch: Launch, number: int) -> Operand:
    """A tensor of a launch, by its place among the arguments.

    Raises:
        InputError: There is none.
    """
    there = {index: operand for index, operand in enumerate(launch.arguments) if operand.role != "size"}
    if number not in there:
        raise InputError(f"{launch} has no tensor {number}; there are: {', '.join(map(str, there))}.")
    return there[number]


def part_of(array: Array, part: Any) -> Array:
    """A part of an array, as a view.

    Raises:
        InputError: It has no such part.
    """
    index = part if isinstance(part, tuple) else (part,)
    if ... not in index:
        index = (*index, ...)  # a view, where a number alone would be a copy
    try:
        return np.asarray(array[index])
    except IndexError as error:
        raise InputError(f"A tensor of shape {list(array.shape)} has no such part: {error}.") from None


def launches(rows: Sequence[Listed]) -> str:
    """One line for each launch, the current one marked, for 80 columns."""
    return "\n".join(
        f"{'>' if row.current else ' '}{row.index:>4} {mark(row):>9} {row.site:<40} {row.kernel:<12} {row.operator}"
        for row in rows
    )


def mark(row: Listed) -> str:
    """What became of a launch: its time, or a word."""
    if row.done == "skipped" or row.seconds is None:
        return row.done
    return f"{row.seconds * 1e6:.1f}{'*' if row.done == 'replaced' else ' '}"


def listing(launch: Launch, form: str) -> str:
    """The present kernel in one of `LISTINGS`.

    Raises:
        RelaxLLMError: Nobody wrote it, or the artifact has no listings.
    """
    found = getattr(launch, form)
    if found is None:
        raise InputError(
            f"Nobody wrote {launch.kernel}: the compiler made it of what a person wrote; read its tir."
        )
    return str(found)
