"""Tensors that are watched: which launch changes a weight, a cache, what a site computed, or memory of yours."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm.errors import InputError
from relax_llm.plan.plan import parts_of
from relax_llm.runtime.control import Line

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Watched:
    """What is watched.

    Attributes:
        name: The pattern that names it, "" for an array.
        array: The memory, where it has no name.
        part: Which part of it, as NumPy indexes it.
        tensors: The weights and caches that it names.
        sites: The sites whose outputs it names.
    """

    name: str
    array: Array | None
    part: Any
    tensors: frozenset[str]
    sites: frozenset[str]

    def __str__(self) -> str:
        return self.name or "an array"


def watchable(tensor: str | Array, part: Any, names: frozenset[str], lines: Mapping[str, Line]) -> Watched:
    """What a name or an array says to watch.

    Raises:
        InputError: It names nothing, or is no array.
    """
    if not isinstance(tensor, str):
        if not isinstance(tensor, np.ndarray):
            raise InputError(
                f"A name or a NumPy array can be watched, not an object of type {type(tensor).__name__}."
            )
        return Watched("", tensor, part, frozenset(), frozenset())
    tensors = frozenset(name for name in names if any(fnmatchcase(n, tensor) for n in _names_of(name)))
    sites = frozenset(
        at.site
        for line in lines.values()
        for _, at in line.launches
        if any(fnmatchcase(part, tensor) for part in parts_of(at.site))
    )
    if not tensors and not sites:
        head = tensor.rpartition(".")[0]
        near = sorted(name for name in names if any(n.rpartition(".")[0] == head for n in _names_of(name)))
        listed = ", ".join((near or sorted(names))[:5])
        raise InputError(
            f"Nothing is named {tensor!r}: no weight, no cache and no site; weights and caches are named like {listed}."
        )
    return Watched(tensor, None, part, tensors, frozenset() if tensors else sites)


def _names_of(name: str) -> Iterator[str]:
    """The names a weight or cache goes by: without the model's own prefix too, and by each part of what was fused."""
    yield name
    head, _, last = name.rpartition(".")
    for whole in parts_of(head):
        yield f"{whole}.{last}"
        yield f"{whole.removeprefix('model.').removeprefix('transformer.')}.{last}"


class Watch:
    """Watched memory as it was when a run went on, and what has changed since.

    Attributes:
        watched: What is watched.
    """

    def __init__(self, watched: Watched, find: Callable[[Watched], Iterable[tuple[str, Array]]]) -> None:
        """Remember what is there now.

        Args:
            watched: What to watch.
            find: Gives the names and views of what is there at present.
        """
        self.watched = watched
        self._find = find
        self._kept = {name: self._bytes(array).copy() for name, array in self._now()}

    def changes(self) -> str | None:
        """What has changed since this was asked last, as a sentence without its end; None: nothing."""
        found = None
        kept: dict[str, Array] = {}
        for name, array in self._now():
            now, before = self._bytes(array), self._kept.get(name)
            if before is not None and np.array_equal(now, before):
                kept[name] = before
                continue
            kept[name] = now.copy()
            if found is None:
                found = f"{name} was computed" if before is None else _change(name, array, now, before)
        self._kept = kept
        return found

    def _now(self) -> Iterator[tuple[str, Array]]:
        for name, array in self._find(self.watched):
            try:
                yield name, np.asarray(array[self.watched.part])
            except (IndexError, TypeError) as error:
                raise InputError(
                    f"{name} of shape {array.shape} has no part {self.watched.part!r} to watch: {error}."
                ) from None

    @staticmethod
    def _bytes(array: Array) -> npt.NDArray[np.uint8]:
        """The memory of an array, number by number: a NaN that stays is no change."""
        raw = np.ascontiguousarray(array)
        return raw.reshape(-1).view(np.uint8).reshape(raw.size, raw.itemsize)


def _change(name: str, array: Array, now: Array, before: Array) -> str:
    different = (now != before).any(axis=1)
    first = int(different.argmax())
    place = [int(i) for i in np.unravel_index(first, array.shape)]
    old = before[first].copy().view(array.dtype)[0]
    new = now[first].copy().view(array.dtype)[0]
    count = f"{int(different.sum())} of {array.size}"
    return f"{name} changed in {count} numbers, first at {place}: {old:.6g} became {new:.6g}"
