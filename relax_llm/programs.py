"""Running compilers and linkers, so that Ctrl-C ends them, too."""

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path


def run(command: Sequence[str], directory: str | Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, in a directory, and take what it prints.

    While this package compiles, Ctrl-C may be kept from its threads; a program would inherit that.
    """
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
