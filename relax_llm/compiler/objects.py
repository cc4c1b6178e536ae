"""Machine code of a library in parts, each of which is kept for the next library that has the same functions.

A part is what LLVM must see at once: functions that call each other. What `kernels.inner` made, which the kernels of
many problems share, is a part of its own, and called from others by a symbol. So a model that is compiled with another
kernel, plan or pass generates code for what became different, and two models share what they have in common.
"""

import hashlib
import json
import os
import secrets
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tvm
from tvm import ir, tirx
from tvm.tirx import PrimFunc

from relax_llm.artifact.machine_code import SHARED
from relax_llm.compiler.cache import size, trim
from relax_llm.kernels.builder import CALLS
from relax_llm.kernels.inner import ENTRY, INTERNAL
from relax_llm.kernels.machine import CODE_GENERATION, Machine
from relax_llm.places import cache_directory

_CODE, _LLVM = "code.o", "code.ll"
_MOST = 5e8
"""Bytes that all parts may have; those used last stay."""

_C_CONVENTION = 1
"""TVM's number of a function that is called as it is, without the checks of arguments that a packed one begins with."""


@dataclass(frozen=True)
class Code:
    """A part, compiled.

    Attributes:
        object: The object file.
        llvm: Its LLVM IR.
    """

    object: bytes
    llvm: str


def compiled(functions: Mapping[ir.GlobalVar, PrimFunc], machine: Machine, *, cache: bool) -> list[Code]:
    """Generate code for functions that call each other.

    Args:
        functions: By the variables through which they call each other.
        machine: What to generate for.
        cache: Whether code generated earlier may be used.
    """
    made = [_compiled(part, machine, cache) for part in parts(functions)]
    trim(cache_directory() / "objects", min(_MOST, size()), in_use=0)
    return made


def parts(functions: Mapping[ir.GlobalVar, PrimFunc]) -> list[dict[ir.GlobalVar, PrimFunc]]:
    """Divide functions; in each part what it calls of others is a function that passes the call on."""
    by_name = {var.name_hint: var for var in functions}
    shared = {var.name_hint for func in functions.values() for var in (func.attrs or {}).get(CALLS, ())}
    calls = {var.name_hint: _calls(func, by_name, shared) for var, func in functions.items()}
    group = {name: name for name in by_name}

    def first(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for name, called in calls.items():
        together = name in shared or ENTRY in (functions[by_name[name]].attrs or {})
        for other in called:
            if together or other not in shared:
                group[first(other)] = first(name)
    members: dict[str, list[str]] = {}
    for name in by_name:
        members.setdefault(first(name), []).append(name)
    divided = []
    for names in members.values():
        part = {}
        for name in names:
            func = functions[by_name[name]]
            part[by_name[name]] = _with_symbol(name, func) if name in shared else func
        for other in sorted(set().union(*(calls[name] for name in names)) - set(names)):
            part[by_name[other]] = _passing_on(other, functions[by_name[other]])
        divided.append(part)
    return divided


def _calls(func: PrimFunc, known: Iterable[str], shared: set[str]) -> set[str]:
    """The functions that one calls."""
    inner = {var.name_hint for var in (func.attrs or {}).get(CALLS, ())}
    if INTERNAL in (func.attrs or {}):
        return inner
    text = tvm.ir.save_json(func)  # dispatchers and entries, which are short, say nowhere else what they call
    return inner | {name for name in known if f'"{name}"' in text}


def _with_symbol(name: str, func: PrimFunc) -> PrimFunc:
    """An inner function, to be called from other parts."""
    return func.with_attr("global_symbol", SHARED + name).with_attr("calling_conv", _C_CONVENTION)


def _passing_on(name: str, func: PrimFunc) -> PrimFunc:
    """What stands for an inner function of another part; LLVM puts the call where this is called."""
    params = [tirx.Var(param.name, param.ty) for param in func.params]
    call = tirx.Evaluate(tirx.call_extern("int32", SHARED + name, *params))
    body = tirx.SeqStmt([call, tirx.Return(tirx.const(0, "int32"))])
    return tirx.PrimFunc(params, body, ret_type=ir.PrimType("int32")).with_attr("tirx.is_scheduled", True)


def _compiled(part: Mapping[ir.GlobalVar, PrimFunc], machine: Machine, cache: bool) -> Code:
    place = cache_directory() / "objects" / _digest(part, machine)
    known = _recall(place) if cache else None
    if known is not None:
        return known
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / _CODE
        with tvm.transform.PassContext(config=CODE_GENERATION):
            module = tvm.tirx.build(tvm.IRModule(dict(part)), target=machine.target)
        module.write_to_file(str(file))
        code = Code(file.read_bytes(), str(module.inspect_source("ll")))
    if cache:
        _remember(place, code)
    return code


def _digest(part: Mapping[ir.GlobalVar, PrimFunc], machine: Machine) -> str:
    """What the code of a part depends on."""
    what = [
        [[var.name_hint, tvm.ir.save_json(func)] for var, func in part.items()],
        str(machine.target),
        CODE_GENERATION,
        tvm.__version__,
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _recall(place: Path) -> Code | None:
    try:
        with zipfile.ZipFile(place) as file:
            code = Code(file.read(_CODE), file.read(_LLVM).decode())
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    with suppress(OSError):
        os.utime(place)
    return code


def _remember(place: Path, code: Code) -> None:
    """Keep a part, whole or not at all. A cache that cannot be written costs time, nothing else."""
    fresh = place.with_name(f"{place.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with zipfile.ZipFile(fresh, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            file.writestr(_CODE, code.object)
            file.writestr(_LLVM, code.llvm)
        fresh.replace(place)
    except OSError:
        with suppress(OSError):
            fresh.unlink()
