"""What every decoder shares; an architecture is a subclass with two methods."""

from collections.abc import Iterator
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from relax_llm.layers.attention import Attention
from relax_llm.layers.fields import Fields
from relax_llm.layers.step import Step


class Decoder(nn.Module):
    """A causal language model.

    A subclass declares its layers in `__init__(config)` under the checkpoint's own names, and sets `vocab_size` and
    `context_length`. Entry points (prefill, decode, ...), cache tensors, weight binding and compilation are made from
    these by `relax_llm.compile`.

    Attributes:
        model_types: Values of config.json's model_type that this architecture serves.
        vocab_size: Rows of the logits.
        context_length: The longest sequence the model is made for.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    vocab_size: int
    context_length: int

    def __init__(self, config: Fields) -> None:
        """Declare the layers."""
        raise NotImplementedError

    def hidden_states(self, token_ids: nn.Tensor, step: Step) -> nn.Tensor:
        """Run all layers and the final norm: [batch, seq] int32 -> [batch, seq, hidden]."""
        raise NotImplementedError

    def logits(self, hidden: nn.Tensor) -> nn.Tensor:
        """Project hidden states on the vocabulary: [batch, n, hidden] -> [batch, n, vocab]."""
        raise NotImplementedError

    @classmethod
    def rename(cls, name: str) -> str | None:
        """The parameter that a tensor of the checkpoint belongs to; None for tensors that are no parameters."""
        return name


def attention_layers(decoder: Decoder) -> dict[str, Attention]:
    """Every attention layer by its site, `layers.3.self_attn`, in order; gives each layer its site."""
    found = {}
    for path, module in _modules(decoder, ""):
        if isinstance(module, Attention):
            module.site = site_of(path.rpartition(".")[0] or path)
            found[module.site] = module
    return found


def site_of(path: str) -> str:
    """The stable id of a place in the model: its path in the checkpoint without the model's own prefix."""
    for prefix in ("model.", "transformer."):
        path = path.removeprefix(prefix)
    return path


def site_of_weight(name: str) -> str:
    """The place that a weight or cache belongs to; one that is in no layer is a place of its own."""
    return site_of(name.rpartition(".")[0] or name)


def site_of_last_token(made: str) -> str:
    """The place where the last token of what is made at a site is chosen, beside it; empty for a site in no module."""
    module = made.rpartition(".")[0]
    return module and f"{module}.last_token"


def _modules(root: Any, path: str) -> Iterator[tuple[str, nn.Module]]:
    children: Iterator[tuple[str, Any]]
    if isinstance(root, nn.ModuleList):
        children = ((str(index), child) for index, child in enumerate(root))
    elif isinstance(root, nn.ModuleDict):
        children = iter(root.items())
    else:
        children = iter(vars(root).items())
    for name, child in children:
        if isinstance(child, nn.Module):
            here = f"{path}.{name}" if path else name
            yield here, child
            yield from _modules(child, here)
