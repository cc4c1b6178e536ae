"""The LLVM IR and the assembly of a library as text, cut by kernel.

A kernel that only a dispatcher calls is mostly inlined into it; what is left of it as functions of their own are the
bodies of its parallel loops. LLVM's debug locations say which kernel an instruction comes from.
"""

import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from relax_llm import ffi
from relax_llm.errors import ArtifactError

_BODY = "_compute_"
"""TVM checks a kernel's arguments in a function of its name with a prefix, and computes in one with this suffix."""

_CHECK, _INTERNAL = "__tvm_ffi_", "_internal_"

_DEFINE = re.compile(r"^define [^\n]*?@\"?([\w.$]+)\"?\(.*?^}\n", re.MULTILINE | re.DOTALL)
_SCOPES = re.compile(
    r"^!(\d+) = (?:distinct )?!(DILocation|DILexicalBlock|DISubprogram)\((.*)\)$", re.MULTILINE
)
_NAMED = re.compile(r"@\"?([\w.$]+)")
_PLACE = re.compile(r", !dbg !(\d+)")
_NOISE = re.compile(r"^    #dbg_.*\n|, !dbg !\d+| !dbg !\d+(?= \{)", re.MULTILINE)
_HIDDEN_EXPORT = re.compile(r"^(define (?:private|internal)) dllexport", re.MULTILINE)
_ASSEMBLED = re.compile(r"^\t\.type\t(?:\.L)?(\S+),[@%]function\n(.*?)^\.Lfunc_end", re.MULTILINE | re.DOTALL)
_ASSEMBLY_NOISE = re.compile(r"^(?:\t\.(?:cfi_|loc\t|file\t).*|\s*#DEBUG_.*|\.Ltmp\d+:)\n", re.MULTILINE)


@dataclass(frozen=True)
class MachineCode:
    """A library's code as LLVM has it, optimized, before instructions were chosen.

    Attributes:
        text: LLVM IR.
    """

    text: str

    def llvm(self, symbol: str, *, readable: bool = True) -> str:
        """The functions that a kernel is made of.

        Args:
            symbol: The kernel's name in TIR.
            readable: Without debug information.

        Returns:
            LLVM IR; empty for a kernel that is not in it.
        """
        texts = [self._functions[name] for name in self.names(symbol)]
        if readable:
            texts = [_NOISE.sub("", text) for text in texts]
        return "\n".join([*self._inlined(symbol, ";"), *texts])

    def assembly(self, symbol: str) -> str:
        """The same functions as assembly.

        Raises:
            ArtifactError: TVM's compiler, whose LLVM makes it, is not installed.
        """
        known = self._assembled
        texts = [_ASSEMBLY_NOISE.sub("", known[name]) for name in self.names(symbol) if name in known]
        return "\n".join([*self._inlined(symbol, "#"), *texts])

    def names(self, symbol: str) -> list[str]:
        """The functions that a kernel is made of: its own, those it calls, and the one it was inlined into."""
        alone = self._alone(symbol)
        if alone is not None:
            return self._reached([alone])
        own = [name for name, scopes in self._scopes.items() if symbol in scopes]
        hosts = [name for name in own if name.endswith(_BODY) or name.startswith(_CHECK)]
        return [*self._reached(name for name in own if name not in hosts), *hosts[:1]]

    def _inlined(self, symbol: str, comment: str) -> list[str]:
        names = self.names(symbol)
        if not names or self._alone(symbol) is not None:
            return []
        return [f"{comment} {symbol} was inlined into {names[-1]}."]

    def _alone(self, symbol: str) -> str | None:
        """The function that a kernel is, where it is one."""
        names = (symbol + _BODY, _INTERNAL + symbol, symbol, _CHECK + symbol)
        return next((name for name in names if name in self._functions), None)

    def _reached(self, roots: Iterable[str]) -> list[str]:
        """Functions, and those that they call or launch."""
        found: dict[str, None] = {}
        waiting = list(roots)
        while waiting:
            name = waiting.pop(0)
            if name not in found:
                found[name] = None
                inner = dict.fromkeys(_NAMED.findall(self._functions[name]))
                waiting += [other for other in inner if other in self._functions and _is_computing(other)]
        return list(found)

    @cached_property
    def _functions(self) -> Mapping[str, str]:
        return {match[1]: match[0] for match in _DEFINE.finditer(self.text)}

    @cached_property
    def _scopes(self) -> Mapping[str, frozenset[str]]:
        """For each function, the kernels that its instructions come from."""
        entries = {match[1]: (match[2], match[3]) for match in _SCOPES.finditer(self.text)}

        def kernel(place: str) -> str:
            kind, fields = entries.get(place, ("", ""))
            if kind == "DISubprogram":
                named = re.search(r'name: "([^"]*)"', fields)
                return named[1] if named else ""
            scope = re.search(r"scope: !(\d+)", fields)
            return kernel(scope[1]) if scope else ""

        known = {place: kernel(place) for place, (kind, _) in entries.items() if kind == "DILocation"}
        return {
            name: frozenset(known.get(place, "") for place in dict.fromkeys(_PLACE.findall(text)))
            for name, text in self._functions.items()
        }

    @cached_property
    def _assembled(self) -> Mapping[str, str]:
        """The functions as assembly."""
        runtime = ffi.runtime()
        ffi.load_compiler()
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "library.ll"
            # LLVM prints this of private functions that TVM marked, and does not read it.
            file.write_text(_HIDDEN_EXPORT.sub(r"\1", self.text), encoding="utf-8")
            try:
                text = str(runtime.load_module(str(file)).inspect_source("asm"))
            except (RuntimeError, ValueError, AttributeError) as error:
                raise ArtifactError(f"LLVM cannot make assembly of the listing: {error}") from error
        return {match[1]: match[2] for match in _ASSEMBLED.finditer(text)}


def _is_computing(name: str) -> bool:
    return not name.startswith((_CHECK, "__tvm_set_raised", "__tvm_func_handle"))
