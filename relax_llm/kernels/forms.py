"""From what a user wrote to a TIR function over the operator's operands: (x [M, K], weight, ..., out [M, N])."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tvm import s_tir
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm import programs
from relax_llm.artifact.listings import COMPILERS, Source
from relax_llm.errors import KernelError
from relax_llm.kernels import builder as b
from relax_llm.kernels.layout import Layout, Plain
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.matmul.rest import core
from relax_llm.kernels.matmul.tiled import layout_named
from relax_llm.kernels.operators import Operand, operator_of
from relax_llm.kernels.problem import Problem
from relax_llm.plan.kernel import Kernel, Layout as UserLayout
from relax_llm.plan.python_kernel import PREFIX, PythonKernel, PythonOperand, register

_SUFFIXES = {".c": "c", ".cc": "c++", ".cpp": "c++", ".cxx": "c++", ".o": "object"}


@dataclass(frozen=True)
class Realized:
    """A kernel made for one problem.

    Attributes:
        kernel: Its record.
        problem: What it computes: the problem asked for, less what it does not absorb.
        symbol: Its name in the library.
        func: The TIR function.
        operands: What it takes, in order.
        layout: How its weight lies in memory, for operators that have one.
        objects: Object files to link, as bytes.
        python: What calls back into Python, if it does.
        source: C or C++ that it came as, and how that was compiled.
    """

    kernel: Kernel
    problem: Problem
    symbol: str
    func: PrimFunc
    operands: tuple[Operand, ...]
    layout: Layout | None = None
    objects: tuple[bytes, ...] = ()
    python: PythonKernel | None = None
    source: Source | None = None


def layout_of(kernel: Kernel, problem: Problem, machine: Machine) -> Layout | None:
    """How a kernel wants the weight of a problem; None for operators without a weight of this kind."""
    if not isinstance(problem, Matmul):
        return None
    return (
        kernel.layout
        if isinstance(kernel.layout, UserLayout)
        else layout_named(kernel.layout, problem, machine)
    )


def realize(kernel: Kernel, problem: Problem, machine: Machine) -> Realized:
    """Make a kernel for a problem.

    Raises:
        Declined: The kernel does not want the problem.
        KernelError: What the function gave is not usable.
    """
    part = core(problem, kernel) if isinstance(problem, Matmul) else problem
    operator = operator_of(part)
    layout = layout_of(kernel, part, machine)
    operands = operator.operands(part, layout)
    symbol = f"{kernel.name}__{part.name}"
    if kernel.form == "schedule":
        if layout is not None and not isinstance(layout, Plain):
            raise KernelError(
                f"Kernel {kernel.name!r} is a schedule of the plain loops, which read the weight plain, not "
                f"{layout.name}."
            )
        schedule = s_tir.Schedule(operator.definition(part))
        kernel.make(schedule, part)
        return Realized(kernel, part, symbol, schedule.mod["main"], operands, layout)
    if kernel.form == "python":
        known = tuple(PythonOperand(o.name, tuple(map(str, o.shape)), o.dtype, o.role) for o in operands)
        python = PythonKernel(kernel.name, symbol, asdict(part), known)
        register(python, kernel)
        return Realized(kernel, part, symbol, _packed(symbol, operands), operands, layout, python=python)
    made = kernel.make(part)
    if isinstance(made, str | Path):
        func = _extern(symbol, operands)
        compiled, source = _object(kernel, part, symbol, made, machine)
        return Realized(kernel, part, symbol, func, operands, layout, (compiled,), source=source)
    if not isinstance(made, PrimFunc):
        raise KernelError(
            f"Kernel {kernel.name!r} gave {type(made).__name__} for {part.name}; expected a TIR PrimFunc, C source or "
            "the path of a C, C++ or object file."
        )
    if kernel.form == "c":
        raise KernelError(f"Kernel {kernel.name!r} says that it is C, but gave a PrimFunc.")
    _check_signature(kernel, part, operands, made)
    return Realized(kernel, part, symbol, made, operands, layout)


def sizes_of(operands: Sequence[Operand]) -> list[str]:
    """Names of the symbolic sizes in the operands' shapes, in the order in which they first appear."""
    return list(dict.fromkeys(size for o in operands for size in o.shape if isinstance(size, str)))


def _flat_call(operands: Sequence[Operand]) -> list[b.Expr]:
    """Declare the operands, and give what a function of pointers takes: pointers and numbers, then the sizes."""
    sizes = {name: b.size(name) for name in sizes_of(operands)}
    given = []
    for operand in operands:
        if operand.is_tensor:
            shape = [sizes.get(size, size) if isinstance(size, str) else size for size in operand.shape]
            given.append(b.argument(operand.name, shape, operand.dtype).data)
        else:
            given.append(b.scalar(operand.name))
    return [*given, *sizes.values()]


def _extern(symbol: str, operands: Sequence[Operand]) -> PrimFunc:
    return b.prim_func(symbol, lambda: T.evaluate(T.call_extern("int32", symbol, *_flat_call(operands))))


def _packed(symbol: str, operands: Sequence[Operand]) -> PrimFunc:
    return b.prim_func(symbol, lambda: T.evaluate(T.call_packed(PREFIX + symbol, *_flat_call(operands))))


def _object(
    kernel: Kernel, problem: Problem, symbol: str, made: str | Path, machine: Machine
) -> tuple[bytes, Source | None]:
    """Compile C or C++, in which the function has the kernel's name; or take an object file and rename it there."""
    said = None
    if isinstance(made, Path):
        language = _SUFFIXES.get(made.suffix)
        if language is None:
            raise KernelError(
                f"Kernel {kernel.name!r} gave the path {made}; known endings: {', '.join(_SUFFIXES)}."
            )
        if str(made) not in kernel.files:
            raise KernelError(
                f"Kernel {kernel.name!r} gave the path {made}, which it does not name; say files=({str(made)!r},), so "
                "that a change of the file is seen."
            )
        try:
            content = made.read_bytes()
        except OSError as error:
            raise KernelError(f"Kernel {kernel.name!r}: {made} cannot be read: {error.strerror}.") from error
    else:
        language, content = "c", made.encode()
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.o"
        if language == "object":
            source = Path(directory) / f"{kernel.name}.o"
            source.write_bytes(content)
            tool = _tool(kernel, "an object file", "objcopy", "llvm-objcopy")
            command = [tool, f"--redefine-sym={kernel.name}={symbol}", source.name, result.name]
            what = "cannot be used as an object file"
        else:
            source = Path(directory) / f"{kernel.name}{'.c' if language == 'c' else '.cpp'}"
            source.write_bytes(content)  # compiled by its bare name, which some compilers keep in the object
            tool = _tool(kernel, f"{language.upper()} source", *COMPILERS[language])
            near = [f"-I{made.parent.resolve()}"] if isinstance(made, Path) else []
            flags = ["-O3", "-fPIC", *machine.c_flags, *_macros(problem), f"-D{kernel.name}={symbol}"]
            said = Source(
                language, source.name, 1, content.decode(errors="replace"), tuple(flags), _texts(kernel, made)
            )
            command = [tool, *flags, *near, "-c", source.name, "-o", result.name]
            what = f"does not compile as {language.upper()}"
        done = programs.run(command, directory)
        if done.returncode:
            raise KernelError(f"Kernel {kernel.name!r} {what} for {problem.name}:\n{done.stderr.strip()}")
        return result.read_bytes(), said


def _texts(kernel: Kernel, made: str | Path) -> dict[str, str]:
    """The other files that C source may include, by name."""
    files = (Path(name) for name in kernel.files if Path(name) != made)
    return {file.name: file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()}


def _tool(kernel: Kernel, what: str, *names: str) -> str:
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise KernelError(f"Kernel {kernel.name!r} is {what}, but none of {', '.join(names)} was found.")


def _macros(problem: Problem) -> list[str]:
    """The problem's numbers as macros: N and K, or HEADS, KV_HEADS, HEAD_DIM, SCALE and WINDOW (0 for none)."""
    return [
        f"-D{name.upper()}={int(value) if isinstance(value, bool) else value or 0}"
        for name, value in asdict(problem).items()
        if value is None or isinstance(value, int | float)
    ]


def _check_signature(kernel: Kernel, problem: Problem, operands: Sequence[Operand], func: PrimFunc) -> None:
    found = [(getattr(param.ty, "shape", None), str(getattr(param.ty, "dtype", ""))) for param in func.params]
    bounds = dict(kernel.sizes.bounds)

    def fits(actual: Any, expected: int | str) -> bool:
        if isinstance(expected, int):
            return _equals(actual, expected)
        first, last = bounds.get(expected, (1, None))
        return not _is_number(actual) or (first == last and _equals(actual, first))

    def same(operand: Operand, shape: Any, dtype: str) -> bool:
        if not operand.is_tensor:
            return shape is None and dtype == operand.dtype
        return (
            shape is not None
            and dtype == operand.dtype
            and len(shape) == len(operand.shape)
            and all(fits(actual, expected) for actual, expected in zip(shape, operand.shape, strict=True))
        )

    if len(found) != len(operands) or not all(
        same(operand, *given) for operand, given in zip(operands, found, strict=True)
    ):
        raise KernelError(
            f"Kernel {kernel.name!r} has the wrong signature for {problem.name}; it must take "
            f"({', '.join(map(str, operands))})."
        )


def _is_number(size: Any) -> bool:
    try:
        int(size)
    except (TypeError, ValueError):
        return False
    return True


def _equals(actual: Any, expected: int) -> bool:
    return _is_number(actual) and int(actual) == expected
