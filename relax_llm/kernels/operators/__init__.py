"""One record for each operator: what tests, the check at the door, dispatchers and benchmarks are made from."""

from collections.abc import Mapping
from types import MappingProxyType

from relax_llm.kernels.operators.append import APPEND
from relax_llm.kernels.operators.argmax import ARGMAX
from relax_llm.kernels.operators.attention import ATTENTION
from relax_llm.kernels.operators.contenders import CONTENDERS
from relax_llm.kernels.operators.elementwise import ELEMENTWISE
from relax_llm.kernels.operators.lookup import EMBEDDING, LAST_TOKEN
from relax_llm.kernels.operators.matmul import MATMUL
from relax_llm.kernels.operators.norm import NORM
from relax_llm.kernels.operators.operator import Expected, Mistake, Operand, Operator
from relax_llm.kernels.operators.positions import POSITIONS, ROPE_TABLE
from relax_llm.kernels.operators.softmax import SOFTMAX
from relax_llm.kernels.problem import Problem

OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        record.name: record
        for record in (
            MATMUL,
            NORM,
            EMBEDDING,
            LAST_TOKEN,
            APPEND,
            ATTENTION,
            POSITIONS,
            ROPE_TABLE,
            ARGMAX,
            CONTENDERS,
            SOFTMAX,
            ELEMENTWISE,
        )
    }
)
"""All of them, by name."""


def operator_of(problem: Problem) -> Operator:
    """The record of a problem's operator."""
    return OPERATORS[problem.operator]


__all__ = ["OPERATORS", "Expected", "Mistake", "Operand", "Operator", "operator_of"]
