"""From what a user wrote to a TIR function over 2-D buffers: (x [M, K], weight, (bias), (residual), out [M, N])."""

import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tvm import s_tir
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.errors import KernelError
from relax_llm.kernels import builder as b
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul import Matmul, arguments, definition
from relax_llm.kernels.matmul.tiled import layout_named
from relax_llm.plan.kernel import Kernel


@dataclass(frozen=True)
class Realized:
    """A kernel made for one problem.

    Attributes:
        kernel: Its record.
        problem: What it computes: the problem asked for, less the epilogues that it does not absorb.
        symbol: Its name in the library.
        func: The TIR function.
        objects: Object files to link, as bytes.
    """

    kernel: Kernel
    problem: Matmul
    symbol: str
    func: PrimFunc
    objects: tuple[bytes, ...] = ()


def core(problem: Matmul, kernel: Kernel) -> Matmul:
    """The part of a problem that a kernel computes: the product, and the epilogues up to the first it does not absorb.

    Epilogues apply in the order bias, activation, gate, residual.
    """
    keep: dict[str, Any] = {"bias": False, "activation": None, "gated": False, "residual": False}
    for epilogue, field in (
        ("bias", "bias"),
        ("activation", "activation"),
        ("gate", "gated"),
        ("residual", "residual"),
    ):
        if not getattr(problem, field):
            continue
        if epilogue not in kernel.absorbs:
            break
        keep[field] = getattr(problem, field)
    if problem.gated and keep["activation"] and not keep["gated"]:
        keep["activation"] = None  # the activation is the gate's alone
    return replace(problem, **keep)


def realize(kernel: Kernel, problem: Matmul, machine: Machine) -> Realized:
    """Make a kernel for a problem.

    Raises:
        Declined: The kernel does not want the problem.
        KernelError: What the function gave is not usable.
    """
    part = core(problem, kernel)
    symbol = f"{kernel.name}__{part.name}"
    if kernel.form == "schedule":
        schedule = s_tir.Schedule(definition(part, flat=True))
        kernel.make(schedule, part)
        return Realized(kernel, part, symbol, schedule.mod["main"])
    made = kernel.make(part)
    if isinstance(made, str):
        func = _extern(symbol, part, kernel, machine)
        return Realized(kernel, part, symbol, func, (_object(kernel, part, symbol, made, machine),))
    if not isinstance(made, PrimFunc):
        raise KernelError(
            f"Kernel {kernel.name!r} gave {type(made).__name__} for {part.name}; expected a TIR PrimFunc or C source."
        )
    _check_signature(kernel, part, made, machine)
    return Realized(kernel, part, symbol, made)


def shapes(problem: Matmul, layout: str, machine: Machine, rows: Any) -> list[tuple[Any, ...]]:
    """Shapes of a kernel's arguments, in order."""
    known = {
        "x": (rows, problem.k),
        "weight": layout_named(layout, problem, machine).shape(problem.n, problem.k),
        "bias": (problem.n,),
        "residual": (rows, problem.outputs),
        "out": (rows, problem.outputs),
    }
    return [known[name] for name in arguments(problem)]


def _extern(symbol: str, problem: Matmul, kernel: Kernel, machine: Machine) -> PrimFunc:
    def emit() -> None:
        rows = b.size("M")
        tensors = [
            b.argument(name, shape)
            for name, shape in zip(
                arguments(problem), shapes(problem, kernel.layout, machine, rows), strict=True
            )
        ]
        T.evaluate(T.call_extern("int32", symbol, *[tensor.data for tensor in tensors], rows))

    return b.prim_func(symbol, emit)


def _object(kernel: Kernel, problem: Matmul, symbol: str, source: str, machine: Machine) -> bytes:
    """Compile C source; the function has the kernel's name, and the macros N and K hold the problem's sizes."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise KernelError(
            f"Kernel {kernel.name!r} is C source, but no C compiler (cc, gcc or clang) was found."
        )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"{kernel.name}.c"
        path.write_text(
            source, encoding="utf-8"
        )  # compiled by its bare name, which some compilers keep in the object
        flags = [
            "-O3",
            "-fPIC",
            *machine.c_flags,
            f"-D{kernel.name}={symbol}",
            f"-DN={problem.n}",
            f"-DK={problem.k}",
        ]
        command = [compiler, *flags, "-c", path.name, "-o", path.with_suffix(".o").name]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
        if done.returncode:
            raise KernelError(
                f"Kernel {kernel.name!r} does not compile as C for {problem.name}:\n{done.stderr.strip()}"
            )
        return path.with_suffix(".o").read_bytes()


def _check_signature(kernel: Kernel, problem: Matmul, func: PrimFunc, machine: Machine) -> None:
    names = arguments(problem)
    wanted = shapes(problem, kernel.layout, machine, "M")
    signature = ", ".join(
        f"{n} [{', '.join(map(str, s))}] float32" for n, s in zip(names, wanted, strict=True)
    )
    found = [getattr(param.ty, "shape", None) for param in func.params]
    fits = len(found) == len(wanted) and all(
        shape is not None
        and len(shape) == len(expected)
        and all(size == "M" or _equals(actual, size) for actual, size in zip(shape, expected, strict=True))
        for shape, expected in zip(found, wanted, strict=False)
    )
    if not fits:
        raise KernelError(
            f"Kernel {kernel.name!r} has the wrong signature for {problem.name}; it must take ({signature})."
        )


def _equals(actual: Any, expected: int) -> bool:
    try:
        return int(actual) == expected
    except (TypeError, ValueError):
        return False
