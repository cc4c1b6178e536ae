"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each part, one fused projection for q, k and v."""

from typing import ClassVar

from tvm.relax.frontend import nn

from relax_llm import layers


class GPT2Attention(nn.Module):
    """Multi-head attention."""

    def __init__(self, config: layers.Fields, layer: int) -> None:
        """Declare the projections."""
        hidden, heads = config.integer("n_embd"), config.integer("n_head")
        self.c_attn = layers.Conv1D(hidden, 3 * hidden)
        self.c_proj = layers.Conv1D(hidden, hidden)
        head_dim = hidden // heads
        scale = head_dim**-0.5 if config.flag("scale_attn_weights", True) else 1.0
        if config.flag("scale_attn_by_inverse_layer_idx", False):
            scale /= layer + 1
        self.attention = layers.Attention(heads, heads, head_dim, scale=scale)

    def forward(self, x: nn.Tensor, step: layers.Step) -> nn.Tensor:
        """[batch, seq, hidden] -> the same."""
        return self.c_proj(self.attention(self.c_attn(x), step))


class GPT2MLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: layers.Fields) -> None:
        """Declare the projections."""
        hidden = config.integer("n_embd")
        inner = config.integer("n_inner", 4 * hidden)
        self.c_fc = layers.Conv1D(hidden, inner)
        self.c_proj = layers.Conv1D(inner, hidden)
        self.activation = config.choice("activation_function", "gelu_new", layers.ACTIVATIONS)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """[batch, seq, hidden] -> the same."""
        return self.c_proj(layers.activation(self.activation, self.c_fc(x)))


class GPT2Block(nn.Module):
    """Attention, then MLP, each behind a norm and around a residual."""

    def __init__(self, config: layers.Fields, layer: int) -> None:
        """Declare the layers."""
        hidden, eps = config.integer("n_embd"), config.number("layer_norm_epsilon", 1e-5)
        self.ln_1 = layers.LayerNorm(hidden, eps)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = layers.LayerNorm(hidden, eps)
        self.mlp = GPT2MLP(config)

    def forward(self, x: nn.Tensor, step: layers.Step) -> nn.Tensor:
        """[batch, seq, hidden] -> the same."""
        x = x + self.attn(self.ln_1(x), step)
        return x + self.mlp(self.ln_2(x))


class GPT2Model(nn.Module):
    """Token and position embeddings, blocks, norm."""

    def __init__(self, config: layers.Fields) -> None:
        """Declare the layers."""
        hidden = config.integer("n_embd")
        self.wte = layers.Embedding(config.integer("vocab_size"), hidden)
        self.wpe = layers.Embedding(config.integer("n_positions", 1024), hidden)
        self.h = nn.ModuleList([GPT2Block(config, layer) for layer in range(config.integer("n_layer"))])
        self.ln_f = layers.LayerNorm(hidden, config.number("layer_norm_epsilon", 1e-5))

    def forward(self, token_ids: nn.Tensor, step: layers.Step) -> nn.Tensor:
        """[batch, seq] int32 -> [batch, seq, hidden]."""
        x = self.wte(token_ids) + self.wpe(step.positions())  # [batch, seq, hidden] + [1, seq, hidden]
        for block in self.h:
            x = block(x, step)
        return self.ln_f(x)


class GPT2(layers.Decoder):
    """GPT-2 with its head, tied to the token embedding."""

    model_types: ClassVar[tuple[str, ...]] = ("gpt2",)

    def __init__(self, config: layers.Fields) -> None:
        """Declare the layers."""
        self.vocab_size = config.integer("vocab_size")
        self.context_length = config.integer("n_positions", 1024)
        self.transformer = GPT2Model(config)
        tied = config.flag("tie_word_embeddings", True)
        self.lm_head = None if tied else layers.Linear(config.integer("n_embd"), self.vocab_size)

    def hidden_states(self, token_ids: nn.Tensor, step: layers.Step) -> nn.Tensor:
        """[batch, seq] int32 -> [batch, seq, hidden]."""
        return self.transformer(token_ids, step)

    def logits(self, hidden: nn.Tensor) -> nn.Tensor:
        """[batch, n, hidden] -> [batch, n, vocab]."""
        return self.transformer.wte.as_head(hidden) if self.lm_head is None else self.lm_head(hidden)

    @classmethod
    def rename(cls, name: str) -> str | None:
        """The original checkpoint has no `transformer.` prefix; causal masks are stored but are no parameters."""
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            return None
        return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
