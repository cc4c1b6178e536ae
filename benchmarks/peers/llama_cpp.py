"""llama.cpp, through the bindings of llama-cpp-python, built for this machine."""

import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models import Forms
from benchmarks.peers.engine import Answer, Stamps

NAME = "llama.cpp"
PACKAGE = "llama-cpp-python"
VARIANTS = {"f32": ("F32",), "bf16": ("BF16", "F16"), "q8": ("Q8_0",), "q4": ("Q4_0", "Q4_1")}

CONTEXT = 2048


def prepare(forms: Forms, variant: str) -> Path:
    """Write the GGUF file."""
    return forms.gguf(variant)


def load(path: Path, variant: str, threads: int) -> Answer:
    """Load the file."""
    return bindings("llama_cpp", path, threads)


def bindings(module: str, path: Path, threads: int, **options: Any) -> Answer:
    """Load a model through llama-cpp-python or a fork of it."""
    library = import_module(module)
    model = library.Llama(
        str(path), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False, **options
    )

    def likeliest() -> int:
        logits = library.llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())

    def answer(token_ids: Sequence[int], count: int) -> Stamps:
        model.reset()
        model.eval(token_ids)
        stamps = [(likeliest(), time.perf_counter())]
        while len(stamps) < count:
            model.eval([stamps[-1][0]])
            stamps.append((likeliest(), time.perf_counter()))
        return stamps

    return answer
