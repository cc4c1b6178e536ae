"""Delta debugging (Zeller and Hildebrandt 2002): the smallest set of changes that makes a test fail."""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def minimal(changes: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> tuple[T, ...]:
    """A set that fails, of which no single change can be left out: 1-minimal.

    One guilty change among n is found in about 2 log2(n) tests; changes that fail only together take more.

    Args:
        changes: All of them together fail.
        fails: Whether the test fails with some changes.
    """
    current, parts = tuple(changes), 2
    while len(current) > 1:
        size = -(-len(current) // parts)
        chunks = [current[at : at + size] for at in range(0, len(current), size)]
        # Where there are two, each is what the other leaves.
        rests = [] if len(chunks) == 2 else [_without(current, chunk) for chunk in chunks]
        smaller = next((some for some in [*chunks, *rests] if fails(some)), None)
        if smaller is not None:
            parts = 2 if smaller in chunks else max(parts - 1, 2)
            current = smaller
        elif len(chunks) == len(current):
            break
        else:
            parts = min(2 * parts, len(current))
    return current


def _without(all_: tuple[T, ...], some: tuple[T, ...]) -> tuple[T, ...]:
    left = set(some)
    return tuple(change for change in all_ if change not in left)
