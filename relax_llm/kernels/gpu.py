"""Kernels for a GPU: an operator's definition, scheduled by dlight, over the operands that the model passes."""

from collections.abc import Sequence
from typing import Any

from tvm import IRModule, s_tir, tirx
from tvm.s_tir import dlight
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.layout import Layout
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.operators import Operand, operator_of
from relax_llm.kernels.problem import Problem, tag

_THREADS = 256
_SCHEDULED = "tirx.is_scheduled"
_SPATIAL = "0"  # As TVM prints an axis that is not reduced over.


def gpu_kernel(problem: Problem, machine: Machine) -> PrimFunc:
    """The kernels that solve a problem at every size: its definition, one element of a result per thread.

    Args:
        problem: What to solve; its weight is read as in the checkpoint.
        machine: A GPU.
    """
    operator = operator_of(problem)
    func = scheduled(operator.definition(problem), machine)
    return launched(problem, func, operator.operands(problem, None), None, problem.name)


def scheduled(func: PrimFunc, machine: Machine) -> PrimFunc:
    """Plain loops, bound to the threads of a GPU.

    dlight's fallback inlines what it can and gives every thread one element of what remains; where it cannot divide a
    reduction, as among those of attention over a length that is not known, each block of loops is divided alone. So
    it is where a sum has one term: dlight forgets that it is a sum, and puts what follows it into the sum itself.
    """
    if _has_sum_of_one(func):
        return _by_element(func).with_attr(_SCHEDULED, True)
    with machine.target:
        try:
            made = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(IRModule({"main": func}))["main"]
        except s_tir.schedule.ScheduleError:
            made = _by_element(func)
    return made.with_attr(_SCHEDULED, True)


def launched(
    problem: Problem, func: PrimFunc, operands: Sequence[Operand], layout: Layout | None, name: str
) -> PrimFunc:
    """A kernel over the operands that kernels take, as a function over those that the model passes.

    ::

        def mine(x: T.Buffer((M, 64)), ...)  ->  def matmul_n48_k64(x: T.Buffer((batch, seq, 64)), ...)

    Args:
        problem: What it solves.
        func: The kernel, all its loops bound to threads.
        operands: What it takes.
        layout: How the weight lies in memory.
        name: The symbol.
    """

    def emit() -> None:
        known: dict[str, Any] = {}
        given: dict[str, Any] = {}
        for operand in operator_of(problem).launched(problem, layout):
            if not operand.is_tensor:
                given[operand.name] = known[operand.name] = b.scalar(operand.name)
                continue
            for size in operand.shape:
                if isinstance(size, str) and size not in known:
                    known[size] = b.size(size)
            shape = [known[size] if isinstance(size, str) else size for size in operand.shape]
            given[operand.name] = b.argument(operand.name, shape, operand.dtype)
        if "batch" in known and "seq" in known:
            known.setdefault("M", known["batch"] * known["seq"])
        taken = {
            param: tirx.decl_buffer(
                [known[size] if isinstance(size, str) else size for size in operand.shape],
                operand.dtype,
                operand.name,
            )
            if operand.is_tensor
            else given[operand.name]
            for param, operand in zip(func.params, operands, strict=True)
        }
        kernel = func.specialize(taken)
        tensors = [operand for operand in operands if operand.is_tensor]
        for param, operand in zip(kernel.params, tensors, strict=True):
            T.add_to_parent(tirx.DeclBuffer(param, data=given[operand.name].data))
        T.add_to_parent(kernel.body)

    return tag(b.prim_func(name, emit), problem)


def has_threads(func: PrimFunc) -> bool:
    """Whether a loop is bound to the threads of a GPU."""
    return "blockIdx." in func.script() or "threadIdx." in func.script()


def _has_sum_of_one(func: PrimFunc) -> bool:
    schedule = s_tir.Schedule(func)
    blocks = map(schedule.get, schedule.get_child_blocks(schedule.get_sblock("root")))
    return any(
        block.init is not None
        and not any(_extent(var) != 1 for var in block.iter_vars if str(var.iter_type) != _SPATIAL)
        for block in blocks
    )


def _extent(var: Any) -> int | None:
    value = getattr(var.dom.extent, "value", None)
    return None if value is None else int(value)


def _by_element(func: PrimFunc) -> PrimFunc:
    """Every block by itself: a thread for each element that it writes, which does the reduction alone."""
    schedule = s_tir.Schedule(func)
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        loops = schedule.get_loops(block)
        kinds = [str(var.iter_type) for var in schedule.get(block).iter_vars]
        spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _SPATIAL]
        inner = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != _SPATIAL]
        if inner and spatial:
            schedule.reorder(*spatial, *inner)
        over = schedule.fuse(*spatial) if len(spatial) > 1 else spatial[0]
        blocks, threads = schedule.split(over, [None, _THREADS])
        schedule.bind(blocks, "blockIdx.x")
        schedule.bind(threads, "threadIdx.x")
    return schedule.mod["main"]
