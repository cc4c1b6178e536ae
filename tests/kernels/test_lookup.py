"""Embeddings, plain and in a matmul's layout, and the last token's row: copies, so equality is exact."""

from __future__ import annotations

import numpy as np
import pytest

from relax_llm.kernels.layout import Tiled
from relax_llm.kernels.lookup import Embedding, LastToken
from relax_llm.kernels.matmul import Matmul
from relax_llm.kernels.matmul.tiled import layout_for

from .bench import every_machine, launch, machine_of, machines, random
from .guarded import Out

SHAPES = ((1, 1), (1, 2), (1, 16), (1, 17), (3, 1), (3, 6), (1, 65))  # sixteen rows are the last for one core


def _ids(rows: int, shape: tuple[int, int]) -> np.ndarray:
    """Ids with the first and the last row of the table among them, and repetitions."""
    ids = np.random.default_rng(rows).integers(0, rows, shape).astype(np.int32)
    ids.flat[0] = rows - 1
    ids.flat[-1] = 0 if ids.size > 1 else rows - 1
    return ids


@every_machine
@pytest.mark.parametrize("hidden", [1, 15, 16, 17, 64])
@pytest.mark.parametrize("rows", [1, 33, 257])
def test_embedding(on: str, rows: int, hidden: int) -> None:
    table = random(rows, hidden)
    for shape in SHAPES:
        ids = _ids(rows, shape)
        (out,) = launch(Embedding(rows, hidden), on, ids, table, Out((*shape, hidden)))
        np.testing.assert_array_equal(out, table[ids])


@machines
@pytest.mark.parametrize("hidden", [1, 17, 64])
@pytest.mark.parametrize("rows", [1, 15, 31, 32, 33, 257])
def test_embedding_in_the_layout_of_a_head(on: str, rows: int, hidden: int) -> None:
    layout = layout_for(Matmul(rows, hidden), machine_of(on))
    table = random(rows, hidden)
    for shape in SHAPES:
        ids = _ids(rows, shape)
        problem = Embedding(rows, hidden, layout=layout.name)
        (out,) = launch(problem, on, ids, layout.pack(table), Out((*shape, hidden)))
        np.testing.assert_array_equal(out, table[ids])


def test_the_layout_is_part_of_the_name() -> None:
    names = {Embedding(5, 3, layout).name for layout in (None, Tiled(16).name, Tiled(32).name)}
    assert len(names) == 3


@every_machine
@pytest.mark.parametrize("hidden", [1, 15, 16, 17, 64])
def test_last_token(on: str, hidden: int) -> None:
    for batch, seq in ((1, 1), (1, 2), (1, 65), (3, 1), (3, 6)):
        x = random(batch, seq, hidden)
        (out,) = launch(LastToken(hidden), on, x, Out((batch, 1, hidden)))
        np.testing.assert_array_equal(out, x[:, -1:])
