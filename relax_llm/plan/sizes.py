"""Ranges of symbolic sizes: M from 1 to 8; one query and more than 512 cached tokens."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from relax_llm.errors import PlanError

Bounds = tuple[int, int | None]
"""First and last, both included; a last of None is without end."""

ALL: Bounds = (1, None)


@dataclass(frozen=True)
class Box:
    """Bounds for some sizes; those it does not name may be anything.

    Attributes:
        bounds: Names of sizes and their bounds, in the order of the operator's axes.
    """

    bounds: tuple[tuple[str, Bounds], ...] = ()

    def __post_init__(self) -> None:
        for axis, (first, last) in self.bounds:
            if first < 1 or (last is not None and last < first):
                raise PlanError(
                    f"{axis} from {first} to {last} is not a range: the first number must be at least 1 and not "
                    "exceed the last."
                )

    @staticmethod
    def of(**bounds: Bounds | int) -> "Box":
        """A box from keywords, `Box.of(M=(1, 8))`; a number alone stands for itself only."""
        return Box(tuple((axis, (b, b) if isinstance(b, int) else b) for axis, b in bounds.items()))

    def __getitem__(self, axis: str) -> Bounds:
        return dict(self.bounds).get(axis, ALL)

    def __contains__(self, sizes: object) -> bool:
        """Whether sizes, a mapping of names to numbers, are inside."""
        return isinstance(sizes, Mapping) and all(
            first <= sizes[axis] and (last is None or sizes[axis] <= last)
            for axis, (first, last) in self.bounds
        )

    def __str__(self) -> str:
        shown = [_shown(axis, bounds) for axis, bounds in self.bounds if bounds != ALL]
        return ", ".join(shown) or "every size"

    @property
    def everything(self) -> bool:
        """Whether every size is inside."""
        return all(bounds == ALL for _, bounds in self.bounds)

    def within(self, axes: Iterable[str]) -> "Box":
        """The same box with exactly these axes, in this order."""
        return Box(tuple((axis, self[axis]) for axis in axes))

    def to_json(self) -> dict[str, list[int | None]]:
        """Names and [first, last], where null is without end."""
        return {axis: list(bounds) for axis, bounds in self.bounds}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Box":
        """What `to_json` gave, or what a person wrote.

        Raises:
            TypeError: Something is not a number.
        """
        for bounds in data.values():
            if len(bounds) != 2 or not all(
                isinstance(end, int) or (end is None and at) for at, end in enumerate(bounds)
            ):
                raise TypeError(f"{bounds!r} is not [first, last]")
        return Box(tuple((axis, (bounds[0], bounds[1])) for axis, bounds in data.items()))


def _shown(axis: str, bounds: Bounds) -> str:
    first, last = bounds
    if last is None:
        return f"{axis} >= {first}"
    return f"{axis} = {first}" if first == last else f"{axis} = {first}..{last}"


def cells(axes: Iterable[str], boxes: Iterable[Box]) -> list[Box]:
    """The finest grid whose every cell is wholly inside or wholly outside of each box, in ascending order."""
    boxes = list(boxes)
    along = []
    for axis in axes:
        starts = {1}
        for box in boxes:
            first, last = box[axis]
            starts |= {first} | ({last + 1} if last is not None else set())
        ordered: list[int | None] = [*sorted(starts), None]
        along.append(
            [
                (axis, (first, None if after is None else after - 1))
                for first, after in pairwise(ordered)
                if first
            ]
        )
    return [Box(cell) for cell in product(*along)]


def corner(cell: Box) -> dict[str, int]:
    """The smallest sizes in a cell; what holds for them holds for all of it."""
    return {axis: first for axis, (first, _) in cell.bounds}


def check_total(problem: str, axes: Iterable[str], ranges: Iterable[tuple[Box, str]]) -> None:
    """Refuse ranges that leave a size out, or serve one twice.

    Args:
        problem: Whose ranges they are, for the message.
        axes: Names of the sizes.
        ranges: Boxes and the kernels that serve them.

    Raises:
        PlanError: They are not total, they overlap, or a box names a size that is no axis.
    """
    axes, ranges = tuple(axes), tuple(ranges)
    for box, kernel in ranges:
        unknown = [axis for axis, _ in box.bounds if axis not in axes]
        if unknown:
            raise PlanError(
                f"The plan for {problem} gives {kernel} a range of {unknown[0]!r}; its sizes are {', '.join(axes)}."
            )
    for cell in cells(axes, (box for box, _ in ranges)):
        serving = [kernel for box, kernel in ranges if corner(cell) in box]
        if not serving:
            raise PlanError(f"The plan for {problem} is not total: nothing serves {cell}.")
        if len(serving) > 1:
            raise PlanError(f"The plan for {problem} is not definite: {' and '.join(serving)} serve {cell}.")
