"""A checkpoint with channels of very different sizes, as large models have them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ..artifact.checkpoints import LLAMA

if TYPE_CHECKING:
    from pathlib import Path

WIDE: dict[str, Any] = {
    **LLAMA,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "head_dim": 24,
    "tie_word_embeddings": False,
}


def uneven(directory: Path) -> Path:
    """Make some channels of every norm, and some neurons, many times as large as the others."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    random = np.random.default_rng(3)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight") or ".ln_" in name or ".up_proj." in name:
            factors = np.exp2(random.integers(-3, 4, len(tensor))).astype(np.float32)
            tensors[name] = tensor * factors.reshape(-1, *[1] * (tensor.ndim - 1))
    save_file(tensors, path, metadata={"format": "pt"})
    return directory
