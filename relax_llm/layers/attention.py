"""Causal self-attention over a KV cache of plain tensors."""

from tvm.relax.frontend import nn

from relax_llm.errors import ArchitectureError
from relax_llm.kernels.attention import Attention as AttentionProblem
from relax_llm.kernels.cache import Append
from relax_llm.layers.rope import Rope
from relax_llm.layers.step import Step


class Attention(nn.Module):
    """Append this step's keys and values to the cache, then attend to all of it.

    Two launches: `append` (which also rotates) and `attention`. The module's place in the tree names its cache.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        rope: Rope | None = None,
        window: int | None = None,
        scale: float | None = None,
    ) -> None:
        """Describe the attention of one layer.

        Args:
            heads: Query heads.
            kv_heads: Key and value heads, a divisor of heads.
            head_dim: Channels of a head.
            rope: Rotary embedding of queries and keys, if any.
            window: How many positions back a query sees, itself included; None for all.
            scale: Factor on the scores; None for head_dim ** -0.5.
        """
        if heads % kv_heads:
            raise ArchitectureError(
                f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads evenly."
            )
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rope = rope
        self.window = window
        self.scale = head_dim**-0.5 if scale is None else scale
        self.site = ""
        self.cache = "f32"  # the caches' format, which whoever traces the model sets

    def forward(self, qkv: nn.Tensor, step: Step) -> nn.Tensor:
        """Attend.

        Args:
            qkv: Queries, keys and values of all heads: [batch, seq, (heads + 2 * kv_heads) * head_dim].
            step: The step being traced.

        Returns:
            [batch, seq, heads * head_dim].
        """
        cache = step.caches[self.site]
        append = Append(
            self.heads, self.kv_heads, self.head_dim, rope=self.rope is not None, cache=self.cache
        )
        tables = [step.rope(self.rope.table)] if self.rope else []
        first = 1 + len(tables)
        queries = step.launch(
            append,
            [qkv, *tables, *cache, step.kv_len],
            [step.batch, step.seq, self.heads, self.head_dim],
            in_place=range(first, first + len(cache)),
        )
        attend = AttentionProblem(
            self.heads, self.kv_heads, self.head_dim, self.scale, self.window, self.cache
        )
        shape = [step.batch, step.seq, self.heads * self.head_dim]
        return step.launch(attend, [queries, *cache, step.kv_len], shape)
