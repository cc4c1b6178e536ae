"""Answering the library's open dispatchers: compiled functions that ask which of their kernels to run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from threading import local

from relax_llm import ffi
from relax_llm.errors import ArtifactError
from relax_llm.runtime.choices import Rule

CHOOSE = "relax_llm.choose"
"""What open dispatchers ask: (dispatcher, *sizes) -> index of a kernel."""

OPEN = "__open"
"""An open dispatcher's symbol is the dispatcher's and this."""


class Run:
    """One call of a function while its dispatchers ask."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = rules
        self.served: list[tuple[int, tuple[int, ...]]] = []
        self.error: BaseException | None = None

    def choose(self, symbol: str, sizes: tuple[int, ...]) -> int:
        """The kernel of the next launch."""
        try:
            rule = self.rules[len(self.served)]
            if rule.symbol != symbol:
                raise ArtifactError(
                    f"{symbol} is launched where the manifest has {rule.symbol}; compile the artifact again."
                )
            index = rule(sizes)
        except BaseException as error:  # C++ would change its type on the way
            self.error = error
            raise
        self.served.append((index, sizes))
        return index


_thread = local()


def _choose(symbol: str, *sizes: int) -> int:
    run: Run | _Told = _thread.run
    return run.choose(symbol, sizes)


class _Told:
    """One launch whose kernel has been chosen."""

    def __init__(self, index: int) -> None:
        self._index = index

    def choose(self, symbol: str, sizes: tuple[int, ...]) -> int:
        """The kernel."""
        return self._index


@contextmanager
def asking(rules: Sequence[Rule]) -> Iterator[Run]:
    """Let open dispatchers that this thread calls, one after the other, be told by these rules."""
    run = _thread.run = Run(rules)
    try:
        yield run
    except BaseException:
        if run.error is not None:
            raise run.error from None
        raise
    finally:
        del _thread.run


@contextmanager
def choosing(index: int) -> Iterator[None]:
    """Let open dispatchers that this thread calls run the kernel of an index."""
    answer()
    _thread.run = _Told(index)
    try:
        yield
    finally:
        del _thread.run


@lru_cache(maxsize=1)
def answer() -> None:
    """Answer what open dispatchers ask, from now on."""
    ffi.runtime().register_global_func(CHOOSE, _choose)
    # Ctrl-C in the answer comes back through C++; unregistered it would come as a RuntimeError.
    ffi.runtime().register_error("KeyboardInterrupt", KeyboardInterrupt)
