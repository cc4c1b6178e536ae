"""The KV cache: however a sequence is passed, cut back, copied or interleaved, the logits are the same.

For `dynamic` rope the calling sequence is part of the question (see `reference.py`), so those rows are
always compared with the reference in the same calls, and never after a cut: keys that were rotated when
the sequence was longer stay so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from relax_llm.errors import ContextLengthError, InputError

from .comparison import assert_close, assert_logits_agree
from .configurations import BY_NAME, PROMPT_LENGTHS, Configuration
from .driving import advance, batches, ids_of, rows
from .reference import token_ids

if TYPE_CHECKING:
    from .conftest import Bench

CACHED = [
    BY_NAME[name]
    for name in (
        "smollm2-like",
        "head-dim-20-attention-bias",
        "dynamic",
        "yarn",
        "window-5",
        "window-64",
        "gpt2-plain",
        "gpt2-three-heads-inner",
    )
]
STATIC = [row for row in CACHED if not row.is_dynamic]
FEW = [BY_NAME[name] for name in ("smollm2-like", "window-5", "gpt2-plain")]


@rows(CACHED)
def test_prefill_equals_single_decodes(bench: Bench, row: Configuration) -> None:
    runner, longest = bench.runner(row), max(PROMPT_LENGTHS)
    ids = ids_of(row, 1, longest)
    singles = advance(runner, runner.start(), ids, (), longest)
    assert_logits_agree(singles, bench.reference(row).logits(ids, (1,) * longest), "single decodes")
    for length in PROMPT_LENGTHS:
        if not row.is_dynamic or length <= row.settings["max_position_embeddings"]:
            whole = advance(runner, runner.start(), ids[:length], (length,))
            assert_logits_agree(whole, singles[:length], f"prefill of {length} against single decodes")


@pytest.mark.parametrize(
    "chunks",
    [
        (1, 16),
        (16, 1),
        (17, 46),
        (63, 1),
        (63, 2),
        (64, 1),
        (64, 65),
        (1, 16, 47, 1, 235),
        (300, 1),
        (7,) * 40,
    ],
    ids=lambda chunks: "+".join(map(str, chunks)) if len(chunks) < 9 else f"{chunks[0]}x{len(chunks)}",
)
@batches
@rows(CACHED)
def test_chunks_equal_the_whole(
    bench: Bench, row: Configuration, batch: int, chunks: tuple[int, ...]
) -> None:
    runner = bench.runner(row)
    ids = ids_of(row, batch, sum(chunks) + 2)
    ours = advance(runner, runner.start(batch=batch), ids, chunks, 2)
    assert_logits_agree(ours, bench.reference(row).logits(ids, (*chunks, 1, 1)), f"chunks {chunks}")
    if not row.is_dynamic:
        whole = advance(runner, runner.start(batch=batch), ids[..., :-2], (sum(chunks),))
        assert_logits_agree(ours[..., :-2, :], whole, f"chunks {chunks} against one prefill")


@pytest.mark.parametrize("kept", [0, 1, 37, 64, 104, 105])
@batches
@rows(STATIC)
def test_truncate_then_continue(bench: Bench, row: Configuration, batch: int, kept: int) -> None:
    runner = bench.runner(row)
    first, other = ids_of(row, batch, 105), ids_of(row, batch, 180)[..., 105:]
    state = runner.start(batch=batch)
    advance(runner, state, first, (100,), 5)
    state.truncate(kept)
    assert state.length == kept
    ours = advance(runner, state, other, (65,), 10)
    sequence = np.concatenate([first[..., :kept], other], axis=-1)
    assert_logits_agree(ours, bench.reference(row).logits(sequence)[..., kept:, :], f"after truncate({kept})")


@rows(FEW)
def test_truncate_refuses_what_is_not_there(bench: Bench, row: Configuration) -> None:
    runner = bench.runner(row)
    ids = ids_of(row, 1, 30)
    state = runner.start()
    first = advance(runner, state, ids[:20], (20,))
    for length in (21, -1):
        with pytest.raises(InputError):
            state.truncate(length)
    assert state.length == 20
    ours = np.concatenate([first, advance(runner, state, ids[20:], (), 10)])
    assert_logits_agree(ours, bench.reference(row).logits(ids), "after a refused truncate")


@batches
@rows(CACHED)
def test_forks_are_independent(bench: Bench, row: Configuration, batch: int) -> None:
    runner, reference = bench.runner(row), bench.reference(row)
    shared = ids_of(row, batch, 60)
    rest = token_ids(row)[:, 60:]
    tails = [rest[:batch, :70], rest[:batch, 70:90], rest[:batch, 90:150]]
    if batch == 1:
        tails = [tail[0] for tail in tails]
    original = runner.start(batch=batch)
    advance(runner, original, shared, (60,))
    states = [original.fork(), original, original.fork()]
    assert [state.length for state in states] == [60, 60, 60]
    # Alternate, so that a shared buffer would be overwritten; the first grows far beyond the others.
    starts = [
        advance(runner, state, tail[..., :8], (5,), 3) for state, tail in zip(states, tails, strict=True)
    ]
    for i, (state, tail, start) in enumerate(zip(states, tails, starts, strict=True)):
        ours = np.concatenate([start, advance(runner, state, tail[..., 8:], (tail.shape[-1] - 8,))], axis=-2)
        calls = (60, 5, 1, 1, 1, tail.shape[-1] - 8)
        expected = reference.logits(np.concatenate([shared, tail], axis=-1), calls)
        assert_logits_agree(ours, expected[..., 60:, :], f"state {i}")
        assert state.length == 60 + tail.shape[-1]


@rows(FEW)
def test_a_fork_of_an_empty_state_and_of_a_fork(bench: Bench, row: Configuration) -> None:
    runner, ids = bench.runner(row), ids_of(row, 1, 40)
    state = runner.start().fork()
    first = advance(runner, state, ids[:10], (10,))
    second = advance(runner, state.fork().fork(), ids[10:], (30,))
    expected = bench.reference(row).logits(ids)
    assert_logits_agree(np.concatenate([first, second]), expected, "a fork of a fork")
    assert state.length == 10


@rows(CACHED)
def test_states_of_different_batch_take_turns(bench: Bench, row: Configuration) -> None:
    runner = bench.runner(row)
    one, three = ids_of(row, 1, 90), ids_of(row, 3, 90)
    a, b = runner.start(batch=1), runner.start(batch=3)
    ours: dict[str, list[Any]] = {"one": [], "three": []}
    for start, end in ((0, 30), (30, 31), (31, 90)):
        ours["one"].append(advance(runner, a, one[start:end], (end - start,)))
        ours["three"].append(advance(runner, b, three[:, start:end], (end - start,)))
    expected = bench.reference(row).logits(three, (30, 1, 59))
    assert_logits_agree(np.concatenate(ours["one"], axis=-2), expected[0], "batch 1 beside batch 3")
    assert_logits_agree(np.concatenate(ours["three"], axis=-2), expected, "batch 3 beside batch 1")


@pytest.mark.parametrize("length", [1, 2, 17, 64, 65])
@batches
@rows(CACHED)
def test_outputs_agree_with_each_other(bench: Bench, row: Configuration, batch: int, length: int) -> None:
    runner, reference = bench.runner(row), bench.reference(row)
    ids = ids_of(row, batch, length)
    outputs = {
        output: runner.prefill(runner.start(batch=batch), ids, output=output)
        for output in ("last", "all", "hidden")
    }
    assert_close(outputs["hidden"], reference.hidden(ids, (length,)), "hidden states")
    assert_logits_agree(outputs["last"], outputs["all"][..., -1, :], "last against all")
    assert_logits_agree(runner.prefill(runner.start(batch=batch), ids), outputs["last"], "the default output")
    head = reference.head.weight.detach().numpy()
    assert_logits_agree(outputs["hidden"] @ head.T, outputs["all"], "hidden states through the head")


@rows(FEW)
def test_a_batch_axis_of_one_is_kept(bench: Bench, row: Configuration) -> None:
    runner, ids = bench.runner(row), ids_of(row, 1, 17)
    state = runner.start(batch=1)
    ours = runner.prefill(state, ids[None], output="all")
    assert_logits_agree(ours, bench.reference(row).logits(ids)[None], "ids of shape [1, seq]")


@pytest.mark.parametrize("kind", [list, tuple, np.int32, np.int64, np.uint16], ids=lambda kind: kind.__name__)
def test_ids_of_any_integer_kind(bench: Bench, kind: type) -> None:
    row = FEW[0]
    runner, ids = bench.runner(row), ids_of(row, 1, 20)
    passed: Any = kind(ids.tolist()) if kind in (list, tuple) else ids.astype(kind)
    ours = runner.prefill(runner.start(), passed, output="all")
    assert_logits_agree(ours, bench.reference(row).logits(ids), f"ids as {kind.__name__}")
    strided = np.repeat(ids, 2)[::2]
    assert_logits_agree(runner.prefill(runner.start(), strided, output="all"), ours, "strided ids")


@rows(FEW)
def test_results_are_not_overwritten(bench: Bench, row: Configuration) -> None:
    runner, ids = bench.runner(row), ids_of(row, 1, 20)
    state = runner.start()
    results = [runner.prefill(state, ids[:10], output="all")]
    copies = [results[0].copy()]
    for token in ids[10:]:
        results.append(runner.decode(state, int(token)))
        copies.append(results[-1].copy())
    runner.prefill(runner.start(), ids[::-1].copy())
    for result, copy in zip(results, copies, strict=True):
        np.testing.assert_array_equal(result, copy)


@pytest.mark.parametrize("name", ["window-5", "gpt2-plain"])
def test_the_context_is_served_to_its_last_token_and_no_further(bench: Bench, name: str) -> None:
    row = BY_NAME[name]
    runner = bench.runner(row)
    context = row.settings.get("n_positions") or row.settings["max_position_embeddings"]
    assert runner.context_length == context
    ids = token_ids(row, batch=1, length=context + 1)[0]
    expected = bench.reference(row).logits(ids[:context])
    state = runner.start()
    first = advance(runner, state, ids[: context - 2], (context - 2,))
    with pytest.raises(ContextLengthError, match=str(context)):
        runner.prefill(state, ids[:3])
    assert state.length == context - 2, "a refused call must leave the state as it was"
    ours = np.concatenate([first, advance(runner, state, ids[context - 2 : context], (), 2)])
    assert_logits_agree(ours, expected, "the whole context")
    with pytest.raises(ContextLengthError, match=str(context)):
        runner.decode(state, 0)
    with pytest.raises(ContextLengthError, match=str(context)):
        runner.prefill(runner.start(), ids)
    whole = advance(runner, runner.start(), ids[:context], (context,))
    assert_logits_agree(whole, expected, "the whole context in one prefill")


def _refused(vocab: int) -> dict[str, Any]:
    return {
        "no ids": [],
        "an id beyond the vocabulary": [0, vocab],
        "a negative id": [0, -1],
        "ids that are not integers": np.array([0.0, 1.0]),
        "ids of three dimensions": np.zeros((1, 1, 1), np.int64),
        "another batch": np.zeros((2, 4), np.int64),
    }


@pytest.mark.parametrize("what", list(_refused(2)))
@rows(FEW)
def test_a_refused_call_leaves_the_state_as_it_was(bench: Bench, row: Configuration, what: str) -> None:
    runner, ids = bench.runner(row), ids_of(row, 1, 30)
    state = runner.start()
    first = advance(runner, state, ids[:20], (20,))
    with pytest.raises(InputError):
        runner.prefill(state, _refused(runner.vocab_size)[what])
    assert state.length == 20
    ours = np.concatenate([first, advance(runner, state, ids[20:], (), 10)])
    assert_logits_agree(ours, bench.reference(row).logits(ids), f"after {what}")


@pytest.mark.slow
def test_a_long_context_is_not_allocated_at_the_start(bench: Bench) -> None:
    row = BY_NAME["long-context"]
    runner = bench.runner(row)
    assert runner.context_length == row.settings["max_position_embeddings"]
    runner.prefill(runner.start(), ids_of(row, 1, 300))  # so that what is kept for reuse is there already
    before = _data_bytes()
    state = runner.start(batch=3)
    runner.prefill(state, ids_of(row, 3, 300))
    heads, layers = row.settings["num_key_value_heads"], row.settings["num_hidden_layers"]
    whole = 2 * 3 * layers * heads * row.settings["head_dim"] * runner.context_length * 4
    assert _data_bytes() - before < whole / 20, f"the whole context would take {whole} bytes"


def _data_bytes() -> int:
    """Return how much private memory this process has mapped, touched or not."""
    found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "this test reads /proc/self/status"
    return int(found[1]) * 1024
