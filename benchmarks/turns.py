"""Taking turns: every engine in a process of its own, one at a time.

In one process engines spoil each other's figures: the waiting threads of one spin on the cores of the other, and they
share an allocator. PyTorch was seen at a fraction of its speed that way.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.models import Forms
from benchmarks.peers.engine import Engine

DECODED = 16
"""Tokens decoded for one measurement."""

LOADING = 900.0
"""Seconds that an engine may take to prepare a model, and to load it."""

PAUSE = 0.3
"""Seconds between two turns: threads that wait for work spin for a while before they sleep."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        function: "prefill" or "decode".
        length: Tokens of the prompt, or of the context that tokens are decoded after.
    """

    function: str
    length: int

    def __str__(self) -> str:
        return f"{'pp' if self.function == 'prefill' else 'tg'}{self.length}"

    @staticmethod
    def parse(text: str) -> "Case":
        """The case of "pp64" or "tg1024"."""
        function, length = {"pp": "prefill", "tg": "decode"}.get(text[:2]), text[2:]
        if function is None or not length.isdecimal() or not int(length):
            raise argparse.ArgumentTypeError(f"{text!r} is not ppTOKENS or tgTOKENS, such as pp64 or tg1024")
        return Case(function, int(length))

    @property
    def tokens(self) -> int:
        """Tokens of one call of the model."""
        return self.length if self.function == "prefill" else 1

    def rate(self, seconds: Sequence[float]) -> float:
        """Tokens per second.

        Args:
            seconds: From the prompt to the first token and from each to the next. The first one that is decoded does
                not count: an engine may still have to find memory.
        """
        return self.length / seconds[0] if self.function == "prefill" else DECODED / sum(seconds[2:])

    def sizes(self) -> dict[str, int]:
        """The symbolic sizes of one call; a token of the middle stands for those that are decoded."""
        if self.function == "prefill":
            return {"batch": 1, "seq": self.length, "kv_len": self.length}
        return {"batch": 1, "seq": 1, "kv_len": self.length + 1 + DECODED // 2}


class Unavailable(Exception):  # noqa: N818
    """An engine cannot be measured; the message says why."""


@dataclass(frozen=True)
class Seat:
    """An engine with one way of holding the weights.

    Attributes:
        engine: Name of its module.
        name: What it is called in tables.
        variant: One of its variants.
    """

    engine: str
    name: str
    variant: str

    @staticmethod
    def of(engine: Engine, variant: str) -> "Seat":
        """The seat of a module."""
        try:
            release = metadata.version(engine.PACKAGE)
        except metadata.PackageNotFoundError:
            raise Unavailable(f"{engine.PACKAGE} is not installed") from None
        return Seat(engine.load.__module__, f"{engine.NAME} {release.partition('+')[0]} {variant}", variant)


class Worker:
    """An engine in a process of its own; a context manager, which ends the process.

    Attributes:
        seat: Who it is.
        load_seconds: From the import of the engine to where it takes a prompt.
    """

    def __init__(self, seat: Seat, forms: Forms, threads: int, patience: float) -> None:
        """Prepare the model in a process that ends then, and load it in another.

        Raises:
            Unavailable: That was not possible.
        """
        self.seat = seat
        self._log = forms.folder / "logs" / f"{seat.name.replace(' ', '-')}.txt"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.unlink(missing_ok=True)
        self._patience = patience
        self._others = self._had = 0.0  # seconds of processors during its turns: what others had, and all
        self._start(_prepare, seat, forms)
        path = self._take(LOADING)
        self.close()
        self._start(_serve, seat, path, threads)
        self.load_seconds: float = self._take(LOADING)

    def _start(self, work: Any, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_logged, args=(self._log, theirs, work, *arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def _take(self, patience: float) -> Any:
        try:
            if not self._connection.poll(patience):
                raise Unavailable(f"it took more than {patience:.0f} s")
            result = self._connection.recv()
        except EOFError:
            self._process.join()
            result = Unavailable(f"its process ended with exit code {self._process.exitcode}")
        except Unavailable as error:
            result = error
        if isinstance(result, Unavailable):
            self.close()
            raise result
        return result

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._connection.close()
        self._process.join(PAUSE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def answer(self, token_ids: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """Have a prompt answered, while all others wait.

        Returns:
            The tokens, and the seconds from the prompt to the first and from each to the next.

        Raises:
            Unavailable: The engine failed or took too long. It has ended then.
        """
        time.sleep(PAUSE)
        began, all_before, own_before = time.perf_counter(), _processors(), self._seconds()
        self._connection.send((list(token_ids), count))
        result: tuple[list[int], list[float]] = self._take(self._patience)
        self._others += max(_processors() - all_before - (self._seconds() - own_before), 0)
        self._had += (time.perf_counter() - began) * (os.cpu_count() or 1)
        return result

    @property
    def others(self) -> float:
        """Which share of the processors other processes had, or the host of a virtual machine, during its turns."""
        return min(self._others / self._had, 1) if self._had else 0

    def _seconds(self) -> float:
        """What the process has had of processors so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_bytes(self) -> int:
        """The most memory that the process has had in use, with the pages of files that it has mapped and read."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024


def _processors() -> float:
    """Seconds of all processors that anybody has had since the machine started."""
    user, nice, system, _, _, interrupt, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")


def _logged(log: Path, connection: Connection, work: Any, *arguments: Any) -> None:
    """Work in this process, with what the engine prints written to a file, and what goes wrong told."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        work(connection, *arguments)
    except EOFError:
        return
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        first = next(iter(str(error).strip().splitlines()), "")
        connection.send(Unavailable(f"{type(error).__name__}: {first}"[:200]))


def _prepare(connection: Connection, seat: Seat, forms: Forms) -> None:
    connection.send(import_module(seat.engine).prepare(forms, seat.variant))


def _serve(connection: Connection, seat: Seat, path: Path, threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    module = import_module(seat.engine)
    began = time.perf_counter()
    answer = module.load(path, seat.variant, threads)
    connection.send(time.perf_counter() - began)
    while True:
        token_ids, count = connection.recv()
        began = time.perf_counter()
        stamps = answer(token_ids, count)
        if len(stamps) != count:
            raise Unavailable(f"it gave {len(stamps)} tokens where {count} were asked for")
        times = [began, *(at for _, at in stamps)]
        seconds = [later - earlier for earlier, later in itertools.pairwise(times)]
        connection.send(([token for token, _ in stamps], seconds))
