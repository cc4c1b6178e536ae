"""ik_llama.cpp, a fork of llama.cpp with kernels of its own; weights are repacked for them when they are loaded.

Its bindings leave out what makes it fast, so the C functions are called as they are: repacking, and flash attention on
processors with AVX-512.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.peers.engine import Answer, Stamps
from benchmarks.peers.llama_cpp import CONTEXT, prepare

__all__ = ["NAME", "PACKAGE", "VARIANTS", "load", "prepare"]

NAME = "ik_llama.cpp"
PACKAGE = "ik-llama-cpp-python"
VARIANTS = {"f32": ("F32",), "bf16": ("BF16",), "q8": ("Q8_0",), "q4": ("Q4_0", "Q4_1")}


def load(path: Path, variant: str, threads: int) -> Answer:
    """Load the file."""
    from ik_llama_cpp import _ctypes_api as api
    from ik_llama_cpp._internals import make_batch_range

    api.llama_backend_init()
    options = api.llama_model_default_params()
    options.use_mmap, options.repack_tensors = False, True
    model = api.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise RuntimeError(f"{path} cannot be loaded")
    settings = api.llama_context_default_params()
    settings.n_ctx = settings.n_batch = CONTEXT
    settings.n_threads = settings.n_threads_batch = threads
    settings.flash_attn = True
    context = api.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError("there is no memory for a context")
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    most = api.llama_n_ubatch(context)

    def evaluate(token_ids: Sequence[int], start: int) -> None:
        for first in range(0, len(token_ids), most):
            part = [int(token_id) for token_id in token_ids[first : first + most]]
            batch = make_batch_range(
                part, pos_start=start + first, logits_last=first + most >= len(token_ids)
            )
            failed = api.llama_decode(context, batch)
            api.llama_batch_free(batch)
            if failed:
                raise RuntimeError(f"llama_decode gave {failed}")

    def likeliest() -> int:
        logits = api.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    def answer(token_ids: Sequence[int], count: int) -> Stamps:
        api.llama_kv_cache_clear(context)
        evaluate(token_ids, 0)
        stamps = [(likeliest(), time.perf_counter())]
        while len(stamps) < count:
            evaluate([stamps[-1][0]], len(token_ids) + len(stamps) - 1)
            stamps.append((likeliest(), time.perf_counter()))
        return stamps

    return answer
