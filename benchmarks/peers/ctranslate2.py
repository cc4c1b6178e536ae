"""CTranslate2. Its weights of 4 bits want a file of another quantizer, and its bf16 is for GPUs."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.models import Forms
from benchmarks.peers.engine import Answer, Stamps

NAME = "CTranslate2"
PACKAGE = "ctranslate2"
VARIANTS = {"f32": ("float32",), "bf16": (), "q8": ("int8",), "q4": ()}


def prepare(forms: Forms, variant: str) -> Path:
    """Convert the Hugging Face directory."""
    source = forms.huggingface("float32")

    def convert(path: Path) -> None:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(source)).convert(str(path), quantization=variant)

    return forms.made(f"ctranslate2-{variant}", convert)


def load(path: Path, variant: str, threads: int) -> Answer:
    """Load the directory."""
    import ctranslate2

    model = ctranslate2.Generator(
        str(path), device="cpu", compute_type=variant, intra_threads=threads, inter_threads=1
    )
    vocabulary = json.loads((path / "vocabulary.json").read_text())

    def answer(token_ids: Sequence[int], count: int) -> Stamps:
        stamps: Stamps = []

        def step(result: ctranslate2.GenerationStepResult) -> bool:
            stamps.append((result.token_id, time.perf_counter()))
            return False

        prompt = [vocabulary[token_id] for token_id in token_ids]
        model.generate_batch(
            [prompt],
            max_length=count,
            min_length=count,
            include_prompt_in_result=False,
            sampling_topk=1,
            callback=step,
        )
        return stamps[:count]

    return answer
