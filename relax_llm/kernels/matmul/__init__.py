"""Matrix products: the problem, its definition and reference, and the kernels that ship for it."""

from relax_llm.kernels.matmul.problem import Matmul, arguments, definition, reference

__all__ = ["Matmul", "arguments", "definition", "reference"]
