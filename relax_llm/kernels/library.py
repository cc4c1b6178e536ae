"""The kernels that ship, by operator."""

from collections.abc import Callable
from typing import Any

from tvm.tirx import PrimFunc

from relax_llm.kernels import attention, cache, lookup, norm, positions
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul import Matmul
from relax_llm.kernels.matmul.tiled import tiled
from relax_llm.kernels.problem import Problem

_BUILD: dict[type[Problem], Callable[[Any, Machine], PrimFunc]] = {
    attention.Attention: attention.attention,
    cache.Append: cache.append,
    lookup.Embedding: lookup.embedding,
    lookup.LastToken: lookup.last_token,
    Matmul: tiled,
    norm.Norm: norm.norm,
    positions.Positions: positions.positions,
    positions.RopeTable: positions.rope_table,
}


def build(problem: Problem, machine: Machine) -> PrimFunc:
    """The kernel that solves a problem on a machine."""
    return _BUILD[type(problem)](problem, machine)
