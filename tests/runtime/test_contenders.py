"""Greedy tokens of a large head, most of which is not read: the same ones, with the same logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import relax_llm as rl
from relax_llm.compiler.passes.screen_head import ScreenHead
from tests.artifact.checkpoints import LLAMA, write

from .conftest import roomy

if TYPE_CHECKING:
    from pathlib import Path

VOCAB = {"f32": 24_001, "bf16": 70_001}
"""Rows of a head that is large enough, the last panel of which is not full."""

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which every token but one has a twin, far behind it, with the same logit."""
    return _written(tmp_path_factory.mktemp("twins"), VOCAB["f32"])


def _written(path: Path, vocab: int) -> Path:
    write(path, {**roomy(LLAMA), "vocab_size": vocab, "hidden_size": 64, "tie_word_embeddings": True})
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    (table,) = (tensor for name, tensor in tensors.items() if "embed_tokens" in name)
    table[vocab // 2 : 2 * (vocab // 2)] = table[: vocab // 2]
    save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module", params=["f32", "bf16"])
def model(
    request: pytest.FixtureRequest,
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    plainer_machine: None,
) -> rl.Runner:
    weights = request.param
    path = checkpoint if weights == "f32" else _written(tmp_path_factory.mktemp("more"), VOCAB[weights])
    return rl.Runner(rl.compile(path, weights=weights))


def test_the_token_and_its_logit_are_those_of_all_logits(model: rl.Runner) -> None:
    """Twins are as likely to the last bit, and the first of them is the choice."""
    ours, plain = model.start(), model.start()
    logits, found = model.prefill(plain, IDS), model.greedy(ours, IDS)
    for step in range(40):
        assert (found.token_id, found.logit) == (int(logits.argmax()), logits.max())
        token_id = (found.token_id + 97 * step) % model.vocab_size
        logits, found = model.decode(plain, token_id), model.greedy(ours, token_id)
    assert (logits == logits.max()).sum() in (1, 2)


def test_of_a_batch(model: rl.Runner) -> None:
    ids = np.array([IDS, IDS[::-1], [7] * len(IDS)])
    ours, plain = model.start(batch=3), model.start(batch=3)
    for tokens in (ids, ids[:, :1]):
        found, logits = model.greedy(ours, tokens), model.prefill(plain, tokens)
        np.testing.assert_array_equal(found.token_id, logits.argmax(axis=-1))
        np.testing.assert_array_equal(found.logit, logits.max(axis=-1))


def test_few_are_computed_and_others_are_near(model: rl.Runner) -> None:
    state = model.start()
    logits = model.prefill(state, IDS)
    with model.steps("contenders", model.start(), IDS) as steps:
        last = list(steps)[-1]
        assert last.operator == "contenders"
        found = np.asarray(last.outputs[0]).reshape(-1)
    exact = found == logits
    assert exact[logits.argmax()]
    assert 1 <= exact.sum() < len(logits) / 4
    np.testing.assert_allclose(found, logits, atol=0.05 * np.abs(logits).max())


def test_what_is_launched_is_seen(model: rl.Runner) -> None:
    expected = model.greedy(model.start(), IDS)
    with model.tracing() as trace:
        assert model.greedy(model.start(), IDS) == expected
    assert [call.function for call in trace.calls] == ["contenders", "greedy"]
    assert [(launch.site, launch.operator) for launch in trace.calls[0].launches][-2:] == [
        ("embed_tokens.estimate", "matmul"),
        ("embed_tokens", "contenders"),
    ]
    with model.shadow("embed_tokens", rl.float64, operator="contenders") as shadow:
        assert model.greedy(model.start(), IDS) == expected
    assert shadow.launches == 1
    assert not shadow.first


def test_a_kernel_that_is_forced_on_the_head_computes_it(model: rl.Runner) -> None:
    with model.force("embed_tokens", "tiled"), model.tracing() as trace:
        model.greedy(model.start(), IDS)
    assert trace.calls[0].function == "prefill"


def test_a_broken_head_is_not_passed_over(tmp_path: Path) -> None:
    """Of a row with NaN there is no margin, and so it contends."""
    broken = _written(tmp_path, VOCAB["f32"])
    (file,) = broken.glob("*.safetensors")
    tensors = load_file(file)
    (table,) = (tensor for name, tensor in tensors.items() if "embed_tokens" in name)
    table[20_000, 3] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.warns(RuntimeWarning, match="NaN"):
        runner = rl.Runner(rl.compile(broken))
    found = runner.greedy(runner.start(), IDS)
    assert found.token_id == 20_000
    assert np.isnan(found.logit)


def test_without_the_pass_there_is_no_such_function(checkpoint: Path) -> None:
    passes = rl.pipeline()
    passes.remove(ScreenHead)
    artifact = rl.compile(checkpoint, pipeline=passes)
    assert "contenders" not in artifact.manifest.functions
    plain = rl.Runner(artifact)
    assert plain.greedy(plain.start(), IDS).token_id < VOCAB["f32"] // 2


def test_a_head_of_the_users_is_read_as_it_is(checkpoint: Path) -> None:
    @rl.kernel("matmul", form="python", sites="embed_tokens", name="mine")
    def mine(problem: object, x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
        out[:] = x @ weight.T

    artifact = rl.compile(checkpoint, kernels=[mine])
    assert "contenders" not in artifact.manifest.functions
