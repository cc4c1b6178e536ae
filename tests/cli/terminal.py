"""A terminal for the command line under test: a pseudo terminal of a chosen width with keys and a screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CTRL_C, CTRL_D = "\x03", "\x04"

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[=>]")

# Makes the pseudo terminal that its standard input is the controlling one, so that Ctrl-C sends a signal.
_TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A process with a terminal of its own.

    Args:
        command: The program and its arguments.
        env: Its environment.
        columns: The width of the terminal.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], columns: int = 80) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**env, "TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.close(slave)
        self.raw = ""

    @property
    def text(self) -> str:
        """All that was shown, without colors and with plain line breaks."""
        return _ESCAPES.sub("", self.raw).replace("\r\n", "\n")

    def press(self, keys: str) -> None:
        """Type on the keyboard; Ctrl-C as long after a prompt as a person needs, when the program waits for keys."""
        if keys == CTRL_C:
            time.sleep(0.3)
        os.write(self._master, keys.encode())

    def wait_for(self, pattern: str, timeout: float = 30, after: int = 0) -> re.Match[str]:
        """Wait until the text shown from `after` on matches a regular expression."""
        end = time.monotonic() + timeout
        while not (found := re.compile(pattern).search(self.text, after)):
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"{pattern!r} did not come; the terminal shows:\n{self.text}")
        return found

    def finish(self, timeout: float = 30) -> int:
        """Wait for the end of the process and return its exit code."""
        end = time.monotonic() + timeout
        while self._read(end - time.monotonic()):
            pass
        return self._process.wait(max(0.1, end - time.monotonic()))

    def close(self) -> None:
        """Kill the process, if it still runs."""
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, timeout: float) -> bool:
        """Read what has been shown; False at the end of the process, or of the time."""
        if timeout <= 0 or not select.select([self._master], [], [], timeout)[0]:
            return False
        try:
            read = os.read(self._master, 65536)
        except OSError:  # the process closed the terminal
            return False
        self.raw += read.decode(errors="replace")
        return bool(read)
