"""The pass pipeline, in order: from a traced architecture to what the virtual machine runs."""

from collections.abc import Callable

from tvm import IRModule, relax

from relax_llm.compiler.passes.combine_projections import CombineProjections
from relax_llm.compiler.passes.fuse_matmul import FuseMatmul
from relax_llm.compiler.passes.hide_internal import HideInternal
from relax_llm.compiler.passes.legalize import Legalize
from relax_llm.compiler.passes.lift_weights import LiftWeights
from relax_llm.compiler.passes.schedule_rest import ScheduleRest
from relax_llm.compiler.passes.select_kernels import SelectKernels
from relax_llm.compiler.planner import Planner

Pass = Callable[[IRModule], IRModule]


def pipeline(planner: Planner) -> list[Pass]:
    """From operators to launches: afterwards every computation is a call of a scheduled kernel."""
    return [
        CombineProjections(),  # q, k, v: one matmul
        FuseMatmul(),  # bias, activation, gate * up and residual into matmuls
        Legalize(planner.machine),  # norms and lookups have kernels of their own
        SelectKernels(planner),  # which kernel serves each matmul, in which layout it wants its weight
        LiftWeights(),  # concatenation and packing of weights: done when the artifact is made
        relax.transform.LegalizeOps(),  # what is left, TVM's way
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        ScheduleRest(),  # no plain loop stays
    ]


def lowering() -> list[Pass]:
    """From launches to the virtual machine's instructions: TVM's own passes."""
    return [
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
        HideInternal(),  # kernels that only a dispatcher calls
    ]


def run(mod: IRModule, passes: list[Pass]) -> IRModule:
    """Apply passes one after the other."""
    for step in passes:
        mod = step(mod)
    return mod
