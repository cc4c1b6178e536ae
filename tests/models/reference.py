"""Tiny random checkpoints written with transformers, and what transformers (float32, eager) makes of them.

A calling sequence is the tuple of the numbers of tokens passed in each call: (300, 1, 1) is a prefill of
300 tokens and two decode steps. For all models but one kind it does not change the answer, so the logits
of one forward over the longest sequence serve every prompt length. The exception is `dynamic` rope.
There transformers computes the frequencies in each call from the length of the sequence at the end of
that call (or from max_position_embeddings while that is longer), for the queries and keys of that call;
keys that are in the cache stay as they were rotated. So the answer is a function of the calling
sequence, and both sides must be run with the same one. One more thing is not: transformers keeps the
frequencies of the longest sequence it has seen for later, shorter sequences, as long as those have at
least max_position_embeddings tokens. That is state from another conversation; `Reference` removes it
before each sequence.
"""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from relax_llm.finding.torch_model import with_cache

from .configurations import TOTAL

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from .configurations import Configuration

    Array = npt.NDArray[Any]

SCORE_SPREAD = 2.0
"""Standard deviation of attention scores before softmax: decided, not so sharp that rounding grows."""

MLP_GAIN = 3.0
"""What the MLP counts beside the residual: enough that the two forms of GELU can be told apart."""


def token_ids(configuration: Configuration, batch: int = 3, length: int = TOTAL) -> Array:
    """Return random int64 ids of shape [batch, length], the first and last of the vocabulary among them."""
    vocab = configuration.settings["vocab_size"]
    ids = np.random.default_rng(zlib.crc32(configuration.name.encode())).integers(0, vocab, (batch, length))
    ids[0, 0], ids[0, 1] = vocab - 1, 0
    return ids


def _randomize(model: Any, seed: int) -> None:
    """Fill all parameters so that every one of them shows in the logits, which stay well conditioned.

    Matrices keep the variance of what passes through them, queries and keys make scores of SCORE_SPREAD,
    norm weights are spread around 1 and biases around 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Any, std: Any, mean: float = 0.0) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)

    for module in model.modules():
        if "Norm" in type(module).__name__:
            normal(module.weight, 0.3, mean=1.0)
            if getattr(module, "bias", None) is not None:
                normal(module.bias, 0.3)
        elif isinstance(module, torch.nn.Embedding):
            normal(module.weight, 0.3)
        elif isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            fan_in = module.weight.shape[1 if isinstance(module, torch.nn.Linear) else 0]
            normal(module.weight, fan_in**-0.5)
            if module.bias is not None:
                normal(module.bias, 0.3)
    for module in model.modules():
        if hasattr(module, "scaling") and hasattr(module, "head_dim"):
            gain = (SCORE_SPREAD / (module.scaling * module.head_dim**0.5)) ** 0.5
            if hasattr(module, "c_attn"):
                module.c_attn.weight[:, : 2 * module.split_size] *= gain
            else:
                module.q_proj.weight.mul_(gain)
                module.k_proj.weight.mul_(gain)
        elif type(module).__name__.endswith("MLP"):
            (module.c_proj if hasattr(module, "c_proj") else module.down_proj).weight.mul_(MLP_GAIN)
    model.tie_weights()


def write_checkpoint(configuration: Configuration, directory: Path) -> Path:
    """Write the checkpoint of a row of the table, as published ones look on disk; return its directory."""
    config = AutoConfig.for_model(configuration.model_type, **configuration.settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        _randomize(model, zlib.crc32(configuration.name.encode()))
    model.to(getattr(torch, configuration.stored))
    if configuration.shard is None:
        model.save_pretrained(directory)
    else:
        model.save_pretrained(directory, max_shard_size=configuration.shard)
    if "older config" in configuration.files:
        _write_older_config(directory / "config.json")
    if configuration.files:
        for path in sorted(directory.glob("*.safetensors")):
            _rewrite_tensors(configuration, path)
    return directory


def _write_older_config(path: Path) -> None:
    """Rewrite a config.json in the vocabulary that nearly all published checkpoints use.

    Before: {"dtype": .., "rope_parameters": {"rope_type": "linear", "rope_theta": 7000.0, "factor": 2.5}}
    After:  {"torch_dtype": .., "rope_theta": 7000.0, "rope_scaling": {"type": "linear", "factor": 2.5}}
    with fields left out where their default means the same.
    """
    config = json.loads(path.read_text())
    rope = dict(config.pop("rope_parameters"))
    kind = rope.pop("rope_type")
    config["rope_theta"] = rope.pop("rope_theta")
    if kind == "default":
        config["rope_scaling"] = None
        if config["rope_theta"] == 10000.0:
            del config["rope_theta"]
    else:
        config["rope_scaling"] = {"rope_type" if kind == "llama3" else "type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    # The two families have different defaults: as many as heads, and the 8 of Mistral 7B.
    default_kv_heads = 8 if config["model_type"] == "mistral" else config["num_attention_heads"]
    if config["num_key_value_heads"] == default_kv_heads:
        del config["num_key_value_heads"]
    if config.get("sliding_window") == 4096:
        del config["sliding_window"]
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if config.get(name) is False:
            del config[name]
    path.write_text(json.dumps(config, indent=2))


def _rewrite_tensors(configuration: Configuration, path: Path) -> None:
    """Apply the quirks that change what is inside a safetensors file."""
    tensors = load_file(path)
    settings = configuration.settings
    if "mixed dtypes" in configuration.files:
        tensors = {name: t if t.ndim == 2 else t.float() for name, t in tensors.items()}
    if "stored tied head" in configuration.files:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if "bare names" in configuration.files:
        positions = settings["n_positions"]
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        for i in range(settings["n_layer"]):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, positions, positions).tril()
    if "rotary buffers" in configuration.files:
        head_dim = settings["hidden_size"] // settings["num_attention_heads"]
        for i in range(settings["num_hidden_layers"]):
            name = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
            tensors[name] = 10000.0 ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    save_file(tensors, path, metadata={"format": "pt"})


class Reference:
    """A model of transformers in float32 with eager attention, run in any calling sequence."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.head = model.get_output_embeddings()
        rope = getattr(model.config, "rope_parameters", None) or {}
        self.is_dynamic = rope.get("rope_type") == "dynamic"
        self._known: dict[tuple[bytes, tuple[int, ...]], tuple[Array, Array]] = {}

    @classmethod
    def load(cls, directory: Path, **changed: Any) -> Reference:
        """Load a checkpoint, with settings of its config changed (`rope.x` is field x of the rope)."""
        config = AutoConfig.from_pretrained(directory)
        for name, value in changed.items():
            if name.startswith("rope."):
                config.rope_parameters[name.removeprefix("rope.")] = value
            else:
                setattr(config, name, value)
        return cls(
            AutoModelForCausalLM.from_pretrained(
                directory, config=config, dtype=torch.float32, attn_implementation="eager"
            )
        )

    def logits(self, ids: Array, calls: Sequence[int] | None = None) -> Array:
        """Return float32 logits [batch, seq, vocab] for ids [batch, seq] (or without batch, for 1-D ids).

        Args:
            ids: The whole sequence; every call's tokens are given, whatever the logits say.
            calls: The calling sequence, adding up to seq. It is followed where it matters (dynamic rope).
        """
        return self._answer(ids, calls)[0]

    def hidden(self, ids: Array, calls: Sequence[int] | None = None) -> Array:
        """Return float32 hidden states [batch, seq, hidden] after the final norm, as `logits` does."""
        return self._answer(ids, calls)[1]

    def run(self, ids: Array, calls: Sequence[int]) -> tuple[Array, Array]:
        """Run this very calling sequence on a cache; return logits and hidden states, [batch, seq, ...]."""
        assert sum(calls) == ids.shape[1], "the calls must add up to the sequence"
        self._forget_longer_sequences()
        cache = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            parts = torch.split(torch.from_numpy(ids), list(calls), dim=1)
            base = self.model.base_model
            outputs = [base(part, **with_cache(base, cache)) for part in parts]
            hidden = torch.cat([output.last_hidden_state for output in outputs], dim=1)
            return self.head(hidden).numpy(), hidden.numpy()

    def _answer(self, ids: Array, calls: Sequence[int] | None) -> tuple[Array, Array]:
        if ids.ndim == 1:
            logits, hidden = self._answer(ids[None], calls)
            return logits[0], hidden[0]
        calls = tuple(calls) if calls is not None and self.is_dynamic else (ids.shape[1],)
        key = (ids.tobytes() + bytes(str(ids.shape), "ascii"), calls)
        if key not in self._known:
            self._known[key] = self.run(ids, calls)
        return self._known[key]

    def _forget_longer_sequences(self) -> None:
        if self.is_dynamic:
            rotary = self.model.base_model.rotary_emb
            rotary.inv_freq = rotary.original_inv_freq.clone()
            rotary.max_seq_len_cached = rotary.original_max_seq_len
