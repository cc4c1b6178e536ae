"""The LLVM IR and the assembly of a library as text, cut by kernel.

A kernel that only a dispatcher calls is mostly inlined into it; what is left of it as functions of their own are the
bodies of its parallel loops. LLVM's debug locations say which kernel an instruction comes from.

A library is made of several modules of LLVM, one after the other in the text; what kernels share has its own.
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

SHARED = "_shared_"
"""Before the name of a function that is called from other modules, its symbol."""

_MODULE = re.compile(r"^(?=; ModuleID = )", re.MULTILINE)
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
        text: LLVM IR, of one module after the other.
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
        texts = [module.functions[name] for module, name in self._found(symbol)]
        if readable:
            texts = [_NOISE.sub("", text) for text in texts]
        return "\n".join([*self._inlined(symbol, ";"), *texts])

    def assembly(self, symbol: str) -> str:
        """The same functions as assembly.

        Raises:
            ArtifactError: TVM's compiler, whose LLVM makes it, is not installed.
        """
        texts = [
            _ASSEMBLY_NOISE.sub("", module.assembled[name])
            for module, name in self._found(symbol)
            if name in module.assembled
        ]
        return "\n".join([*self._inlined(symbol, "#"), *texts])

    def names(self, symbol: str) -> list[str]:
        """The functions that a kernel is made of: its own, those it calls, and the one it was inlined into."""
        return [name for _, name in self._found(symbol)]

    def _found(self, symbol: str) -> list[tuple["_Module", str]]:
        alone = self._alone(symbol)
        if alone is not None:
            return self._reached([alone])
        for module in self._modules:
            own = [name for name, scopes in module.scopes.items() if symbol in scopes]
            hosts = [(module, name) for name in own if name.endswith(_BODY) or name.startswith(_CHECK)]
            rest = [(module, name) for name in own if (module, name) not in hosts]
            if own:
                return [*self._reached(rest), *hosts[:1]]
        return []

    def _inlined(self, symbol: str, comment: str) -> list[str]:
        names = self.names(symbol)
        if not names or self._alone(symbol) is not None:
            return []
        return [f"{comment} {symbol} was inlined into {names[-1]}."]

    def _alone(self, symbol: str) -> tuple["_Module", str] | None:
        """The function that a kernel is, where it is one."""
        names = (symbol + _BODY, SHARED + symbol, _INTERNAL + symbol, symbol, _CHECK + symbol)
        found = ((module, name) for name in names for module in self._modules if name in module.functions)
        return next(found, None)

    def _reached(self, roots: Iterable[tuple["_Module", str]]) -> list[tuple["_Module", str]]:
        """Functions, and those that they call or launch."""
        found: list[tuple[_Module, str]] = []
        waiting = list(roots)
        while waiting:
            module, name = waiting.pop(0)
            if (module, name) not in found:
                found.append((module, name))
                for other in dict.fromkeys(_NAMED.findall(module.functions[name])):
                    there = module if other in module.functions else self._shared.get(other)
                    if there is not None and _is_computing(other):
                        waiting.append((there, other))
        return found

    @cached_property
    def _modules(self) -> list["_Module"]:
        return [_Module(text) for text in _MODULE.split(self.text) if text.strip()]

    @cached_property
    def _shared(self) -> Mapping[str, "_Module"]:
        """Where the functions are that are called from other modules."""
        return {
            name: module for module in self._modules for name in module.functions if name.startswith(SHARED)
        }


@dataclass(frozen=True, eq=False)
class _Module:
    """One module of LLVM."""

    text: str

    @cached_property
    def functions(self) -> Mapping[str, str]:
        return {match[1]: match[0] for match in _DEFINE.finditer(self.text)}

    @cached_property
    def scopes(self) -> Mapping[str, frozenset[str]]:
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
            for name, text in self.functions.items()
        }

    @cached_property
    def assembled(self) -> Mapping[str, str]:
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
