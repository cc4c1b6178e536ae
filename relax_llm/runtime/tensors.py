"""The tensors of a call that have names: caches and weights."""

from collections.abc import Sequence
from typing import Any

from relax_llm.artifact.kv_cache import cache_tensors
from relax_llm.artifact.manifest import Manifest


def tensor_names(manifest: Manifest) -> list[str]:
    """The names of all caches, then of all weights, in the order of the functions' arguments."""
    caches = [
        f"{layer.site}.{tensor.name}"
        for layer in manifest.caches
        for tensor in cache_tensors(layer.format, 1, layer.kv_heads, 1, layer.head_dim)
    ]
    return caches + [weight.name for weight in manifest.weights]


def named_tensors(manifest: Manifest, arguments: Sequence[Any]) -> dict[str, Any]:
    """What a function is called with, by name.

    Args:
        manifest: Has the names.
        arguments: Token ids, kv_len, caches and weights; or others, none of which has a name.
    """
    if len(arguments) != 4:  # greedy is given logits alone
        return {}
    _, _, caches, weights = arguments
    return dict(zip(tensor_names(manifest), [*caches, *weights], strict=True))
