"""Signals that ask the program to stop: whatever it does then, it must not leave anything half-written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from relax_llm.progress import Advance, Bars


class Termination:
    """While this is entered, SIGTERM unwinds the stack as Ctrl-C does.

    Attributes:
        requested: Whether SIGTERM has come.
    """

    def __init__(self) -> None:
        """Change nothing yet."""
        self.requested = False
        self._handles = False

    def __enter__(self) -> "Termination":
        """Take the signal over, unless somebody else has, or ignores it."""
        self._handles = _in_main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if self._handles:
            signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        if self._handles:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _request(self, *_: object) -> NoReturn:
        self.requested = True
        raise KeyboardInterrupt


class InterruptibleBars(Bars):
    """Progress bars that end a task after Ctrl-C, even where compiled code has dropped the exception."""

    def __init__(self) -> None:
        """Nothing has been interrupted."""
        self._interrupted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of Ctrl-C, which raises KeyboardInterrupt as ever."""
        if not _in_main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        """Show the task as a bar.

        Raises:
            KeyboardInterrupt: Ctrl-C came since the last step.
        """
        with super().task(name, total) as advance:

            def checked(steps: int) -> None:
                self._check()
                advance(steps)

            yield checked
        self._check()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        signal.default_int_handler(number, frame)

    def _check(self) -> None:
        if self._interrupted:
            raise KeyboardInterrupt


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
