"""This project, as a user has it: `runner.stream`."""

import time
from collections.abc import Sequence
from pathlib import Path

import relax_llm as rl
from benchmarks.models import Forms
from benchmarks.peers.engine import Answer, Stamps

NAME = "relax_llm"
PACKAGE = "relax-llm"
HEAD_TOO = "q4s, head"
"""All matrices in 4.5 bits, the head too: what files that are quantized without exceptions have."""

VARIANTS = {"f32": ("f32",), "bf16": ("bf16",), "q8": ("q8",), "q4": ("q4", "q4s", HEAD_TOO)}


def prepare(forms: Forms, variant: str) -> Path:
    """Compile, or find it in the cache."""
    weights = variant
    if variant == HEAD_TOO:
        tied = rl.open_checkpoint(forms.source).config.get("tie_word_embeddings", False)
        weights = f"q4s,{'embed_tokens' if tied else 'lm_head'}=q4s"
    return rl.compile(forms.source, weights=weights).path


def load(path: Path, variant: str, threads: int) -> Answer:
    """Load the artifact, which knows how its weights are stored."""
    runner = rl.Runner(rl.load(path), threads=threads)

    def answer(token_ids: Sequence[int], count: int) -> Stamps:
        pieces = runner.stream(list(token_ids), max_new_tokens=count, temperature=0, stop_tokens=[])
        return [(piece.token_id, time.perf_counter()) for piece in pieces]

    return answer
