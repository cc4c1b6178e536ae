"""Products say which weight they read, so that threads which wait for one can ask for the next: see ahead.hpp."""

import math

import numpy as np
from tvm import IRModule, tirx
from tvm.tirx import PrimFunc

from relax_llm.kernels.inner import INTERNAL
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.problem import problem_of
from relax_llm.kernels.threads import ANNOUNCE

_WEIGHT = 1  # among the parameters of a product


def announcing(mod: IRModule) -> IRModule:
    """The module, in which each product that the model launches calls `ANNOUNCE` before it does anything else."""
    changed = mod.clone()
    for var, func in mod.functions_items():
        if not isinstance(func, PrimFunc) or INTERNAL in (func.attrs or {}):
            continue
        if isinstance(problem_of(func), Matmul):
            weight = func.params[_WEIGHT]
            size = math.prod(map(int, weight.ty.shape)) * np.dtype(str(weight.dtype)).itemsize
            call = tirx.call_extern("void", ANNOUNCE, weight.data, tirx.const(size, "int64"))
            changed[var] = func.with_body(tirx.SeqStmt([tirx.Evaluate(call), func.body]))
    return changed
