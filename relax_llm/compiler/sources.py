"""What passes of a user's say, as text: an artifact in the cache depends on it."""

import inspect
import sys
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any


def pass_sources(passes: Sequence[Any] | None) -> list[str] | None:
    """The names of the standard passes, and the whole files that others come from: they may use any of it.

    What does not say what it does, such as a pass of TVM's in C++ with options, is something new each time.

    Returns:
        None for the standard pipeline.
    """
    if passes is None:
        return None
    from relax_llm.compiler.pipeline import Launches, Standard, name_of, pipeline

    if list(passes) == pipeline():
        return None
    return [
        f"standard {name_of(step)}" if isinstance(step, Standard | Launches) else _source(step)
        for step in passes
    ]


def _source(step: Any) -> str:
    if isinstance(step, partial):
        return _source(step.func) + _values([*step.args, *sorted(step.keywords.items())])
    if inspect.isfunction(step):
        code = step.__code__
        constants = [value for value in code.co_consts if not inspect.iscode(value)]
        which = f"{code.co_firstlineno} {code.co_code.hex()} {code.co_names}"  # of several lambdas in a file
        captured = [cell.cell_contents for cell in step.__closure__ or ()]
        given = [
            *captured,
            *constants,
            *(step.__defaults__ or ()),
            *sorted((step.__kwdefaults__ or {}).items()),
        ]
        return _file_of(step.__module__, step.__qualname__) + which + _values(given)
    if inspect.ismethod(step):
        return _source(step.__func__) + _source(step.__self__)
    if "_inst" in getattr(step, "__dict__", {}):  # a Python pass in TVM's wrapping
        return _source(vars(step)["_inst"])
    kinds = [kind for kind in type(step).__mro__[:-1] if kind.__module__ != "typing"]
    told = hasattr(step, "__dict__") and not type(step).__module__.startswith("tvm.")
    if not told or any("<locals>" in kind.__qualname__ for kind in kinds):
        return (
            uuid.uuid4().hex
        )  # C++, or a class made in a function, which depends on that function's arguments
    fields = _values(sorted(vars(step).items()))
    return "\n".join([fields, *(_file_of(kind.__module__, kind.__qualname__) for kind in kinds)])


def _file_of(module: str, name: str) -> str:
    file = getattr(sys.modules.get(module), "__file__", None)
    if not file or not Path(file).is_file():
        return uuid.uuid4().hex  # typed into a session
    return f"{name}\n{Path(file).read_bytes().decode('latin-1')}"


def _values(values: Sequence[Any]) -> str:
    text = repr(values)
    return uuid.uuid4().hex if " at 0x" in text else text  # an address says nothing of what lies there
