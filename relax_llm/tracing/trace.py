"""A run, launch by launch, with times."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from relax_llm.table import html
from relax_llm.tracing import summary
from relax_llm.tracing.limits import Limits

_NANO = 1e-9


@dataclass(frozen=True)
class TracedLaunch:
    """One launch of a kernel, with its time.

    Attributes:
        function: The function that made it.
        index: Its place among the function's launches, from 0.
        site: The place in the model.
        operator: What is computed.
        kernel: The kernel's name in the plan; where the plan does not know it, its symbol.
        symbol: What the function calls: the kernel's or its dispatcher's name in the library.
        sizes: The sizes by which it was chosen: M, or batch, seq and kv_len.
        begun: Nanoseconds from the beginning of the trace.
        ended: Likewise.
        flops: Operations of arithmetic.
        bytes: Memory that it must at least move.
        products: What its arithmetic may be in, by the problem: "f32", "bf16" or "int8".
    """

    function: str
    index: int
    site: str
    operator: str
    kernel: str
    symbol: str
    sizes: Mapping[str, int]
    begun: int
    ended: int
    flops: float
    bytes: float
    products: str = "f32"

    @property
    def start(self) -> float:
        """Seconds from the beginning of the trace."""
        return self.begun * _NANO

    @property
    def duration(self) -> float:
        """Seconds."""
        return (self.ended - self.begun) * _NANO

    @property
    def gflops(self) -> float:
        """Arithmetic, in GFLOP/s."""
        return self.flops / max(1, self.ended - self.begun)

    @property
    def gbytes(self) -> float:
        """Memory, in GB/s."""
        return self.bytes / max(1, self.ended - self.begun)

    def share(self, limits: Limits) -> float:
        """How much of what the machine can do this launch did; above 1 where the data came from a cache."""
        return limits.seconds(self.flops, self.bytes, self.products) / (
            max(1, self.ended - self.begun) * _NANO
        )

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} = {size}" for name, size in self.sizes.items())
        return f"{self.function}[{self.index}] {self.site}: {self.kernel} at {sizes}, {self.duration * 1e6:.1f} us"


class TracedCall:
    """One run of a compiled function.

    Attributes:
        function: Its name.
        sizes: Its batch, seq and kv_len.
        begun: Nanoseconds from the beginning of the trace.
        ended: Likewise.
        thread: The number and the name of the thread that called it.
    """

    def __init__(
        self,
        function: str,
        sizes: Mapping[str, int],
        begun: int,
        ended: int,
        thread: tuple[int, str],
        launches: Callable[[], tuple[TracedLaunch, ...]],
    ) -> None:
        """Keep what is known at once; `launches` is asked when somebody looks at them."""
        self.function = function
        self.sizes = sizes
        self.begun, self.ended = begun, ended
        self.thread = thread
        self._launches = launches

    @cached_property
    def launches(self) -> tuple[TracedLaunch, ...]:
        """Its launches, in order; where the call failed, those that ended."""
        return self._launches()

    @property
    def start(self) -> float:
        """Seconds from the beginning of the trace."""
        return self.begun * _NANO

    @property
    def duration(self) -> float:
        """Seconds."""
        return (self.ended - self.begun) * _NANO

    @property
    def outside(self) -> float:
        """Seconds in which no kernel ran: the virtual machine, allocation, the way from Python and back."""
        return self.duration - sum(launch.duration for launch in self.launches)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} = {size}" for name, size in self.sizes.items())
        return f"<{self.function} at {sizes}: {len(self.launches)} launches, {self.duration * 1e3:.2f} ms>"


class Trace:
    """The calls of a run, with every launch in them; `print` shows totals, and so does a notebook.

    Attributes:
        process: The number of the process that ran.
    """

    def __init__(self, limits: Limits | Callable[[], Limits], process: int | None = None) -> None:
        """Nothing has run.

        Args:
            limits: What the machine can do, or what measures it when it is first asked for.
            process: The number of the process; this one's, if not given.
        """
        self.process = os.getpid() if process is None else process
        self._asked = limits
        self._calls: list[TracedCall] = []

    def add(self, call: TracedCall) -> None:
        """A call has ended."""
        self._calls.append(call)

    @property
    def calls(self) -> tuple[TracedCall, ...]:
        """Every run of a compiled function, in the order in which they ended."""
        return tuple(self._calls)

    @property
    def launches(self) -> "Launches":
        """Every launch of all calls, in order."""
        return Launches(launch for call in self._calls for launch in call.launches)

    @cached_property
    def limits(self) -> Limits:
        """What the machine can do at most. Where it was neither given nor measured before, it is measured now."""
        return self._asked if isinstance(self._asked, Limits) else self._asked()

    @property
    def duration(self) -> float:
        """Seconds of all calls."""
        return sum(call.duration for call in self._calls)

    @property
    def outside(self) -> float:
        """Seconds of these in which no kernel ran."""
        return sum(call.outside for call in self._calls)

    @property
    def between(self) -> float:
        """Seconds between calls: Python, the choice of the next token, whatever the caller did."""
        covered, end = 0, None
        for call in sorted(self._calls, key=lambda call: call.begun):
            covered += max(0, call.begun - end) if end is not None else 0
            end = call.ended if end is None else max(end, call.ended)
        return covered * _NANO

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON that Perfetto and chrome://tracing open.

        Raises:
            InputError: The file cannot be written.
        """
        from relax_llm.tracing.events import write

        write(self, path)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> "Trace":
        """Read what `save` wrote.

        Raises:
            InputError: It cannot be read, or is no such file.
        """
        from relax_llm.tracing.events import read

        return read(path)

    def by(self, what: summary.Grouping) -> tuple[summary.Total, ...]:
        """Totals, the longest first.

        Args:
            what: "operator", "kernel", "site", or "place", which takes the sites of all layers together.
        """
        return summary.totals(self, what)

    def __str__(self) -> str:
        return "\n\n".join([summary.headline(self), *map(str, summary.tables(self))])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html(summary.headline(self), summary.tables(self))


class Launches(tuple[TracedLaunch, ...]):
    """Traced launches, which show themselves as a table; of many, only the first and the last."""

    __slots__ = ()

    def __str__(self) -> str:
        return str(summary.listed(self))

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return summary.listed(self)._repr_html_()
