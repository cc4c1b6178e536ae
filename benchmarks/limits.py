"""What this machine can do at most, measured by a small C program (limits.c)."""

import json
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from relax_llm.tracing import limits

SOURCE = Path(__file__).with_name("limits.c")
OPTIONS = ("-O3", "-march=native", "-ffp-contract=fast", "-pthread")


@dataclass(frozen=True)
class Limits(limits.Limits):
    """The most that some threads can do together.

    Attributes:
        bf16_tiles: Operations of the instructions for products of whole tiles (AMX), in bf16;
        int8_tiles: and in bytes.
        apart: Seconds that a line of memory takes from one core to another and back; 0 where one core was measured.
    """

    bf16_tiles: float = 0
    int8_tiles: float = 0
    apart: float = 0


class LimitsProgram:
    """The compiled program, which runs until the end; a context manager, because it lies in a temporary directory."""

    def __init__(self, threads: int) -> None:
        """Compile it.

        Args:
            threads: How many threads it will use.
        """
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            raise SystemExit("A C compiler (gcc) is needed to measure what the machine can do at most.")
        self._threads = threads
        self._running: subprocess.Popen[str] | None = None
        self._directory = TemporaryDirectory()
        self._program = Path(self._directory.name) / "limits"
        subprocess.run([compiler, *OPTIONS, str(SOURCE), "-o", str(self._program)], check=True)

    def __enter__(self) -> "LimitsProgram":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._directory.cleanup()

    def measure(self, memory: int = 1 << 30) -> Limits:
        """Have it measure: about a second, on all threads.

        Args:
            memory: Bytes that are read again and again; caches can hold less than a gigabyte of them. They are kept
                until another number is wanted.
        """
        command, pipe = [str(self._program), str(self._threads), str(memory)], subprocess.PIPE
        if self._running is None or self._running.args != command:
            self._end()
            self._running = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
            )
        process = self._running
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended: then there is no line, either
            print(file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            raise SystemExit(
                f"The program that measures the machine's limits failed: exit code {process.wait()}."
            )
        return Limits(**json.loads(line))

    def _end(self) -> None:
        if self._running is not None:
            self._running.communicate()
            self._running = None
