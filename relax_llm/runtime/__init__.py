"""Running artifacts. Nothing here loads a compiler, PyTorch or transformers."""
