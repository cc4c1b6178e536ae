"""What people have: Hugging Face directories and GGUF files, read lazily, checked in full."""

from relax_llm.checkpoint.checkpoint import Checkpoint, Tensor
from relax_llm.checkpoint.opening import open_checkpoint

__all__ = ["Checkpoint", "Tensor", "open_checkpoint"]
