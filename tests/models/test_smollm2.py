"""SmolLM2-135M-Instruct, from its GGUF file, against transformers reading the same file."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import relax_llm as rl

from .comparison import BOUND, assert_close, assert_logits_agree
from .configurations import DECODE_STEPS, PROMPT_LENGTHS, TOTAL
from .driving import advance, batches, lengths
from .reference import Reference
from .texts import CODE, MIXED, PROMPTS, PROSE

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

pytestmark = pytest.mark.model

NEW_TOKENS = 48


class SmolLM2:
    """The reference and its tokenizer, both from the GGUF file."""

    def __init__(self, path: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        self.reference = Reference(
            AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
            )
        )

    @cached_property
    def ids(self) -> npt.NDArray[np.int64]:
        """The beginnings of the three texts, int64 [3, TOTAL]."""
        ids = [self.tokenizer(text).input_ids[:TOTAL] for text in (PROSE, CODE, MIXED)]
        return np.array(ids, dtype=np.int64)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> SmolLM2:
    return SmolLM2(smollm2_path)


@pytest.fixture(scope="module")
def runner(smollm2_path: Path) -> rl.Runner:
    return rl.Runner(rl.compile(smollm2_path, weights="f32"))


@lengths
@batches
def test_logits(smollm2: SmolLM2, runner: rl.Runner, batch: int, length: int) -> None:
    ids, expected = smollm2.ids[:batch], smollm2.reference.logits(smollm2.ids)[:batch]
    if batch == 1:
        ids, expected = ids[0], expected[0]
    total = length + DECODE_STEPS
    ours = advance(runner, runner.start(batch=batch), ids[..., :total], (length,), DECODE_STEPS)
    assert_logits_agree(ours, expected[..., :total, :], f"{length} tokens")


def test_prefill_equals_single_decodes(smollm2: SmolLM2, runner: rl.Runner) -> None:
    ids = smollm2.ids[0, :100]
    singles = advance(runner, runner.start(), ids, (), 100)
    assert_logits_agree(singles, smollm2.reference.logits(smollm2.ids)[0, :100], "single decodes")
    for length in (n for n in PROMPT_LENGTHS if n <= 100):
        whole = advance(runner, runner.start(), ids[:length], (length,))
        assert_logits_agree(whole, singles[:length], f"prefill of {length} against single decodes")


def test_a_shared_prompt_is_forked_cut_and_continued_in_chunks(smollm2: SmolLM2, runner: rl.Runner) -> None:
    expected = smollm2.reference.logits(smollm2.ids)[0]
    ids = smollm2.ids[0]
    shared = runner.start()
    advance(runner, shared, ids[:120], (1, 63, 56))
    fork = shared.fork()
    advance(runner, shared, smollm2.ids[1, :80], (80,))
    shared.truncate(100)
    ours = advance(runner, shared, ids[100:300], (65, 130), 5)
    assert_logits_agree(ours, expected[100:300], "cut back to 100, then chunks")
    assert_logits_agree(advance(runner, fork, ids[120:190], (64,), 6), expected[120:190], "the fork")


def test_hidden_states(smollm2: SmolLM2, runner: rl.Runner) -> None:
    ours = runner.prefill(runner.start(), smollm2.ids[0, :65], output="hidden")
    assert_close(ours, smollm2.reference.hidden(smollm2.ids)[0, :65], "hidden states")


@pytest.mark.parametrize("weights", ["f32", "q4"])
def test_greedy_tokens_are_those_of_all_logits(smollm2: SmolLM2, smollm2_path: Path, weights: str) -> None:
    """To the last bit, although the head is read where it may be chosen from, and of q4 in integers."""
    runner = rl.Runner(rl.compile(smollm2_path, weights=weights))
    assert "contenders" in runner.artifact.manifest.functions
    ours, plain = runner.start(), runner.start()
    for token_id in smollm2.ids[:, :50].ravel():
        found, logits = runner.greedy(ours, int(token_id)), runner.decode(plain, int(token_id))
        assert (found.token_id, found.logit) == (logits.argmax(), logits.max())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_the_same(smollm2: SmolLM2, runner: rl.Runner, prompt: str) -> None:
    tokenizer = smollm2.tokenizer
    ids = tokenizer(prompt).input_ids
    answer = runner.generate(prompt, max_new_tokens=NEW_TOKENS, temperature=0)
    # What the reference would choose after each token of the answer. Where that is the answer itself, the
    # reference's own greedy answer is the same, token by token; else the first difference is where they part.
    logits = smollm2.reference.logits(np.array([*ids, *answer.token_ids]))[len(ids) - 1 : -1]
    choices = logits.argmax(axis=-1).tolist()
    runner_up, best = np.sort(logits, axis=-1)[:, -2:].T
    assert ((best - runner_up) / np.abs(logits).max(axis=-1)).min() > 2 * BOUND, (
        "undecided: take another prompt"
    )
    assert list(answer.token_ids) == choices
    assert tokenizer.eos_token_id not in choices[:-1]
    assert len(choices) == NEW_TOKENS or choices[-1] == tokenizer.eos_token_id
    assert answer.text == tokenizer.decode(choices, skip_special_tokens=True)
