"""The first pass: trace an architecture into a module with one function for each way to call a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import IRModule, ir, relax, tirx
from tvm.relax.frontend import nn

from relax_llm.artifact.kv_cache import cache_tensors
from relax_llm.errors import ArchitectureError, RelaxLLMError
from relax_llm.kernels.argmax import Argmax
from relax_llm.kernels.lookup import LastToken
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.problem import Problem
from relax_llm.layers.decoder import Decoder, attention_layers
from relax_llm.layers.step import Step


@dataclass(frozen=True)
class Entry:
    """A function of the compiled module.

    All take token_ids [batch, seq] int32, kv_len (a shape of one number), the caches and the weights.

    Attributes:
        name: Its name.
        seq: Fixed number of query tokens, or None where it is symbolic.
        finish: From hidden states to what is returned.
    """

    name: str
    seq: int | None
    finish: Callable[[Decoder, nn.Tensor, Step], nn.Tensor]


def _last(decoder: Decoder, hidden: nn.Tensor, step: Step) -> nn.Tensor:
    width = hidden.shape[-1]
    return decoder.logits(step.launch(LastToken(width), [hidden], [step.batch, 1, width]))


ENTRIES = (
    Entry("prefill", None, _last),  # logits of the last token: [batch, 1, vocab]
    Entry("decode", 1, lambda decoder, hidden, _: decoder.logits(hidden)),  # [batch, 1, vocab]
    Entry("logits", None, lambda decoder, hidden, _: decoder.logits(hidden)),  # [batch, seq, vocab]
    Entry("hidden", None, lambda _decoder, hidden, _: hidden),  # [batch, seq, hidden]
)

CACHES = "relax_llm.caches"
"""Function attribute: how many parameters after token_ids and kv_len are caches; weights follow.

`greedy`, which is a function of logits alone, has none of these, and not this attribute.
"""


def export(decoder: Decoder, machine: Machine, kv_cache: str = "f32") -> IRModule:
    """Trace a decoder.

    Each entry has the parameters token_ids, kv_len, then the tensors of every attention layer's cache, such as
    `layers.3.self_attn.k_cache`, then every weight under the checkpoint's name. Beside them stands `greedy`: logits
    [batch, seq, vocab] -> the likeliest tokens [batch, seq, 1] int32.

    Args:
        decoder: The model.
        machine: What kernels are generated for.
        kv_cache: Format of the caches; a key of `CACHE_DTYPES`.

    Raises:
        ArchitectureError: A layer's shapes do not fit together.
    """
    builder = relax.BlockBuilder()
    sites = attention_layers(decoder)
    parameters = list(decoder.named_parameters())
    kernels: dict[Problem, ir.GlobalVar] = {}
    for entry in ENTRIES:
        batch, kv_len, tiles = (tirx.Var(name, "int64") for name in ("batch", "kv_len", "tiles"))
        seq: Any = entry.seq or tirx.Var("seq", "int64")
        token_ids = relax.Var("token_ids", relax.TensorType([batch, seq], "int32"))
        length = relax.Var("kv_len", relax.ShapeType([kv_len]))
        caches = {}
        for site, layer in sites.items():
            layer.cache = kv_cache
            caches[site] = [
                relax.Var(f"{site}.{tensor.name}", relax.TensorType(list(tensor.shape), tensor.dtype))
                for tensor in cache_tensors(kv_cache, batch, layer.kv_heads, tiles, layer.head_dim)
            ]
        weights = []
        for name, parameter in parameters:
            weights.append(relax.Var(name, relax.TensorType(list(parameter.shape), parameter.dtype)))
            parameter._expr = weights[-1]
        flat = [tensor for cache in caches.values() for tensor in cache]
        step = Step(batch, seq, kv_len, caches, machine, kernels)
        with builder.function(entry.name, [token_ids, length, *flat, *weights], attrs={CACHES: len(flat)}):
            with builder.dataflow():
                try:
                    hidden = decoder.hidden_states(nn.Tensor(_expr=token_ids), step)
                    result = entry.finish(decoder, hidden, step)
                    output = builder.emit_output(result._expr)
                except RelaxLLMError:
                    raise
                except Exception as error:  # the code is the user's
                    raise ArchitectureError(f"{type(decoder).__name__} cannot be traced: {error}") from error
            builder.emit_func_output(output)
    _greedy(builder, decoder.vocab_size, machine, kernels)
    return builder.get()


def _greedy(
    builder: relax.BlockBuilder, vocab_size: int, machine: Machine, kernels: dict[Problem, ir.GlobalVar]
) -> None:
    batch, seq = (tirx.Var(name, "int64") for name in ("batch", "seq"))
    logits = relax.Var("logits", relax.TensorType([batch, seq, vocab_size], "float32"))
    step = Step(batch, seq, seq, {}, machine, kernels)
    with builder.function("greedy", [logits]):
        with builder.dataflow():
            result = step.launch(Argmax(vocab_size), [logits], [batch, seq, 1], "int32")
            output = builder.emit_output(result._expr)
        builder.emit_func_output(output)
