"""llama.cpp, through the bindings of llama-cpp-python, built for this machine."""

import time
from collections.abc import Sequence
from pathlib import Path

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
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def likeliest() -> int:
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
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
