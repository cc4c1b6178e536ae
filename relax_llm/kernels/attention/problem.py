"""Causal attention over the KV cache: softmax(q k^T * scale) v."""

from dataclasses import dataclass
from typing import ClassVar

from relax_llm.errors import KernelError
from relax_llm.kernels.cache import position_bytes, require_cache_format
from relax_llm.kernels.problem import Problem, require_positive


@dataclass(frozen=True)
class Attention(Problem):
    """Attention of the step's queries to the cache.

    Attributes:
        heads: Query heads; heads / kv_heads of them share each key and value head.
        kv_heads: Key and value heads.
        head_dim: Channels of a head.
        scale: Factor on the scores before the softmax.
        window: A query at position i sees positions above i - window only; None sees all.
        cache: Format of the caches. Beside "bf16" queries and softmax weights may be rounded to bf16, too, and beside
            "q8" to whole numbers of two bytes, by the largest of a query or of a block's weights times scales.
    """

    operator: ClassVar[str] = "attention"
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    cache: str = "f32"

    def __post_init__(self) -> None:
        require_positive(
            self, "heads", "kv_heads", "head_dim", *(("window",) if self.window is not None else ())
        )
        require_cache_format(self.cache)
        if self.heads % self.kv_heads:
            raise KernelError(f"{self.heads} query heads cannot share {self.kv_heads} key heads evenly.")

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def flops(self) -> str:
        return f"{4 * self.heads * self.head_dim}*batch*seq*{self._seen}"

    @property
    def bytes(self) -> str:
        cache = f"{2 * self.kv_heads * position_bytes(self.cache, self.head_dim)}*batch*kv_len"
        return f"{cache} + {8 * self.heads * self.head_dim}*batch*seq"

    @property
    def _seen(self) -> str:
        mean = "(kv_len - (seq - 1)/2)"
        return mean if self.window is None else f"min({self.window}, {mean})"
