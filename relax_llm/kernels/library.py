"""The kernels that ship, by operator."""

from collections.abc import Callable
from typing import Any

from tvm.tirx import PrimFunc

from relax_llm.artifact.kv_cache import CACHE_DTYPES
from relax_llm.kernels import argmax, cache, contenders, elementwise, lookup, norm, positions, softmax
from relax_llm.kernels.attention import Attention
from relax_llm.kernels.attention.streaming import streaming
from relax_llm.kernels.gpu import gpu_kernel
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul.family import matmul_kernels
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.matmul.tiled import tiled
from relax_llm.kernels.problem import Problem
from relax_llm.plan.kernel import Kernel

_BUILD: dict[type[Problem], tuple[str, Callable[[Any, Machine], PrimFunc]]] = {
    argmax.Argmax: ("by_lane", argmax.argmax),
    Attention: ("streaming", streaming),
    cache.Append: ("by_position", cache.append),
    contenders.Contenders: ("by_panel", contenders.contenders),
    elementwise.Elementwise: ("by_row", elementwise.elementwise),
    lookup.Embedding: ("by_row", lookup.embedding),
    lookup.LastToken: ("by_sequence", lookup.last_token),
    Matmul: ("tiled", tiled),
    norm.Norm: ("by_row", norm.norm),
    positions.Positions: ("in_order", positions.positions),
    positions.RopeTable: ("by_position", positions.rope_table),
    softmax.Softmax: ("by_piece", softmax.softmax),
}
"""For each kind of problem the kernel that serves every size, with the operands that the model passes."""


def build(problem: Problem, machine: Machine) -> PrimFunc:
    """The kernel that solves a problem at every size, as the model calls it."""
    return gpu_kernel(problem, machine) if machine.is_gpu else _BUILD[type(problem)][1](problem, machine)


def built_in(problem: Problem, machine: Machine) -> list[Kernel]:
    """The kernels that ship for a problem's operator, in the order of their precedence."""
    if machine.is_gpu:
        return [Kernel("dlight", problem.operator, "primfunc", lambda p: gpu_kernel(p, machine))]
    if isinstance(problem, Matmul):
        return matmul_kernels(machine)
    name, make = _BUILD[type(problem)]
    caches = frozenset(CACHE_DTYPES)
    return [Kernel(name, problem.operator, "primfunc", lambda p: make(p, machine), weights=caches)]
