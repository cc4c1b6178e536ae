"""Machine code for kernels alone, without a model."""

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import ir
from tvm.tirx import PrimFunc

from relax_llm.kernels.inner import complete
from relax_llm.kernels.machine import CODE_GENERATION, Machine


def generate(functions: Mapping[str, PrimFunc] | Mapping[ir.GlobalVar, PrimFunc], machine: Machine) -> Any:
    """Generate code for functions and all that they call.

    ::

        multiply = load(generate({"mine": func}, machine()))["mine"]

    Args:
        functions: By symbol; or by the variables through which they call each other.
        machine: The one to generate for.

    Returns:
        TVM's executable.
    """
    named = {}
    for name, func in functions.items():
        if isinstance(name, str):
            name, func = ir.GlobalVar(name), func.with_attr("global_symbol", name)
        named[name] = func
    with tvm.transform.PassContext(config=CODE_GENERATION):
        return tvm.compile(ir.IRModule(complete(named)), target=machine.target)
