"""What people and programs read: sentences on standard error, text, tables and JSON on standard output."""

import errno
import json
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from relax_llm.errors import RelaxLLMError

if TYPE_CHECKING:
    from rich.console import Console

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def prepare() -> None:
    """Make the standard streams safe to write to, whatever the process was started with."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def abandon_output() -> None:
    """Send what is still buffered nowhere, so that the interpreter does not fail over it when it ends."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def printable(text: str) -> str:
    r"""The text with control characters spelled out: a model or a file must not command the terminal.

    >>> print(printable("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return _CONTROLS.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def write(text: str) -> None:
    """Write text of a model to standard output at once."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Tell the user something worth knowing."""
    _sentence("note", "yellow", text)


def error(text: str) -> None:
    """Tell the user what went wrong."""
    _sentence("error", "red", text)


def hint(text: str) -> None:
    """Write a line in the background, on standard error."""
    if sys.stderr.isatty():
        from rich.text import Text

        console(sys.stderr).print(Text(printable(text), "dim"))
    else:
        sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _sentence(kind: str, color: str, text: str) -> None:
    text = printable(text.strip())
    if sys.stderr.isatty():
        from rich.text import Text

        console(sys.stderr).print(Text.assemble((f"{kind}: ", f"bold {color}"), text))
    else:
        sys.stderr.write(f"{kind}: {text}\n")
    sys.stderr.flush()


def json_document(data: Mapping[str, Any]) -> None:
    """Write one JSON document to standard output."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(data, indent=2, ensure_ascii=not unicode, allow_nan=False)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def console(stream: TextIO) -> "Console":
    """A console for tables and styled text; where it is no terminal, lines are as long as they need to be."""
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> NoReturn:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    width = None if stream.isatty() else 100_000
    return PipeConsole(file=stream, highlight=False, markup=False, emoji=False, width=width)


def sentence_of(failure: BaseException) -> str | None:
    """What to tell the user of something that is not a fault of this program; None where it is one."""
    if isinstance(failure, RelaxLLMError):
        return str(failure)
    if isinstance(failure, OSError) and failure.strerror:
        return f"{failure.filename or 'Reading or writing failed'}: {failure.strerror}."
    if isinstance(failure, MemoryError):
        return "There is not enough memory for this."
    return None
