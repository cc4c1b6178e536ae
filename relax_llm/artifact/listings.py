"""listings.zip: what the kernels of an artifact were made from and into, for people to read.

`index.json` names the functions and has the sources; `module.py` is the TVMScript of all of them, one after the other;
`library.ll` is LLVM IR.
"""

import json
import re
import shutil
import tempfile
import textwrap
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from relax_llm import programs
from relax_llm.artifact.machine_code import MachineCode
from relax_llm.errors import ArtifactError, InputError

LISTINGS = "listings.zip"
INDEX, MODULE, LLVM = "index.json", "module.py", "library.ll"

FORMAT = 1

_FUNCTION = re.compile(r"^    @T\.prim_func", re.MULTILINE)
_NAME = re.compile(r"^    def (\w+)\(", re.MULTILINE)
_SIZE = re.compile(r'^(\w+) = TypeVar\("\w+"\)$', re.MULTILINE)
_VECTOR = re.compile(r"T\.let\[T\.\w+x\d+\]")
_ENTRY = "__entry"
_CALLED = re.compile(r"\bModule\.(\w+)\(")
_HEAD = """from __future__ import annotations

from typing import TypeVar

from tvm.script import ir as I, tirx as T

"""


@dataclass(frozen=True)
class Source:
    """What a person wrote.

    Attributes:
        language: "python", "c" or "c++".
        file: The file's name.
        line: The number of the first line in it.
        text: The function, or the whole of a C file.
        flags: What the C compiler was given.
        files: Files that it includes, by name.
    """

    language: str
    file: str
    line: int
    text: str
    flags: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        mark = "#" if self.language == "python" else "//"
        return f"{mark} {self.file}:{self.line}\n{self.text}"


@dataclass(frozen=True)
class Index:
    """What is in the listings.

    Attributes:
        parameters: The parameters of each function, by name.
        sources: What a person wrote of some functions.
        kernels: For each dispatcher its kernels' functions, by the kernels' names.
        target: TVM's target, as JSON has it.
        options: TVM's options of code generation.
    """

    parameters: Mapping[str, tuple[str, ...]]
    sources: Mapping[str, Source]
    kernels: Mapping[str, Mapping[str, str]]
    target: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Listing:
    """One function of the library, in all its forms.

    A kernel in Python, which compiled code calls back, has a source and nothing else.

    Attributes:
        symbol: Its name in TVMScript, and in the library where it has one there.
        parameters: Names of its parameters.
        source: What a person wrote: a function in Python that makes the kernel, or C. None for what no person wrote:
            dispatchers, and what TVM fused.
    """

    symbol: str
    parameters: tuple[str, ...]
    source: Source | None
    _of: "Listings"

    @property
    def tir(self) -> str:
        """TVMScript, after all passes over TIR of this project and before TVM's own."""
        return textwrap.dedent(self._of.functions.get(self.symbol, ""))

    @property
    def calls(self) -> tuple[str, ...]:
        """The functions that it calls, and those that these call."""
        return tuple(self._of.reached(self.symbol))[1:]

    @property
    def module(self) -> str:
        """A Python file with it and all that it calls, as `tvm.script.from_source` reads it."""
        return self._of.module(self._of.reached(self.symbol))

    @property
    def llvm(self) -> str:
        """LLVM IR, optimized, without debug information; without the function that checks the arguments."""
        return self._of.code.llvm(self.symbol)

    @property
    def assembly(self) -> str:
        """Assembly: LLVM's from the same IR as the library's, or what the C compiler makes of C.

        Raises:
            ArtifactError: What makes it is not installed.
        """
        if self.source is not None and self.source.language != "python":
            return _assembly_of_c(self.source)
        return self._of.code.assembly(self.symbol)


@dataclass(frozen=True)
class Listings:
    """The listings of an artifact.

    Attributes:
        path: The file.
    """

    path: Path

    def __getitem__(self, symbol: str) -> Listing:
        """The listing of a function.

        Raises:
            InputError: There is none of this name.
            ArtifactError: The file cannot be read.
        """
        if symbol not in self.index.parameters:
            near = ", ".join(get_close_matches(symbol, self.index.parameters, 5, 0))
            raise InputError(
                f"The library has no function {symbol!r}; it has {len(self.index.parameters)}, such as {near}."
            )
        return Listing(symbol, self.index.parameters[symbol], self.index.sources.get(symbol), self)

    @cached_property
    def index(self) -> Index:
        """What there is."""
        try:
            data = json.loads(self._text(INDEX))
            if data.pop("format") != FORMAT:
                raise ValueError("it has another format")
            sources = {
                name: Source(**{**value, "flags": tuple(value["flags"])})
                for name, value in data.pop("sources").items()
            }
            parameters = {name: tuple(value) for name, value in data.pop("parameters").items()}
            return Index(parameters=parameters, sources=sources, **data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._unreadable(error) from error

    @cached_property
    def functions(self) -> Mapping[str, str]:
        """The TVMScript of each function, as it stands in the module."""
        text = self._text(MODULE)
        starts = [match.start() for match in _FUNCTION.finditer(text)]
        parts = [
            text[start:end].rstrip() + "\n" for start, end in zip(starts, [*starts[1:], None], strict=True)
        ]
        known = {match[1]: part for part in parts if (match := _NAME.search(part))}
        # TVM prints a call of another function without the module's name, and cannot read that.
        call = re.compile(rf"^( +)({'|'.join(map(re.escape, known))})\(", re.MULTILINE)
        called = {name: call.sub(r"\1Module.\2(", part) for name, part in known.items()}
        # Nor can it read the names of vectors whose length is no power of two.
        return {name: _VECTOR.sub("T.let", part) for name, part in called.items()}

    @cached_property
    def code(self) -> MachineCode:
        """The library's LLVM IR."""
        return MachineCode(self._text(LLVM))

    def reached(self, symbol: str) -> list[str]:
        """A function and all that it calls."""
        return list(dict.fromkeys([symbol, *self.reached_from(self.functions[symbol])]))

    def reached_from(self, text: str) -> list[str]:
        """All that TVMScript calls, with what that calls, and the entries that keep LLVM from seeing through it."""
        found: dict[str, None] = {}
        waiting = _CALLED.findall(text)
        while waiting:
            name = waiting.pop(0)
            if name not in found:
                found[name] = None
                waiting += _CALLED.findall(self.functions[name])
        return [*found, *(name + _ENTRY for name in found if name + _ENTRY in self.functions)]

    def module(self, symbols: Sequence[str], *more: str) -> str:
        """A Python file with some functions.

        Args:
            symbols: Their names.
            more: TVMScript of others, indented as methods.
        """
        body = "\n".join([*more, *(self.functions[symbol] for symbol in symbols)])
        names = dict.fromkeys(_SIZE.findall(self._text(MODULE)))
        declared = [f'{name} = TypeVar("{name}")\n' for name in names if re.search(rf"\b{name}\b", body)]
        return f"{_HEAD}{''.join(declared)}\n\n@I.ir_module\nclass Module:\n{body}"

    def _text(self, name: str) -> str:
        try:
            with zipfile.ZipFile(self.path) as file:
                return file.read(name).decode()
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ArtifactError:
        return ArtifactError(
            f"{self.path}: the listings cannot be read ({error}); compile the artifact again."
        )


def write(path: Path, index: Index, module: str, llvm: str) -> None:
    """Write the listings of an artifact.

    Args:
        path: The file.
        index: What there is.
        module: TVMScript.
        llvm: LLVM IR.
    """
    texts = {INDEX: json.dumps({"format": FORMAT, **asdict(index)}), MODULE: module, LLVM: llvm}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in texts.items():
            file.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)  # without the time of day


def _assembly_of_c(source: Source) -> str:
    tool = next(filter(None, map(shutil.which, COMPILERS[source.language])), None)
    if tool is None:
        raise ArtifactError(
            f"Assembly of {source.file} is made by a C compiler, but none of "
            f"{', '.join(COMPILERS[source.language])} was found."
        )
    with tempfile.TemporaryDirectory() as directory:
        for name, text in {**source.files, source.file: source.text}.items():
            (Path(directory) / name).write_text(text, encoding="utf-8")
        command = [tool, *source.flags, "-I.", "-S", source.file, "-o", "-"]
        done = programs.run(command, directory)
    if done.returncode:
        raise ArtifactError(f"{source.file} does not compile: {done.stderr.strip()}")
    return done.stdout


COMPILERS: Mapping[str, tuple[str, ...]] = {"c": ("cc", "gcc", "clang"), "c++": ("c++", "g++", "clang++")}
"""What compiles a language, in the order of preference."""
