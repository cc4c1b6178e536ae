"""From a compiled module to a library: linked here, or for another processor where a linker for it is installed."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import ir, relax
from tvm.relax.vm_build import _vmcodegen, _vmlink
from tvm.tirx import PrimFunc

from relax_llm import cpu, programs
from relax_llm.artifact.artifact import HOW_TO_RUN_ON_GPU, LIBRARY, OBJECTS, SOURCE, how_to_link
from relax_llm.compiler.ahead import announcing
from relax_llm.compiler.objects import Code, compiled
from relax_llm.errors import CompileError
from relax_llm.kernels.instruments import CLOCK, instruments
from relax_llm.kernels.machine import CODE_GENERATION, CUDA, Machine
from relax_llm.kernels.threads import link, threads_object

_ADDRESS = re.compile(r'"0x[0-9a-f]+"')
"""What TVM calls a buffer in the metadata of LLVM IR: where it lay in the memory of the compiler."""

_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}


def cross_linker(architecture: str) -> list[str] | None:
    """The command of an installed linker for another processor, without its inputs and output.

    Kernels need no library of the other system, so a bare linker will do: what they call is in the process that loads
    them.
    """
    for command in (
        [f"{architecture}-linux-gnu-g++", "-shared"],
        [f"{architecture}-linux-gnu-gcc", "-shared"],
        ["ld.lld", "-shared"],
        [f"{architecture}-linux-gnu-ld", "-shared"],
        ["zig", "cc", "-target", f"{architecture}-linux-gnu", "-shared"],
    ):
        if shutil.which(command[0]):
            return command
    return None


def write_library(
    mod: tvm.IRModule, machine: Machine, directory: Path, objects: Sequence[bytes], *, cache: bool
) -> tuple[list[str], str]:
    """Generate code and link it, with the objects of kernels that came as C, into one shared library.

    What the runtime measures with goes into it too.

    For a GPU the library holds the host's code and the kernels' source, which also stands in a file beside it.

    Args:
        mod: The lowered module.
        machine: What to generate for.
        directory: Where the library goes; its objects, where no linker for the machine is installed.
        objects: Object files of kernels.
        cache: Whether code generated earlier may be used, and this kept.

    Returns:
        What the user should know, one sentence each; and the code of all kernels as LLVM IR.

    Raises:
        CompileError: There is no C++ compiler, or code generation or linking failed.
    """
    here = machine.is_gpu or machine.architecture == cpu.architecture()
    if here:
        threads_object()  # without a C++ compiler there is no use in going on
    _refuse_foreign(objects, machine)
    linker = None if here else cross_linker(machine.architecture)
    name = LIBRARY if here or linker else OBJECTS
    try:
        with tvm.transform.PassContext(config=CODE_GENERATION):
            executable, code = _executable(mod, machine, cache)
            llvm = "".join([llvm_of(executable.mod), *(_named_alike(part.llvm) for part in code)])
            objects = [*objects, *(part.object for part in code)]
            if machine.is_gpu:
                (directory / SOURCE).write_text(_device_source(executable.mod), encoding="utf-8")
            if here:
                link(executable, directory / name, objects)
            else:
                options = {"fcompile": lambda out, inputs, **_: _link(linker, out, inputs)} if linker else {}
                _export(executable, directory / name, objects, options)
    except (RuntimeError, ValueError) as error:
        raise CompileError(f"Generating code for {machine.name} failed: {error}") from error
    if machine.is_gpu:
        return [f"This artifact holds kernels for a GPU, which cannot run here: {HOW_TO_RUN_ON_GPU}"], llvm
    if name == LIBRARY:
        return [], llvm
    return [
        f"The library is not linked: no linker for {machine.architecture} is installed here. {OBJECTS} holds its "
        f"objects; {how_to_link(machine.architecture)} Or install "
        f"{machine.architecture}-linux-gnu-g++, lld or zig here, and compile again."
    ], llvm


def _executable(mod: tvm.IRModule, machine: Machine, cache: bool) -> tuple[Any, list[Code]]:
    """The functions of a model for the virtual machine, and the code of the kernels that they call."""
    if machine.is_gpu:
        return relax.build(mod, machine.target, relax_pipeline=tvm.transform.Sequential([])), []
    if machine.architecture == cpu.architecture():
        mod = announcing(mod, machine)
    kernels = {var: func for var, func in mod.functions_items() if isinstance(func, PrimFunc)}
    more = instruments(machine)
    # A library that TVM links has code of TVM's own, too: what is always there is the rest's place.
    there = tvm.IRModule({CLOCK: more.pop(CLOCK)})
    kernels |= {ir.GlobalVar(symbol): func for symbol, func in more.items()}
    attrs = dict(mod.attrs or {})
    builder = relax.ExecBuilder()
    _vmcodegen(builder, mod, "bytecode")
    executable = _vmlink(
        builder,
        machine.target,
        there,
        ext_libs=attrs.get("external_mods", []),
        params=dict(attrs.get("const_name_to_constant", {})),
    )
    return executable, compiled(kernels, machine, cache=cache)


def _export(executable: Any, file: Path, objects: Sequence[bytes], options: dict[str, Any]) -> None:
    """Link for another processor, or put into an archive what is to be linked there."""
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory) / f"{index}.o" for index in range(len(objects))]
        for place, data in zip(files, objects, strict=True):
            place.write_bytes(data)
        executable.export_library(str(file), addons=[str(place) for place in files], **options)


def _refuse_foreign(objects: Sequence[bytes], machine: Machine) -> None:
    """Kernels in C are compiled by this machine's compiler, which knows one processor."""
    for data in objects:
        if data[:4] == b"\x7fELF":
            made = _ELF_MACHINES.get(int.from_bytes(data[18:20], "little"))
            if made != machine.architecture:
                raise CompileError(
                    f"A kernel in C was compiled for {made or 'another processor'}, by this machine's compiler; "
                    f"--target {machine.name} takes kernels in TVMScript and schedules only."
                )


def _device_source(module: Any) -> str:
    """The source of the GPU's kernels in a module and in those that it imports."""
    if module.kind == CUDA:
        return str(module.inspect_source())
    return "".join(_device_source(imported) for imported in module.imports)


def llvm_of(module: Any) -> str:
    """The LLVM IR in a compiled module and in those that it imports, the same whenever the same is compiled."""
    text = str(module.inspect_source("ll")) if module.kind == "llvm" else ""
    return _named_alike(text) + "".join(llvm_of(imported) for imported in module.imports)


def _named_alike(text: str) -> str:
    known: dict[str, str] = {}
    return _ADDRESS.sub(lambda found: known.setdefault(found[0], f'"buffer{len(known)}"'), text)


def _link(linker: list[str], output: str, inputs: Any) -> None:
    command = [*linker, "-o", output, *([inputs] if isinstance(inputs, str) else inputs)]
    done = programs.run(command)
    if done.returncode:
        raise RuntimeError(f"{' '.join(linker)} says: {done.stderr.strip()}")
