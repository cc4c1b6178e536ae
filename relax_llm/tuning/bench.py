"""Launching kernels on a clock: arguments for some M, weights in turn, a loop that costs some tens of nanoseconds."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

from relax_llm.tuning.memory import Memory
from relax_llm.tuning.rounds import Run

Launch = Callable[..., None]


def runner(
    functions: Mapping[str, Launch],
    shapes: Mapping[str, Sequence[int]],
    weights: Memory,
    activations: Memory,
    tensor: Callable[[Any], Any],
    *,
    dtypes: Mapping[str, str],
    cold: bool,
) -> Run:
    """What launches kernels for one set of sizes.

    Args:
        functions: The kernels by name; all take the same arguments.
        shapes: The arguments in order, by name; "weight" is the one that comes from memory.
        weights: What the weight and its copies are views of.
        activations: What all other arguments are views of, one behind the other.
        tensor: Makes a TVM tensor of an array.
        dtypes: Of arguments that are not float32.
        cold: Whether each launch reads another copy of the weight.
    """
    others = {name: shape for name, shape in shapes.items() if name != "weight"}
    arrays = activations.together(others, dtypes)
    copies: Sequence[Any] = [None]
    if "weight" in shapes:
        copies = weights.copies(shapes["weight"], dtypes.get("weight", "float32"))
    placed = {name: tensor(array) for name, array in arrays.items()}
    arguments = [
        tuple(tensor(copy) if name == "weight" else placed[name] for name in shapes)
        for copy in (copies if cold else copies[:1])
    ]
    turns = _in_turn(arguments)

    def run(name: str, count: int) -> float:
        function = functions[name]
        batch = list(itertools.islice(turns, count))
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


def needed(shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, str]) -> int:
    """Bytes of all arguments but the weight."""
    return Memory.needed({name: shape for name, shape in shapes.items() if name != "weight"}, dtypes)
