"""OpenVINO GenAI, which reads GGUF files. Where a processor multiplies whole tiles (AMX), it does so except in f32."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.models import Forms
from benchmarks.peers.engine import Answer, Stamps

NAME = "OpenVINO"
PACKAGE = "openvino-genai"
VARIANTS = {"f32": ("f32",), "bf16": ("bf16",), "q8": ("Q8_0",), "q4": ("Q4_0", "Q4_1")}


def prepare(forms: Forms, variant: str) -> Path:
    """Write the GGUF file. Of floats it reads F16 alone, and turns it into what it computes in."""
    return forms.gguf({"f32": "F16", "bf16": "F16"}.get(variant, variant))


def load(path: Path, variant: str, threads: int) -> Answer:
    """Load the file."""
    import openvino
    import openvino_genai as genai

    precision = {"INFERENCE_PRECISION_HINT": variant} if variant in ("f32", "bf16") else {}
    pipeline = genai.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=threads, **precision)

    class Clock(genai.StreamerBase):
        def __init__(self) -> None:
            super().__init__()
            self.stamps: Stamps = []

        def write(self, tokens: int | list[int]) -> genai.StreamingStatus:
            now = time.perf_counter()
            self.stamps += [(token, now) for token in np.atleast_1d(tokens).tolist()]
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def answer(token_ids: Sequence[int], count: int) -> Stamps:
        ids = np.array([token_ids], np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config = genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        clock = Clock()
        pipeline.generate(inputs, config, clock)
        return clock.stamps

    return answer
