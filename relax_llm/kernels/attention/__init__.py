"""Causal attention over the KV cache: the problem, and the kernel that ships for it."""

from relax_llm.kernels.attention.problem import Attention

__all__ = ["Attention"]
