"""Launching kernels on a clock: arguments for some M, weights in turn, a loop that costs some tens of nanoseconds."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from relax_llm.tuning.memory import Memory
from relax_llm.tuning.rounds import Run

Launch = Callable[..., None]

WEIGHT = "weight"
"""The argument that comes from memory."""


@dataclass(frozen=True)
class Arguments:
    """What kernels of one problem take at some sizes, in order, the weight as each layout has it.

    Attributes:
        shapes: By name; the shape of `WEIGHT` is not used.
        dtypes: By name.
        weights: Shape and dtype of the weight by layout.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    weights: Mapping[str, tuple[tuple[int, ...], str]]

    @property
    def others(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of all but the weight."""
        return {name: (shape, self.dtypes[name]) for name, shape in self.shapes.items() if name != WEIGHT}

    @property
    def nbytes(self) -> int:
        """Bytes of all but the weight."""
        return Memory.needed(self.others)


def runner(
    functions: Mapping[str, tuple[Launch, str]],
    arguments: Arguments,
    weights: Memory,
    activations: Memory,
    tensor: Callable[[Any], Any],
    *,
    cold: bool,
) -> Run:
    """What launches kernels at some sizes.

    Args:
        functions: The kernels by name, each with the layout that it reads.
        arguments: What they take.
        weights: What the weight and its copies are views of.
        activations: What all other arguments are views of, one behind the other.
        tensor: Makes a TVM tensor of an array.
        cold: Whether each launch reads another copy of the weight.
    """
    placed = {name: tensor(array) for name, array in activations.together(arguments.others).items()}
    turns = {}
    for layout, (shape, dtype) in arguments.weights.items():
        copies: list[Any] = weights.copies(shape, dtype) if WEIGHT in arguments.shapes else [None]
        given = [
            tuple(tensor(copy) if name == WEIGHT else placed[name] for name in arguments.shapes)
            for copy in (copies if cold else copies[:1])
        ]
        turns[layout] = _in_turn(given)

    def run(name: str, count: int) -> float:
        function, layout = functions[name]
        batch = list(itertools.islice(turns[layout], count))
        began = time.perf_counter()
        for operands in batch:
            function(*operands)
        return time.perf_counter() - began

    return run


def _in_turn(items: Sequence[Any]) -> Iterator[Any]:
    """The items for ever, each time in another order.

    In one order, kernels that take turns would each meet the same copies in every round, and some parts of memory are
    faster than others: equal kernels were seen to differ by a tenth.
    """
    shuffled, random = list(items), Random(0)
    while True:
        random.shuffle(shuffled)
        yield from shuffled
