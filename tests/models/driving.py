"""Running a compiled model in a calling sequence, and the check that all architectures share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from .comparison import assert_logits_agree
from .configurations import DECODE_STEPS, PROMPT_LENGTHS
from .reference import token_ids

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from .configurations import Configuration
    from .conftest import Bench

    Array = npt.NDArray[Any]

QUICK = frozenset(
    {
        "one-layer-one-head",
        "smollm2-like",
        "head-dim-20-attention-bias",
        "dynamic",
        "yarn",
        "window-5",
        "window-64",
        "gpt2-plain",
        "gpt2-three-heads-inner",
    }
)
"""The rows that run without the `slow` mark; between them they use every feature that caches depend on."""

lengths = pytest.mark.parametrize("length", PROMPT_LENGTHS)
batches = pytest.mark.parametrize("batch", [1, 3])


def rows(table: Iterable[Configuration]) -> pytest.MarkDecorator:
    """Parametrize a test by the rows of a table, all but the QUICK ones marked slow."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "row", [pytest.param(row, id=row.name, marks=() if row.name in QUICK else slow) for row in table]
    )


def advance(runner: Any, state: Any, ids: Array, prefills: Sequence[int], decodes: int = 0) -> Array:
    """Pass ids to a state, in chunks and then one by one, and return the logits of all of them.

    Args:
        runner: The compiled model.
        state: Its state, of any length.
        ids: [seq] for a state of batch 1, else [batch, seq]; seq is sum(prefills) + decodes.
        prefills: The length of each chunk.
        decodes: How many single tokens follow.

    Returns:
        float32 logits of shape [seq, vocab] or [batch, seq, vocab].
    """
    assert sum(prefills) + decodes == ids.shape[-1], "the calls must add up to the sequence"
    start, parts = state.length, []
    done = 0
    for size in prefills:
        parts.append(runner.prefill(state, ids[..., done : done + size], output="all"))
        done += size
        assert state.length == start + done, f"the state's length is {state.length}, not {start + done}"
    for _ in range(decodes):
        step = ids[..., done]
        logits = runner.decode(state, int(step) if ids.ndim == 1 else step)
        assert logits.shape == (*ids.shape[:-1], runner.vocab_size), f"decode gave shape {logits.shape}"
        parts.append(logits[..., None, :])
        done += 1
        assert state.length == start + done, f"the state's length is {state.length}, not {start + done}"
    return np.concatenate(parts, axis=-2)


def ids_of(row: Configuration, batch: int, length: int) -> Array:
    """Return the row's first ids: [length] for batch 1, else [batch, length]."""
    ids = token_ids(row)[:batch, :length]
    return ids[0] if batch == 1 else ids


def check_prompt(bench: Bench, row: Configuration, batch: int, length: int) -> None:
    """Compare a prompt of `length` tokens and the decode steps after it, at every position."""
    runner = bench.runner(row)
    ids = ids_of(row, batch, length + DECODE_STEPS)
    ours = advance(runner, runner.start(batch=batch), ids, (length,), DECODE_STEPS)
    # Rows of a batch do not see each other and, but for dynamic rope, positions do not see later ones:
    # so one reference run over the longest sequence of the largest batch serves all.
    whole = token_ids(row)
    if row.is_dynamic:
        whole = whole[:, : length + DECODE_STEPS]
    reference = bench.reference(row).logits(whole, (length, *[1] * DECODE_STEPS) if row.is_dynamic else None)
    reference = reference[:batch, : length + DECODE_STEPS]
    assert_logits_agree(ours, reference[0] if batch == 1 else reference, f"{row}, {length} tokens")
