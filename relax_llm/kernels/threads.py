"""Shared libraries of compiled functions, with threads of their own that share the loops of kernels.

A loop over tasks becomes one over `TASKS` parts of it, so that threads begin with equal shares and can take over what
is left of each other's: see threads.cpp, which is linked into every library for this machine's kind of processor.
"""

import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import tvm
from tvm.support import cc

from relax_llm import programs
from relax_llm.errors import CompileError

TASKS = 32
"""What loops are cut into: many more than threads, but so few that taking them is no work; a power of two."""

ANNOUNCE = "relax_llm_reads"
"""What a kernel calls as it begins that reads much: (address, bytes of a part, parts, bytes from one to the next)."""

_OPTIONS = ["-Wl,-Bsymbolic-functions"] if sys.platform == "linux" else []
"""Parts of a library call each other at once, and not by way of a table that another library could have changed."""

SOURCE = Path(__file__).with_suffix(".cpp")


@lru_cache(maxsize=1)
def threads_object() -> bytes:
    """The object file of the threads.

    Raises:
        CompileError: There is no C++ compiler, or it failed.
    """
    compiler = cc.get_cc()
    if compiler is None:
        raise CompileError(
            "A C++ compiler is needed to link the kernels and none was found; install g++ or clang, or set CXX."
        )
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "threads.o"
        flags = ["-O2", "-std=c++17", "-fPIC", f"-DTASKS={TASKS}", f"-DANNOUNCE={ANNOUNCE}", "-x", "c++"]
        command = [compiler, *flags, "-c", SOURCE.name, "-o", str(result)]
        done = programs.run(command, SOURCE.parent)
        if done.returncode:
            raise CompileError(f"{compiler} does not compile {SOURCE.name}: {done.stderr.strip()}")
        return result.read_bytes()


def link(executable: Any, library: Path, objects: Sequence[bytes] = ()) -> None:
    """Link what TVM compiled for this kind of processor into a shared library.

    Args:
        executable: From `tvm.compile` or `relax.build`.
        library: The file to write.
        objects: Object files that it calls.

    Raises:
        CompileError: There is no C++ compiler.
        RuntimeError: Linking failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory) / f"{index}.o" for index in range(len(objects) + 1)]
        for file, data in zip(files, [*objects, threads_object()], strict=True):
            file.write_bytes(data)
        executable.export_library(str(library), addons=[str(file) for file in files], options=_OPTIONS)


def load(executable: Any) -> Any:
    """What TVM compiled, as a module that can be called; its library has no place of its own."""
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "library.so"
        link(executable, library)
        return tvm.runtime.load_module(str(library))
