"""ONNX Runtime GenAI, with the graph of its own model builder; its head sees the last token alone."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.models import Forms
from benchmarks.peers.engine import Answer, Stamps

NAME = "ONNX Runtime"
PACKAGE = "onnxruntime-genai"
VARIANTS = {"f32": ("fp32",), "bf16": (), "q8": ("int8",), "q4": ("int4",)}

BUILDER = "onnxruntime_genai.models.builder"


def prepare(forms: Forms, variant: str) -> Path:
    """Build the graph."""
    source = forms.huggingface("float32")

    def build(path: Path) -> None:
        places = ["-i", str(source), "-o", str(path), "-c", str(path.parent)]
        options = ["-p", variant, "-e", "cpu", "--extra_options", "prune_lm_head=true"]
        subprocess.run([sys.executable, "-m", BUILDER, *places, *options], check=True)

    return forms.made(f"onnxruntime-{variant}", build)


def load(path: Path, variant: str, threads: int) -> Answer:
    """Load the graph."""
    import onnxruntime_genai as genai

    config = genai.Config(str(path))
    session = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": session}}))
    model = genai.Model(config)

    def answer(token_ids: Sequence[int], count: int) -> Stamps:
        parameters = genai.GeneratorParams(model)
        length = len(token_ids) + count
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array(token_ids, np.int32))
        stamps: Stamps = []
        while len(stamps) < count:
            generator.generate_next_token()
            stamps.append((int(generator.get_next_tokens()[0]), time.perf_counter()))
        return stamps

    return answer
