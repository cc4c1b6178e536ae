"""The Llama family: Llama 1 to 3.x, TinyLlama, SmolLM2, Mistral (Touvron et al. 2023; Jiang et al. 2023)."""

from typing import ClassVar

from tvm.relax.frontend import nn

from relax_llm import layers


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: layers.Fields) -> None:
        """Declare the projections."""
        hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
        mistral = (
            config.text("model_type", "") == "mistral"
        )  # its config leaves out fields at defaults of its own
        kv_heads = config.integer("num_key_value_heads", 8 if mistral else heads)
        head_dim = config.integer("head_dim", hidden // heads)
        bias = not mistral and config.flag("attention_bias", False)
        self.q_proj = layers.Linear(hidden, heads * head_dim, bias=bias)
        self.k_proj = layers.Linear(hidden, kv_heads * head_dim, bias=bias)
        self.v_proj = layers.Linear(hidden, kv_heads * head_dim, bias=bias)
        self.o_proj = layers.Linear(heads * head_dim, hidden, bias=bias)
        rope = layers.Rope.from_config(config, head_dim, context_length=131072 if mistral else 2048)
        window = config.optional_integer("sliding_window", 4096) if mistral else None
        self.attention = layers.Attention(heads, kv_heads, head_dim, rope=rope, window=window)

    def forward(self, x: nn.Tensor, step: layers.Step) -> nn.Tensor:
        """[batch, seq, hidden] -> the same."""
        qkv = layers.concat(
            [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        )  # [batch, seq, (heads + 2 kv_heads) d]
        return self.o_proj(self.attention(qkv, step))


class LlamaMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: layers.Fields) -> None:
        """Declare the projections."""
        hidden, intermediate = config.integer("hidden_size"), config.integer("intermediate_size")
        bias = config.flag("mlp_bias", False)
        self.gate_proj = layers.Linear(hidden, intermediate, bias=bias)
        self.up_proj = layers.Linear(hidden, intermediate, bias=bias)
        self.down_proj = layers.Linear(intermediate, hidden, bias=bias)
        self.activation = config.choice("hidden_act", "silu", layers.ACTIVATIONS)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """[batch, seq, hidden] -> the same."""
        return self.down_proj(layers.activation(self.activation, self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    """Attention, then MLP, each behind a norm and around a residual."""

    def __init__(self, config: layers.Fields) -> None:
        """Declare the layers."""
        hidden, eps = config.integer("hidden_size"), config.number("rms_norm_eps", 1e-6)
        self.input_layernorm = layers.RMSNorm(hidden, eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = layers.RMSNorm(hidden, eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x: nn.Tensor, step: layers.Step) -> nn.Tensor:
        """[batch, seq, hidden] -> the same."""
        x = x + self.self_attn(self.input_layernorm(x), step)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Embedding, blocks, norm."""

    def __init__(self, config: layers.Fields) -> None:
        """Declare the layers."""
        hidden = config.integer("hidden_size")
        self.embed_tokens = layers.Embedding(config.integer("vocab_size"), hidden)
        self.layers = nn.ModuleList([LlamaBlock(config) for _ in range(config.integer("num_hidden_layers"))])
        self.norm = layers.RMSNorm(hidden, config.number("rms_norm_eps", 1e-6))

    def forward(self, token_ids: nn.Tensor, step: layers.Step) -> nn.Tensor:
        """[batch, seq] int32 -> [batch, seq, hidden]."""
        x = self.embed_tokens(token_ids)
        for block in self.layers:
            x = block(x, step)
        return self.norm(x)


class Llama(layers.Decoder):
    """A Llama with its head, tied to the embedding or not."""

    model_types: ClassVar[tuple[str, ...]] = ("llama", "mistral")

    def __init__(self, config: layers.Fields) -> None:
        """Declare the layers."""
        self.vocab_size = config.integer("vocab_size")
        self.model = LlamaModel(config)
        tied = config.flag("tie_word_embeddings", False)
        self.lm_head = None if tied else layers.Linear(config.integer("hidden_size"), self.vocab_size)
        self.context_length = self.model.layers[0].self_attn.attention.rope.context_length

    def hidden_states(self, token_ids: nn.Tensor, step: layers.Step) -> nn.Tensor:
        """[batch, seq] int32 -> [batch, seq, hidden]."""
        return self.model(token_ids, step)

    def logits(self, hidden: nn.Tensor) -> nn.Tensor:
        """[batch, n, hidden] -> [batch, n, vocab]."""
        return self.model.embed_tokens.as_head(hidden) if self.lm_head is None else self.lm_head(hidden)

    @classmethod
    def rename(cls, name: str) -> str | None:
        """Old checkpoints store the rotary frequencies, which are computed here; some leave out the `model.` prefix."""
        if name.endswith("rotary_emb.inv_freq"):
            return None
        return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
