"""Signals that ask the program to stop: whatever it does then, it must not leave anything half-written."""

import _thread
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
        """Take note of Ctrl-C, which raises KeyboardInterrupt as ever.

        A thread waits for it, and it is kept from this one and those that it starts: a prover that TVM asks while it
        compiles has a handler of its own meanwhile, behind Python's back, which forgets it or ends the process.
        """
        if not _in_main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        over, ended = threading.Event(), threading.Event()
        listener = threading.Thread(target=self._listen, args=(over, ended), daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, self._interrupt)
        try:
            listener.start()
            try:
                yield
            finally:
                assert listener.ident is not None, "it was started"
                over.set()
                signal.pthread_kill(listener.ident, signal.SIGINT)
                ended.set()
                listener.join()
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

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

    def _listen(self, over: threading.Event, ended: threading.Event) -> None:
        """Raise KeyboardInterrupt in the main thread whenever Ctrl-C comes, until the last one, which is for this."""
        while True:
            signal.sigwait({signal.SIGINT})
            if over.is_set():
                ended.wait()
                return
            _thread.interrupt_main()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        signal.default_int_handler(number, frame)

    def _check(self) -> None:
        if self._interrupted:
            raise KeyboardInterrupt


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
