"""How GGUF stores each architecture's tensors: under which name, permuted or transposed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LAYOUTS", "Layout", "Placement"]

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_TOP = re.compile(r"(\w+)\.(weight|bias)")


@dataclass(frozen=True)
class Placement:
    """What to do to a stored tensor to have it as Hugging Face does.

    Attributes:
        name: The Hugging Face name.
        heads: When not 0, the rows of each of so many heads are interleaved (even, odd) by llama.cpp, and
            have to be put back into halves.
        transpose: Stored as [outputs, inputs] where Hugging Face has [inputs, outputs].
    """

    name: str
    heads: int = 0
    transpose: bool = False


@dataclass(frozen=True)
class Layout:
    """The names of one architecture.

    Attributes:
        top: GGUF's name to Hugging Face's module, for tensors outside the blocks.
        block: The same inside block `i`; the module is relative to the block.
        block_prefix: Hugging Face's module of block `i`, with `{}` for it.
        permuted: GGUF's names of matrices with interleaved rows, to the config field that counts their heads.
        transposed: GGUF's names of linears that Hugging Face keeps transposed.
        ignored: Tensors that hold nothing which the config does not say.
    """

    top: Mapping[str, str]
    block: Mapping[str, str]
    block_prefix: str
    permuted: Mapping[str, str]
    transposed: frozenset[str]
    ignored: frozenset[str]

    def place(self, name: str, config: Mapping[str, Any]) -> Placement | None:
        """Where a tensor belongs; None when it is ignored.

        An unknown name is kept as it is, so that a model that has no use for it can say so.
        """
        if match := _BLOCK.fullmatch(name):
            number, part, kind = match.groups()
            if part in self.ignored:
                return None
            if part in self.block:
                prefix = self.block_prefix.format(int(number))
                return Placement(
                    f"{prefix}.{self.block[part]}.{kind}",
                    heads=config[self.permuted[part]] if part in self.permuted else 0,
                    transpose=kind == "weight" and part in self.transposed,
                )
        elif match := _TOP.fullmatch(name):
            part, kind = match.groups()
            if part in self.ignored:
                return None
            if part in self.top:
                return Placement(f"{self.top[part]}.{kind}")
        return Placement(name)


LAYOUTS: Mapping[str, Layout] = {
    "llama": Layout(
        top={"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
        block={
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        },
        block_prefix="model.layers.{}",
        permuted={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
        transposed=frozenset(),
        ignored=frozenset({"rope_freqs", "attn_rot_embd"}),
    ),
    "gpt2": Layout(
        top={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        block={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        block_prefix="transformer.h.{}",
        permuted={},
        transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
        ignored=frozenset(),
    ),
}
"""By `general.architecture`."""
