"""Valid files with bytes changed, cut and inserted: read or refused, and nothing else."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from relax_llm.checkpoint import open_checkpoint
from relax_llm.errors import CheckpointError

from .files import GGUF, LLAMA_CONFIG, safetensors, small_tensors, write_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROUNDS = 600
SECONDS = 2.0


def damaged(content: bytes, header: int, rounds: int, seed: int) -> Iterator[bytes]:
    """Copies of a file, each damaged in one to four places; most of them in its first `header` bytes."""
    random = np.random.default_rng(seed)
    telling = [0, 1, 0x7F, 0x80, 0xFF, *b'0123456789-{}[]",:eE.']
    for _ in range(rounds):
        data = bytearray(content)
        for _ in range(random.integers(1, 5)):
            end = header if random.random() < 0.9 else len(data)
            place = int(random.integers(0, max(min(end, len(data)), 1)))
            match random.integers(0, 6):
                case 0:
                    del data[place:]
                case 1:
                    del data[place : place + int(random.integers(1, 9))]
                case 2:
                    data[place:place] = random.bytes(int(random.integers(1, 9)))
                case 3:
                    data[place : place + 8] = (
                        random.choice([0, 1, 2**31, 2**63 - 1, -1]).astype("<i8").tobytes()
                    )
                case 4:
                    data[place : place + 1] = bytes([int(random.choice(telling))])
                case _:
                    data[place : place + 1] = random.bytes(1)
        yield bytes(data)


def read_everything(path: Path) -> bool:
    """Whether the checkpoint could be read; anything but a CheckpointError goes up."""
    begin = time.perf_counter()
    try:
        for tensor in open_checkpoint(path).tensors.values():
            values = tensor.read()
            assert values.shape == tensor.shape
    except CheckpointError:
        return False
    finally:
        assert time.perf_counter() - begin < SECONDS
    return True


@pytest.mark.parametrize("seed", range(2))
def test_damaged_safetensors(seed: int, tmp_path: Path) -> None:
    content = safetensors(small_tensors())
    header = 8 + int.from_bytes(content[:8], "little")
    outcomes = set()
    write_directory(tmp_path)
    for data in damaged(content, header, ROUNDS, seed):
        (tmp_path / "model.safetensors").write_bytes(data)
        outcomes.add(read_everything(tmp_path))
    assert outcomes == {True, False}


@pytest.mark.parametrize("seed", range(2))
def test_damaged_gguf(seed: int, tmp_path: Path) -> None:
    model = GGUF()
    content = model.to_bytes()
    header = sum(map(len, model.header()))
    outcomes = set()
    for data in damaged(content, header, ROUNDS, seed):
        (tmp_path / "model.gguf").write_bytes(data)
        outcomes.add(read_everything(tmp_path / "model.gguf"))
    assert outcomes == {True, False}


@pytest.mark.parametrize("seed", range(2))
def test_damaged_json(seed: int, tmp_path: Path) -> None:
    write_directory(tmp_path)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(small_tensors(), "a.safetensors")}
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    texts = {
        "config.json": json.dumps(LLAMA_CONFIG).encode(),
        "generation_config.json": b'{"eos_token_id": [1, 2], "temperature": 0.7, "top_k": 40}',
        "model.safetensors.index.json": json.dumps(index).encode(),
    }
    outcomes = set()
    for name, content in texts.items():
        for other, valid in texts.items():
            (tmp_path / other).write_bytes(valid)
        for data in damaged(content, len(content), ROUNDS // 3, seed):
            (tmp_path / name).write_bytes(data)
            outcomes.add(read_everything(tmp_path))
    assert outcomes == {True, False}


def test_every_truncation_of_a_gguf_file_is_refused(tmp_path: Path) -> None:
    content = GGUF().to_bytes()
    header = sum(map(len, GGUF().header()))
    for length in [*range(0, header, 3), *range(header, len(content), 500), len(content) - 1]:
        (tmp_path / "model.gguf").write_bytes(content[:length])
        assert not read_everything(tmp_path / "model.gguf"), length
