"""Small libraries made by hand, for what needs a virtual machine but no model."""

# ruff: noqa: N805, RET504, SIM108
# mypy: ignore-errors
# TVMScript has the form of Python, and a meaning of its own.

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm
from tvm import relax
from tvm.script import ir as I, relax as R, tirx as T

from relax_llm.kernels.instruments import CLOCK, clock

if TYPE_CHECKING:
    from pathlib import Path


@I.ir_module
class Sums:
    """Sums of two kernels, a loop of the virtual machine and constants of every sort."""

    @T.prim_func(s_tir=True)
    def add(x: T.Buffer((4,), "float32"), w: T.Buffer((4,), "float32"), y: T.Buffer((4,), "float32")):
        T.func_attr({"tirx.is_scheduled": True})
        for i in range(4):
            y[i] = x[i] + w[i]

    @T.prim_func(s_tir=True)
    def double(x: T.Buffer((4,), "float32"), w: T.Buffer((4,), "float32"), y: T.Buffer((4,), "float32")):
        T.func_attr({"tirx.is_scheduled": True, "global_symbol": "double"})
        for i in range(4):
            y[i] = x[i] + w[i] * T.float32(2)

    @R.function
    def twice(x: R.Tensor((4,), "float32"), w: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
        cls = Sums
        a = R.call_tir(cls.add, (x, w), out_ty=R.Tensor((4,), "float32"))
        b = R.call_tir(
            cls.add, (a, R.const([1.0, 2.0, 3.0, 4.0], "float32")), out_ty=R.Tensor((4,), "float32")
        )
        return b

    @R.function
    def either(c: R.Tensor((), "bool"), x: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
        cls = Sums
        if c:
            y = R.call_tir(cls.add, (x, x), out_ty=R.Tensor((4,), "float32"))
        else:
            y = cls.twice(x, x)
        return y


_LOWERING = (
    relax.transform.ToNonDataflow(),
    relax.transform.RemovePurityChecking(),
    relax.transform.CallTIRRewrite(),
    relax.transform.StaticPlanBlockMemory(),
    relax.transform.LowerAllocTensor(),
    relax.transform.KillAfterLastUse(),
    relax.transform.LowerRuntimeBuiltin(),
    relax.transform.ComputePrimValue(),
    relax.transform.VMShapeLower(),
    relax.transform.AttachGlobalSymbol(),
)


def build(module: tvm.IRModule, path: Path, *, has_clock: bool = True) -> Path:
    """Compile a module into a library, each of its kernels as it stands, with the clock that libraries have."""
    target = tvm.target.Target({"kind": "llvm"})
    if has_clock:
        module = module.clone()
        module[CLOCK] = clock()
    executable = relax.build(module, target, relax_pipeline=tvm.transform.Sequential(_LOWERING))
    executable.export_library(str(path))
    return path
