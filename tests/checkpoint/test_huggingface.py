"""Hugging Face directories: what is read is what was saved, lazily and without copies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from relax_llm.checkpoint import open_checkpoint
from relax_llm.errors import CheckpointError, TokenizerError

from .files import LLAMA_CONFIG, header_of, safetensors, small_tensors, write_directory

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

DTYPES = [
    np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8,
    np.uint64, np.uint32, np.uint16, np.uint8, np.bool_,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4), (0, 4)], ids=str)
def test_every_dtype_is_read_as_it_was_saved(dtype: type, shape: tuple[int, ...], tmp_path: Path) -> None:
    values: NDArray[Any] = np.random.default_rng(1).integers(0, 2, shape).astype(dtype)
    other = np.arange(3, dtype=np.uint8)
    write_directory(tmp_path, config={**LLAMA_CONFIG, "num_hidden_layers": 2})
    save_file({"a": values, "b": other}, tmp_path / "model.safetensors")

    checkpoint = open_checkpoint(tmp_path)

    tensor = checkpoint.tensors["a"]
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == (shape, np.dtype(dtype).name, values.nbytes)
    read = tensor.read()
    assert read.dtype == values.dtype
    assert read.shape == shape
    assert read.tobytes() == values.tobytes()
    assert not tensor.is_quantized


def test_the_written_files_are_what_the_safetensors_package_reads(tmp_path: Path) -> None:
    """The hand-made files of these tests follow the format as its own package understands it."""
    write_directory(tmp_path)
    reference = load_file(tmp_path / "model.safetensors")
    assert {name: values.tobytes() for name, values in reference.items()} == {
        name: values.tobytes() for name, values in small_tensors().items()
    }


def test_reading_maps_the_file_and_copies_nothing(tmp_path: Path) -> None:
    size = 48 << 20
    write_directory(tmp_path, weights=safetensors({"model.weight": np.ones(size // 4, np.float32)}))
    tracemalloc.start()
    try:
        checkpoint = open_checkpoint(tmp_path)
        first, second = checkpoint.tensors["model.weight"].read(), checkpoint.tensors["model.weight"].read()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.shares_memory(first, second)
    assert not first.flags.writeable
    assert peak < 1 << 20


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda dtype: np.dtype(dtype).name)
def test_data_at_an_odd_address_are_read(dtype: type, tmp_path: Path) -> None:
    """Old writers did not pad the header, so tensors can begin anywhere."""
    values: NDArray[Any] = np.random.default_rng(2).standard_normal((5, 7)).astype(dtype)
    for spaces in range(4):
        header = json.dumps(header_of({"a": values})).encode() + b" " * spaces
        write_directory(tmp_path / str(spaces), weights=safetensors({"a": values}, header))
        read = open_checkpoint(tmp_path / str(spaces)).tensors["a"].read()
        assert read.tobytes() == values.tobytes()
        assert np.array_equal(read.astype(np.float64) @ np.eye(7), values.astype(np.float64))


def shard(directory: Path) -> dict[str, str]:
    """Replace model.safetensors by two shards and an index; returns the index's map."""
    tensors = small_tensors()
    names = list(tensors)
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number, held in ((1, names[:1]), (2, names[1:])):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in held}, directory / file)
        weight_map.update(dict.fromkeys(held, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_a_sharded_checkpoint_is_one_set_of_tensors(tmp_path: Path) -> None:
    shard(write_directory(tmp_path))
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == list(small_tensors())
    assert checkpoint.notes == ()
    for name, values in small_tensors().items():
        assert checkpoint.tensors[name].read().tobytes() == values.tobytes()
        assert checkpoint.tensors[name].file.parent == tmp_path


def test_shards_may_be_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    directory = tmp_path / "snapshot"
    shard(write_directory(directory))
    for number, path in enumerate(sorted(directory.glob("*.safetensors"))):
        path.rename(tmp_path / f"blob{number}")
        path.symlink_to(tmp_path / f"blob{number}")
    assert len(open_checkpoint(directory).tensors) == 3


def test_tensors_that_the_index_does_not_name_are_noted(tmp_path: Path) -> None:
    weight_map = shard(write_directory(tmp_path))
    removed = list(weight_map)[-1]
    file = weight_map.pop(removed)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(tmp_path)
    assert removed not in checkpoint.tensors
    (note,) = checkpoint.notes
    assert file in note
    assert removed in note


def test_one_file_goes_before_an_index(tmp_path: Path) -> None:
    write_directory(tmp_path, model__safetensors__index__json=b"never read")
    (note,) = open_checkpoint(tmp_path).notes
    assert "model.safetensors.index.json" in note


def test_config_and_generation_config_are_given_as_they_are(tmp_path: Path) -> None:
    generation = {"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": True}
    write_directory(tmp_path, generation_config__json=json.dumps(generation).encode())
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.format == "huggingface"
    assert checkpoint.path == tmp_path
    assert checkpoint.config == LLAMA_CONFIG
    assert checkpoint.generation_config == generation


def test_no_generation_config_is_an_empty_one(tmp_path: Path) -> None:
    assert open_checkpoint(write_directory(tmp_path)).generation_config == {}


def test_null_fields_are_absent_ones(tmp_path: Path) -> None:
    config = {**LLAMA_CONFIG, "sliding_window": None, "rope_scaling": None, "head_dim": None, "n_inner": None}
    assert open_checkpoint(write_directory(tmp_path, config=config)).config == config


def test_code_in_the_checkpoint_is_ignored_with_a_note(tmp_path: Path) -> None:
    config = {**LLAMA_CONFIG, "auto_map": {"AutoModel": "modeling_x.X"}}
    write_directory(tmp_path, config=config)
    (tmp_path / "modeling_x.py").write_text("raise SystemExit('this ran')")
    (note,) = open_checkpoint(tmp_path).notes
    assert "auto_map" in note
    assert "ignored" in note


def test_pickle_beside_safetensors_is_no_obstacle(tmp_path: Path) -> None:
    write_directory(tmp_path, pytorch_model__bin=b"\x80\x04.")
    assert len(open_checkpoint(tmp_path).tensors) == 3


def test_raw_blocks_are_refused_for_plain_tensors(tmp_path: Path) -> None:
    tensor = next(iter(open_checkpoint(write_directory(tmp_path)).tensors.values()))
    with pytest.raises(CheckpointError, match=r"stored as float32, so it has no quantized blocks"):
        tensor.raw()


def test_the_tokenizer_is_loaded_when_it_is_asked_for(tmp_path: Path) -> None:
    vocabulary = {"hello": 0, "world": 1, "[UNK]": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    checkpoint = open_checkpoint(write_directory(tmp_path))
    with pytest.raises(TokenizerError):
        checkpoint.load_tokenizer()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert checkpoint.load_tokenizer().encode("world hello") == [1, 0]


def test_the_fingerprint_follows_every_file_that_matters(tmp_path: Path) -> None:
    directory = write_directory(
        tmp_path / "a", generation_config__json=b"{}", tokenizer__json=b"{}", chat_template__jinja=b"x"
    )
    seen = [open_checkpoint(directory).fingerprint]
    assert open_checkpoint(directory).fingerprint == seen[0]
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        path = directory / name
        status = path.stat()
        path.write_bytes(path.read_bytes() + b" ")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        seen.append(open_checkpoint(directory).fingerprint)
    weights = directory / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    seen.append(open_checkpoint(directory).fingerprint)
    renamed = {name.replace("down", "up"): values for name, values in small_tensors().items()}
    weights.write_bytes(safetensors(renamed))
    os.utime(weights, ns=(0, 0))
    seen.append(open_checkpoint(directory).fingerprint)
    (directory / "tokenizer.json").unlink()
    seen.append(open_checkpoint(directory).fingerprint)
    assert len(set(seen)) == len(seen)

    directory.rename(tmp_path / "b")
    assert open_checkpoint(tmp_path / "b").fingerprint == seen[-1]


def test_importing_is_light() -> None:
    code = (
        "import sys, relax_llm.checkpoint;"
        "heavy = 'torch transformers tvm gguf huggingface_hub tokenizers jinja2'.split();"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"
