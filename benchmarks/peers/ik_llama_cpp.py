"""ik_llama.cpp, a fork of llama.cpp with kernels of its own; weights are repacked for them when they are loaded."""

from pathlib import Path

from benchmarks.peers.engine import Answer
from benchmarks.peers.llama_cpp import bindings, prepare

__all__ = ["NAME", "PACKAGE", "VARIANTS", "load", "prepare"]

NAME = "ik_llama.cpp"
PACKAGE = "ik-llama-cpp-python"
VARIANTS = {"f32": ("F32",), "bf16": ("BF16",), "q8": ("Q8_0",), "q4": ("Q4_0", "Q4_1")}


def load(path: Path, variant: str, threads: int) -> Answer:
    """Load the file."""
    return bindings("ik_llama_cpp", path, threads, repack=True)
