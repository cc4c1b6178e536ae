"""transformers on PyTorch: eager, and compiled by Inductor with a static cache."""

import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.models import Forms
from benchmarks.peers.engine import Answer, Stamps
from relax_llm.finding.torch_model import with_cache

NAME = "torch"
PACKAGE = "torch"
VARIANTS = {
    "f32": ("float32 eager", "float32 compiled"),
    "bf16": ("bfloat16 eager", "bfloat16 compiled"),
    "q8": (),
    "q4": (),
}

CONTEXT = 2048


def prepare(forms: Forms, variant: str) -> Path:
    """Write the Hugging Face directory."""
    return forms.huggingface(variant.split()[0])


def load(path: Path, variant: str, threads: int) -> Answer:
    """Load it, and have compiled what is compiled: a prompt and a token."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

    torch.set_num_threads(threads)
    dtype, mode = variant.split()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    static = mode == "compiled"
    if static:
        model.forward = torch.compile(model.forward, dynamic=True)

    def answer(token_ids: Sequence[int], count: int) -> Stamps:
        cache = StaticCache(config=model.config, max_cache_len=CONTEXT) if static else DynamicCache()
        stamps: Stamps = []
        ids = list(token_ids)
        with torch.inference_mode():
            while len(stamps) < count:
                kept = with_cache(model, cache)
                logits = model(input_ids=torch.tensor([ids]), logits_to_keep=1, **kept).logits
                stamps.append((int(logits[0, -1].argmax()), time.perf_counter()))
                ids = [stamps[-1][0]]
        return stamps

    if static:
        answer(range(1, 9), 2)
        answer(range(1, 18), 2)
    return answer
