"""Taking turns: every peer in a process of its own, one at a time.

In one process peers spoil each other's figures: the waiting threads of one spin on the cores of the other, and they
share an allocator. PyTorch was seen at a fraction of its speed that way.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.peers import Peer

DECODED = 8
"""Tokens decoded for one measurement."""

Kind = Callable[[Path, int], Peer]


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        function: "prefill" or "decode".
        length: Tokens of the prompt, or of the context that a token is decoded after.
    """

    function: str
    length: int

    def __str__(self) -> str:
        return f"prefill {self.length}" if self.function == "prefill" else f"decode after {self.length}"

    @staticmethod
    def parse(text: str) -> "Case":
        """The case of "prefill:64" or "decode:1024"."""
        function, _, length = text.partition(":")
        if function not in ("prefill", "decode") or not length.isdecimal() or not int(length):
            raise argparse.ArgumentTypeError(f"{text!r} is not prefill:TOKENS or decode:TOKENS")
        return Case(function, int(length))

    @property
    def calls(self) -> int:
        """Calls of the model in one measurement."""
        return 1 if self.function == "prefill" else DECODED

    @property
    def tokens(self) -> int:
        """Tokens evaluated in one measurement."""
        return self.length if self.function == "prefill" else DECODED

    def sizes(self) -> dict[str, int]:
        """The symbolic sizes of one call."""
        if self.function == "prefill":
            return {"batch": 1, "seq": self.length, "kv_len": self.length}
        return {"batch": 1, "seq": 1, "kv_len": self.length + 1}

    def seconds(self, peer: Peer, token_ids: Sequence[int]) -> float:
        """Measure a peer once. A first token is decoded before the clock starts: it may still have to find memory."""
        context = token_ids[: self.length]
        if self.function == "decode":
            work = peer.decoder(context)
            work()
        else:
            work = lambda: peer.prefill(context)  # noqa: E731
        began = time.perf_counter()
        for _ in range(self.calls):
            work()
        return time.perf_counter() - began


class Worker:
    """A peer in a process of its own; a context manager, which ends the process.

    Attributes:
        name: The peer's name.
    """

    def __init__(self, kind: Kind, checkpoint: Path, threads: int) -> None:
        """Start the process and load the model.

        Raises:
            ImportError: What the peer needs is not installed.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, checkpoint, threads), daemon=True)
        self._process.start()
        theirs.close()
        answer = self._connection.recv()
        if isinstance(answer, ImportError):
            self._process.join()
            raise answer
        self.name: str = answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()

    def seconds(self, case: Case, token_ids: Sequence[int]) -> float:
        """Measure a case once, while all others wait."""
        self._connection.send((case, token_ids))
        seconds: float = self._connection.recv()
        return seconds


def _serve(connection: Connection, kind: Kind, checkpoint: Path, threads: int) -> None:
    try:
        peer = kind(checkpoint, threads)
    except ImportError as error:
        connection.send(error)
        return
    connection.send(peer.name)
    while True:
        try:
            case, token_ids = connection.recv()
        except EOFError:
            return
        connection.send(case.seconds(peer, token_ids))
