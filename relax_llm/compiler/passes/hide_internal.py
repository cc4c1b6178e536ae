"""Kernels that other functions call directly lose their symbols, as a call inside a module needs it."""

from dataclasses import dataclass

from tvm import IRModule
from tvm.tirx import PrimFunc

from relax_llm.kernels.inner import INTERNAL


@dataclass(frozen=True)
class HideInternal:
    """Make internal kernels private to the library, after TVM has given every function a symbol.

    Before::

        @T.prim_func
        def mine__matmul_n48_k64(x: T.handle, weight: T.handle, out: T.handle, M: T.int64): ...

    After::

        @T.prim_func(private=True)
        def mine__matmul_n48_k64(x: T.handle, weight: T.handle, out: T.handle, M: T.int64): ...
    """

    def __call__(self, mod: IRModule) -> IRModule:
        """Change the functions that are marked internal."""
        changed = mod.clone()
        for var, func in mod.functions_items():
            if isinstance(func, PrimFunc) and INTERNAL in (func.attrs or {}):
                changed[var] = func.without_attr("global_symbol")
        return changed
