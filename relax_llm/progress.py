"""Telling a person how far a long task has come: bars on a terminal, nothing elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """Where tasks report to."""

    def task(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Begin a task of `total` steps; call what it gives with the number of steps done."""
        ...


class Silent:
    """Reports nothing."""

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        """Ignore the task."""
        yield lambda _: None


class Bars:
    """Progress bars on standard error, gone when a task is done; nothing where that is not a terminal."""

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        """Show the task as a bar."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description:<20}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            bar = bars.add_task(name, total=total)
            yield lambda steps: bars.advance(bar, steps)
