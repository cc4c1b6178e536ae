"""Building blocks of architectures: what a model file imports, beside `tvm.relax.frontend.nn`."""

from relax_llm.layers.attention import Attention
from relax_llm.layers.basic import Conv1D, Embedding, LayerNorm, Linear, RMSNorm, activation, concat
from relax_llm.layers.decoder import Decoder
from relax_llm.layers.fields import ACTIVATIONS, Fields
from relax_llm.layers.rope import Rope
from relax_llm.layers.step import Step

__all__ = [
    "ACTIVATIONS",
    "Attention",
    "Conv1D",
    "Decoder",
    "Embedding",
    "Fields",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "Rope",
    "Step",
    "activation",
    "concat",
]
