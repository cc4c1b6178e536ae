"""Listings of the kernels of an artifact: sources, TVMScript and LLVM IR, gathered while it is compiled."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tvm
from tvm.tirx import PrimFunc

import relax_llm
from relax_llm.artifact import listings
from relax_llm.artifact.listings import Index, Source
from relax_llm.compiler.planner import Planner
from relax_llm.kernels.builder import CALLS
from relax_llm.kernels.forms import Realized
from relax_llm.kernels.library import built_in
from relax_llm.kernels.machine import CODE_GENERATION


@contextmanager
def script(mod: tvm.IRModule) -> Iterator[Future[str]]:
    """Print the kernels of a module while other work goes on: TVM prints without Python's lock."""
    kernels = {
        var: func.without_attr(CALLS) for var, func in mod.functions_items() if isinstance(func, PrimFunc)
    }
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(tvm.IRModule(kernels).script)


def write(path: Path, mod: tvm.IRModule, planner: Planner, script: str, llvm: str) -> None:
    """Write the listings of a compiled model.

    Args:
        path: The file.
        mod: Its lowered module.
        planner: What chose its kernels.
        script: The kernels' TVMScript.
        llvm: LLVM IR of the library.
    """
    parameters = {
        var.name_hint: tuple(param.name.removesuffix("_pointer") for param in func.params)
        for var, func in mod.functions_items()
        if isinstance(func, PrimFunc)
    }
    called_back = {
        python.symbol: tuple(operand.name for operand in python.operands)
        for python in planner.python_kernels()
    }
    target: Mapping[str, Any] = planner.machine.options
    kernels = {
        symbol: {name: realized.symbol for name, realized in choice.realized.items()}
        for symbol, (_, choice) in planner.choices().items()
        if choice.realized
    }
    index = Index(parameters | called_back, dict(_sources(planner)), kernels, target, CODE_GENERATION)
    listings.write(path, index, script, llvm)


def _sources(planner: Planner) -> Iterator[tuple[str, Source]]:
    for symbol, (problem, choice) in planner.choices().items():
        if not choice.realized:
            made_by = built_in(problem, planner.machine)[0].make
            found = [(symbol, _python(made_by))]
        else:
            found = [(realized.symbol, _source(realized)) for realized in choice.realized.values()]
        yield from ((name, source) for name, source in found if source is not None)


def _source(realized: Realized) -> Source | None:
    return realized.source or _python(realized.kernel.make)


def _python(function: Callable[..., Any]) -> Source | None:
    """The function that makes a kernel, or computes it; None where it was typed into a session."""
    function = _named(function)
    try:
        lines, first = inspect.getsourcelines(function)
        file = Path(inspect.getsourcefile(function) or "")
    except (OSError, TypeError):
        return None
    root = Path(relax_llm.__path__[0])
    name = file.relative_to(root.parent).as_posix() if file.is_relative_to(root) else file.name
    return Source("python", name, first, inspect.cleandoc("\n" + "".join(lines)) + "\n")


def _named(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a lambda calls, where it only passes something on."""
    while getattr(function, "__name__", "") == "<lambda>":
        captured = [cell.cell_contents for cell in function.__closure__ or ()]
        known = [function.__globals__.get(name) for name in function.__code__.co_names]
        inner = [value for value in (*captured, *known) if inspect.isfunction(value)]
        if not inner:
            break
        function = inner[0]
    return function
