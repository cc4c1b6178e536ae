"""The table of tiny models on which the architectures are compared with transformers.

Every row is deliberately odd: sizes that are multiples of nothing, heads that do not divide as one
would expect, settings far from their defaults. A row lists in `visible` the settings that must show in
the logits: `test_reference.py` changes each of them in the reference alone and wants to see it, so that
a model which ignores a setting cannot pass. Keys that begin with `rope.` are fields of the rope
parameters.

Rows of their own cover what a checkpoint looks like on disk (`stored`, `shard`, `files`) and ropes whose
original context is crossed: before the prompt ends, during the decode steps after a prompt of 63 or 64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

PROMPT_LENGTHS = (1, 2, 17, 63, 64, 65, 300)
DECODE_STEPS = 20
TOTAL = max(PROMPT_LENGTHS) + DECODE_STEPS

# How the files differ from what save_pretrained writes today; each occurs in published checkpoints.
FileQuirk = Literal[
    "older config",  # rope_theta and rope_scaling at top level, torch_dtype, absent or null fields
    "bare names",  # gpt2: no "transformer." prefix, attention masks stored as tensors
    "rotary buffers",  # llama 1 and 2: rotary_emb.inv_freq stored for each layer
    "stored tied head",  # lm_head.weight present although it is the embedding
    "mixed dtypes",  # matrices in bfloat16, norms and biases in float32
]


@dataclass(frozen=True)
class Configuration:
    """One tiny model: what its config.json says, how it is stored, and which settings must show."""

    name: str
    model_type: Literal["llama", "mistral", "gpt2"]
    settings: dict[str, Any]
    stored: Literal["float32", "float16", "bfloat16"] = "float32"
    shard: str | None = None
    files: tuple[FileQuirk, ...] = ()
    visible: dict[str, Any] = field(default_factory=dict)

    @property
    def is_dynamic(self) -> bool:
        """Whether the rope's frequencies depend on the length of the sequence so far."""
        return bool((self.settings.get("rope_parameters") or {}).get("rope_type") == "dynamic")

    def __str__(self) -> str:
        return self.name


def llama(
    name: str,
    *,
    hidden: int,
    heads: tuple[int, int],
    intermediate: int,
    vocab: int,
    head_dim: int | None = None,
    layers: int = 2,
    theta: float = 10000.0,
    rope: dict[str, Any] | None = None,
    context: int = 512,
    model_type: Literal["llama", "mistral"] = "llama",
    stored: Literal["float32", "float16", "bfloat16"] = "float32",
    shard: str | None = None,
    files: tuple[FileQuirk, ...] = (),
    visible: dict[str, Any] | None = None,
    **more: Any,
) -> Configuration:
    """Make a row of the llama family. `heads` is (heads, kv_heads); `context` is max_position_embeddings."""
    settings: dict[str, Any] = {
        "hidden_size": hidden,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "max_position_embeddings": context,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, **(rope or {})},
        **({} if head_dim is None else {"head_dim": head_dim}),
        **more,
    }
    return Configuration(name, model_type, settings, stored, shard, files, visible or {})


def mistral(name: str, *, window: int | None, **more: Any) -> Configuration:
    """Make a row of the mistral kind: llama without biases, with an optional sliding window."""
    return llama(name, model_type="mistral", sliding_window=window, **more)


def gpt2(
    name: str,
    *,
    embd: int,
    head: int,
    vocab: int,
    layer: int = 2,
    positions: int = 331,
    stored: Literal["float32", "float16", "bfloat16"] = "float32",
    shard: str | None = None,
    files: tuple[FileQuirk, ...] = (),
    visible: dict[str, Any] | None = None,
    **more: Any,
) -> Configuration:
    """Make a row of gpt2, in the names that its config.json uses."""
    settings: dict[str, Any] = {
        "n_embd": embd,
        "n_head": head,
        "n_layer": layer,
        "n_positions": positions,
        "vocab_size": vocab,
        **more,
    }
    return Configuration(name, "gpt2", settings, stored, shard, files, visible or {})


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 40}

# fmt: off
LLAMA: tuple[Configuration, ...] = (
    # Heads and sizes.
    llama("one-layer-one-head", hidden=36, heads=(1, 1), intermediate=77, vocab=131, layers=1,
          visible={"rope.rope_theta": 5000.0}),
    llama("one-kv-head", hidden=36, heads=(3, 1), intermediate=129, vocab=257,
          visible={"num_hidden_layers": 1}),
    llama("smollm2-like", hidden=72, heads=(9, 3), intermediate=200, vocab=1009, layers=3, theta=100000.0,
          tie_word_embeddings=True, context=8192, visible={"rope.rope_theta": 10000.0}),
    llama("six-heads-two-kv", hidden=72, heads=(6, 2), intermediate=129, vocab=257, head_dim=10),
    llama("head-dim-20-attention-bias", hidden=64, heads=(4, 4), head_dim=20, intermediate=160, vocab=131,
          attention_bias=True),
    llama("head-dim-24-mlp-bias", hidden=50, heads=(5, 5), head_dim=24, intermediate=77, vocab=257,
          mlp_bias=True),
    llama("head-dim-6-all-biases-tied", hidden=100, heads=(5, 5), head_dim=6, intermediate=129, vocab=1009,
          attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    llama("head-dim-80", hidden=72, heads=(6, 2), head_dim=80, intermediate=77, vocab=131,
          attention_bias=True),
    llama("head-dim-2-four-layers", hidden=50, heads=(5, 1), head_dim=2, intermediate=33, vocab=67, layers=4),
    llama("all-multiples-of-16", hidden=64, heads=(4, 2), intermediate=128, vocab=256),
    llama("narrow-mlp-wide-vocab", hidden=36, heads=(3, 3), intermediate=5, vocab=4099),
    # Activations and norms.
    llama("gelu-large-eps", hidden=36, heads=(3, 1), intermediate=77, vocab=257, hidden_act="gelu",
          rms_norm_eps=0.02, visible={"rms_norm_eps": 0.01, "hidden_act": "gelu_pytorch_tanh"}),
    llama("gelu-tanh", hidden=50, heads=(5, 5), intermediate=129, vocab=131, hidden_act="gelu_pytorch_tanh",
          rms_norm_eps=1e-3, visible={"hidden_act": "gelu", "rms_norm_eps": 1e-5}),
    llama("relu", hidden=72, heads=(9, 3), intermediate=77, vocab=257, hidden_act="relu",
          visible={"hidden_act": "silu"}),
    # Rope scalings; the longer prompts cross the original context.
    llama("linear", hidden=64, heads=(4, 2), intermediate=77, vocab=131,
          rope={"rope_type": "linear", "factor": 4.0}, visible={"rope.factor": 3.9}),
    llama("linear-fraction-older-config", hidden=50, heads=(5, 1), intermediate=129, vocab=257, theta=7000.0,
          rope={"rope_type": "linear", "factor": 2.5}, files=("older config",),
          visible={"rope.factor": 2.0, "rope.rope_theta": 10000.0}),
    llama("llama3", hidden=64, heads=(4, 2), head_dim=24, intermediate=129, vocab=257, theta=500000.0,
          tie_word_embeddings=True, rope={**LLAMA3, "original_max_position_embeddings": 64},
          visible={"rope.factor": 4.0, "rope.original_max_position_embeddings": 128,
                   "rope.high_freq_factor": 8.0, "rope.low_freq_factor": 2.0}),
    llama("llama3-short-older-config", hidden=72, heads=(6, 2), head_dim=32, intermediate=77, vocab=131,
          theta=10000.0,
          rope={**LLAMA3, "factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 2.5,
                "original_max_position_embeddings": 50}, files=("older config",),
          visible={"rope.factor": 8.0, "rope.low_freq_factor": 1.0, "rope.high_freq_factor": 4.0}),
    llama("dynamic", hidden=64, heads=(4, 2), intermediate=77, vocab=257, context=64,
          rope={"rope_type": "dynamic", "factor": 8.0},
          visible={"rope.factor": 7.0, "max_position_embeddings": 70}),
    llama("dynamic-odd-older-config", hidden=36, heads=(3, 1), head_dim=10, intermediate=129, vocab=131,
          theta=3000.0,
          context=81, rope={"rope_type": "dynamic", "factor": 4.0}, files=("older config",),
          visible={"rope.factor": 3.0, "max_position_embeddings": 90}),
    llama("yarn", hidden=64, heads=(4, 4), head_dim=32, intermediate=77, vocab=131, rope=YARN,
          visible={"rope.factor": 6.0, "rope.original_max_position_embeddings": 100, "rope.beta_fast": 1.5,
                   "rope.beta_slow": 0.25, "rope.attention_factor": 1.0}),
    llama("yarn-attention-factor", hidden=72, heads=(9, 3), head_dim=20, intermediate=129, vocab=257,
          rope={**YARN, "attention_factor": 0.7}, visible={"rope.attention_factor": None}),
    llama("yarn-mscale-betas", hidden=50, heads=(5, 1), head_dim=24, intermediate=77, vocab=131,
          theta=50000.0,
          rope={**YARN, "mscale": 0.8, "mscale_all_dim": 0.3, "beta_fast": 1.5, "beta_slow": 0.2},
          visible={"rope.mscale": 0.5, "rope.mscale_all_dim": 0.8, "rope.beta_fast": 32.0,
                   "rope.beta_slow": 1.0}),
    llama("yarn-untruncated", hidden=36, heads=(3, 1), head_dim=24, intermediate=129, vocab=257,
          rope={**YARN, "truncate": False}, visible={"rope.truncate": True}),
    llama("yarn-older-config", hidden=64, heads=(4, 2), head_dim=20, intermediate=77, vocab=257,
          theta=20000.0,
          rope={**YARN, "factor": 16.0, "mscale": 0.8}, files=("older config",),
          visible={"rope.factor": 8.0, "rope.rope_theta": 10000.0}),
    # How checkpoints are stored.
    llama("float16", hidden=72, heads=(9, 3), intermediate=129, vocab=257, stored="float16",
          attention_bias=True),
    llama("bfloat16-sharded", hidden=100, heads=(5, 5), intermediate=77, vocab=1009, layers=3,
          stored="bfloat16",
          shard="40KB", tie_word_embeddings=True),
    llama("mixed-dtypes", hidden=50, heads=(5, 1), intermediate=129, vocab=131, stored="bfloat16",
          files=("mixed dtypes",), mlp_bias=True),
    llama("llama-1-like", hidden=64, heads=(4, 4), intermediate=172, vocab=257, stored="float16",
          files=("older config", "rotary buffers"), rms_norm_eps=1e-6),
    llama("stored-tied-head", hidden=36, heads=(3, 3), intermediate=77, vocab=131, tie_word_embeddings=True,
          files=("stored tied head",)),
    llama("long-context", hidden=36, heads=(3, 3), head_dim=80, intermediate=77, vocab=257, layers=4,
          context=131072,
          theta=1000000.0, visible={"rope.rope_theta": 10000.0}),
)

MISTRAL: tuple[Configuration, ...] = (
    mistral("window-5", window=5, hidden=64, heads=(4, 2), intermediate=77, vocab=131,
            visible={"sliding_window": 6}),
    mistral("window-16-one-layer", window=16, hidden=36, heads=(3, 1), intermediate=129, vocab=257, layers=1,
            visible={"sliding_window": 15}),
    mistral("window-64", window=64, hidden=72, heads=(6, 2), head_dim=20, intermediate=77, vocab=257,
            tie_word_embeddings=True, visible={"sliding_window": 65}),
    mistral("window-2", window=2, hidden=50, heads=(5, 5), intermediate=77, vocab=67,
            visible={"sliding_window": 3}),
    mistral("window-longer-than-prompts", window=4096, hidden=72, heads=(9, 3), intermediate=129, vocab=131,
            hidden_act="gelu_pytorch_tanh", context=32768, visible={"sliding_window": 300}),
    mistral("no-window", window=None, hidden=100, heads=(5, 5), head_dim=24, intermediate=77, vocab=1009,
            theta=1000000.0, visible={"sliding_window": 300}),
    mistral("window-33-bfloat16-older-config", window=33, hidden=64, heads=(4, 1), intermediate=129,
            vocab=257,
            stored="bfloat16", shard="40KB", files=("older config",), visible={"sliding_window": 32}),
    mistral("defaults-left-out", window=4096, hidden=64, heads=(16, 8), head_dim=6, intermediate=77, vocab=67,
            files=("older config",), visible={"sliding_window": 300}),
    mistral("window-100-yarn", window=100, hidden=64, heads=(4, 2), head_dim=24, intermediate=77, vocab=131,
            rope=YARN,
            visible={"sliding_window": 99, "rope.factor": 6.0}),
)

GPT2: tuple[Configuration, ...] = (
    gpt2("gpt2-plain", embd=64, head=4, vocab=257, visible={"n_layer": 1}),
    gpt2("gpt2-one-layer-one-head", embd=36, head=1, layer=1, vocab=131),
    gpt2("gpt2-three-heads-inner", embd=36, head=3, n_inner=77, vocab=131, layer=3, positions=512),
    gpt2("gpt2-five-heads-gelu", embd=50, head=5, vocab=1009, activation_function="gelu",
         visible={"activation_function": "gelu_new"}),
    gpt2("gpt2-seven-heads-relu", embd=70, head=7, n_inner=129, vocab=257, activation_function="relu",
         visible={"activation_function": "gelu"}),
    gpt2("gpt2-large-eps", embd=72, head=9, vocab=131, layer_norm_epsilon=0.02,
         visible={"layer_norm_epsilon": 0.01, "activation_function": "gelu"}),
    gpt2("gpt2-inverse-layer-scale", embd=64, head=2, vocab=131, layer=3,
         scale_attn_by_inverse_layer_idx=True,
         visible={"scale_attn_by_inverse_layer_idx": False}),
    gpt2("gpt2-unscaled", embd=50, head=5, vocab=257, scale_attn_weights=False,
         visible={"scale_attn_weights": True}),
    gpt2("gpt2-unscaled-inverse-upcast", embd=36, head=3, vocab=131, layer=3, scale_attn_weights=False,
         scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True,
         visible={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}),
    gpt2("gpt2-untied", embd=72, head=6, vocab=257, tie_word_embeddings=False),
    gpt2("gpt2-float16-bare-names", embd=64, head=4, vocab=257, stored="float16", files=("bare names",)),
    gpt2("gpt2-bfloat16-sharded", embd=100, head=5, vocab=1009, n_inner=129, stored="bfloat16", shard="60KB"),
)
# fmt: on

GRID: tuple[Configuration, ...] = (*LLAMA, *MISTRAL, *GPT2)
BY_NAME: dict[str, Configuration] = {configuration.name: configuration for configuration in GRID}
