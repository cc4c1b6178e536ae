"""What is saved is what is loaded, in a process that has no compiler, too."""

from __future__ import annotations

import io
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import relax_llm as rl
from relax_llm.artifact import file_memory
from relax_llm.artifact.manifest import FORMAT, Manifest, Weight
from relax_llm.artifact.memory import ALIGNMENT, aligned
from relax_llm.artifact.weights import copy, read, write
from relax_llm.errors import ArtifactError

from ..machines import PLAINER
from .checkpoints import LLAMA, write as write_checkpoint
from .process import COMPILERS, forbid, run

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2]


def _logits(artifact: rl.Artifact) -> np.ndarray[Any, Any]:
    runner = rl.Runner(artifact)
    state = runner.start()
    return np.stack([runner.prefill(state, IDS), runner.decode(state, 7)])


def test_loaded_and_saved_artifacts_compute_the_same(artifact: rl.Artifact, tmp_path: Path) -> None:
    expected = _logits(artifact)
    loaded = rl.load(artifact.path)
    assert loaded == artifact
    saved = loaded.save(tmp_path / "a" / "deeper" / "copy")
    assert saved.path == tmp_path / "a" / "deeper" / "copy"
    assert rl.load(saved.path).manifest == artifact.manifest
    np.testing.assert_array_equal(_logits(loaded), expected)
    np.testing.assert_array_equal(_logits(rl.load(saved.path)), expected)
    assert sorted(file.name for file in saved.path.iterdir()) == sorted(
        ["manifest.json", *artifact.manifest.files]
    )


RUN = """
import json, sys
import relax_llm as rl

runner = rl.Runner(rl.load(sys.argv[1]))
state = runner.start()
ids = json.loads(sys.argv[2])
logits = [runner.prefill(state, ids), runner.decode(state, 7)]
generation = runner.generate(ids, max_new_tokens=5, temperature=0)
print(json.dumps({
    "logits": [row.tobytes().hex() for row in logits],
    "modules": sorted(name for name in sys.modules if name.partition(".")[0] in ("tvm", "torch", "transformers")),
    "tokens": list(generation.token_ids),
}))
"""


def test_a_process_without_a_compiler_runs_it(artifact: rl.Artifact) -> None:
    """No tvm, torch or transformers, and none of this package's compiling side: importing any of them raises."""
    result = run(forbid(*COMPILERS) + RUN, artifact.path, json.dumps(IDS))
    assert result["modules"] == []
    logits = np.stack([np.frombuffer(bytes.fromhex(row), np.float32) for row in result["logits"]])
    np.testing.assert_array_equal(logits, _logits(artifact))
    assert len(result["tokens"]) > 0


@pytest.mark.parametrize("name", COMPILERS)
def test_forbidden_imports_are_seen(name: str) -> None:
    """The guard of the test above must work."""
    code = (
        forbid(*COMPILERS)
        + f"""
import json
try:
    import {name}
except AssertionError as error:
    print(json.dumps(str(error)))
"""
    )
    assert run(code) == f"{name} was imported"


def test_the_manifest_survives_json(artifact: rl.Artifact) -> None:
    text = artifact.manifest.to_json()
    assert Manifest.from_json(text, "it") == artifact.manifest
    assert Manifest.from_json(text, "it").to_json() == text
    assert json.loads(text)["format"] == FORMAT


def test_what_the_manifest_says(artifact: rl.Artifact) -> None:
    manifest = artifact.manifest
    assert (manifest.vocab_size, manifest.hidden_size) == (LLAMA["vocab_size"], LLAMA["hidden_size"])
    assert manifest.context_length == LLAMA["max_position_embeddings"]
    assert manifest.generation_config["eos_token_id"] == 2
    assert manifest.config["rms_norm_eps"] == LLAMA["rms_norm_eps"]
    assert [(c.site, c.kv_heads, c.head_dim) for c in manifest.caches] == [("layers.0.self_attn", 2, 6)]
    assert any("tokenizer" in note for note in manifest.notes), "a model without a tokenizer is worth a note"
    assert artifact.tokenizer is None
    assert set(manifest.files) == {"lib.so", "listings.zip", "plan.json", "weights.safetensors"}


def test_weights_are_readable_by_the_safetensors_package(artifact: rl.Artifact) -> None:
    theirs = load_file(artifact.path / "weights.safetensors")
    ours = dict(zip((weight.name for weight in artifact.manifest.weights), artifact.weights(), strict=True))
    assert theirs.keys() == ours.keys()
    for weight in artifact.manifest.weights:
        assert theirs[weight.name].shape == weight.shape
        np.testing.assert_array_equal(theirs[weight.name], ours[weight.name])


def _offsets(path: Path) -> dict[str, tuple[int, int]]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return {
        name: (8 + length + begin, 8 + length + end)
        for name, (begin, end) in ((name, entry["data_offsets"]) for name, entry in header.items())
    }


def test_tensors_are_aligned_in_the_file_and_in_memory(artifact: rl.Artifact) -> None:
    path = artifact.path / "weights.safetensors"
    offsets = _offsets(path)
    for weight, array in zip(artifact.manifest.weights, artifact.weights(), strict=True):
        assert array.ctypes.data % ALIGNMENT == 0
        if array.nbytes % ALIGNMENT == 0:
            assert offsets[weight.name][0] % ALIGNMENT == 0, f"{weight.name} had to be copied"
    ends = sorted(offsets.values())
    assert all(end == begin for (_, end), (begin, _) in pairwise(ends))
    assert ends[-1][1] == path.stat().st_size


ODD = (
    Weight("a", "a", (3,), "float32"),
    Weight("b", "b", (16, 4), "float32"),
    Weight("c", "c", (5, 3), "int8"),
    Weight("d", "d", (64,), "uint8"),
    Weight("e", "e", (7,), "bfloat16"),
    Weight("f", "f", (2, 16), "float16"),
    Weight('é "quoted"', "g", (1,), "int32"),
)


@pytest.mark.parametrize("mapped", [True, False, None])
def test_odd_sizes_and_all_types_are_written_and_read(tmp_path: Path, mapped: bool | None) -> None:
    random = np.random.default_rng(0)
    values = {w.name: random.integers(0, 100, w.shape) for w in ODD}
    path = tmp_path / "weights.safetensors"
    with path.open("wb") as file:
        write(file, ODD, lambda weight: values[weight.name])
    for weight, array in zip(ODD, read(path, ODD, mapped=mapped), strict=True):
        assert array.dtype.name == weight.dtype
        assert array.ctypes.data % ALIGNMENT == 0
        np.testing.assert_array_equal(array.astype(np.int64), values[weight.name])
        array[...] = 0  # is not written to the file
    (last,) = read(path, ODD[-1:], mapped=mapped)
    np.testing.assert_array_equal(last, values[ODD[-1].name])


class Pieces(io.BytesIO):
    """A file that notes how much each call writes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def write(self, data: Any) -> int:
        self.sizes.append(len(data))
        return super().write(data)


def test_a_file_is_written_by_large_pages(tmp_path: Path) -> None:
    """Linux maps it in pieces as large as those that it was written in."""
    large = [
        Weight(name, name, (count,), "float32") for name, count in (("a", 700_001), ("b", 16), ("c", 3 << 19))
    ]
    values = {w.name: np.arange(*w.shape, dtype=np.float32) for w in large}
    file = Pieces()
    write(file, large, lambda weight: values[weight.name])
    assert len(file.sizes) == 5
    assert set(file.sizes[:-1]) == {2**21}
    (tmp_path / "one").write_bytes(file.getvalue())
    copy(tmp_path / "one", tmp_path / "other")
    for weight, array in zip(large, read(tmp_path / "other", large), strict=True):
        np.testing.assert_array_equal(array, values[weight.name])


@pytest.mark.parametrize("mapped", [True, False])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "weights.safetensors"
    with path.open("wb") as file:
        write(file, ODD, lambda weight: np.zeros(weight.shape))
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match=r"cannot be read .*compile the artifact again"):
            read(path, ODD, mapped=mapped)


def test_large_memory_is_zeroed_and_aligned() -> None:
    for count in (2**21 - 64, 2**21, 2**23 + 4):
        memory = aligned((count // 4,))
        assert memory.ctypes.data % ALIGNMENT == 0
        assert not memory.any()
        memory[...] = 1
        assert memory.sum(dtype=np.float64) == count // 4


def test_a_weight_of_another_shape_is_not_written(tmp_path: Path) -> None:
    with (tmp_path / "w").open("wb") as file, pytest.raises(ArtifactError, match=r"'a'.*came out as"):
        write(file, ODD[:1], lambda _: np.zeros(4))


def _is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how a file is mapped")
@pytest.mark.parametrize("share", [None, 0.97])
def test_a_file_that_lies_in_small_pages_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float | None
) -> None:
    (weight,) = many = (Weight("w", "w", (1 << 22,), "float32"),)
    values, whole = np.arange(1 << 22, dtype=np.float32), io.BytesIO()
    write(whole, many, lambda _: values)
    path = tmp_path / "weights.safetensors"
    with path.open("wb", buffering=0) as file:
        for start in range(0, whole.getbuffer().nbytes, 4096):  # the file's pages are as small, too
            file.write(whole.getbuffer()[start : start + 4096])
    with path.open("rb") as file:
        assert file_memory._share_of_large_pages(file_memory._map(file)) < 0.5
    if share is not None:
        monkeypatch.setattr(file_memory, "_share_of_large_pages", lambda _: share)
    monkeypatch.setattr(file_memory, "_maps_large_pages", lambda: True)  # as newer systems do
    (array,) = read(path, [weight])
    assert _is_mapped(path) == (share is not None)
    np.testing.assert_array_equal(array, values)


MEMORY = """
import json, re, sys
import relax_llm as rl

artifact = rl.load(sys.argv[1])
runner = rl.Runner(artifact, mapped=sys.argv[2] == "mapped")
state = runner.start()
for token in (1, 2, 3):
    runner.decode(state, token)
    runner.greedy(state, token)
maps, current = [], None
for line in open("/proc/self/smaps"):
    if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
        current = {"path": line.split(maxsplit=5)[5].strip() if len(line.split()) > 5 else ""}
        maps.append(current)
    elif line.split(":")[0] in ("Rss", "Anonymous", "Private_Dirty"):
        current[line.split(":")[0]] = int(line.split()[1]) * 1024
weights = [entry for entry in maps if entry["path"].endswith("weights.safetensors")]
anonymous = sum(entry["Anonymous"] for entry in maps)
print(json.dumps({"weights": weights, "anonymous": anonymous}))
"""


def test_weights_are_in_memory_once(artifact: rl.Artifact, tmp_path: Path) -> None:
    """As a map of the file, whose pages every process shares, of which no page is copied; or as a copy of all."""
    config = {**LLAMA, "vocab_size": 40_000, "hidden_size": 256}
    large = rl.compile(
        write_checkpoint(tmp_path / "large", config), output=tmp_path / "out", cache=False, target=PLAINER
    )
    size = (large.path / "weights.safetensors").stat().st_size
    assert size > 40_000_000
    result = run(MEMORY, large.path, "mapped")
    assert len(result["weights"]) == 1
    assert result["weights"][0]["Anonymous"] == 0
    assert result["weights"][0]["Rss"] > 0.9 * size, "decode reads all of the head, and greedy its estimate"
    # NumPy, the runtime and Python take some 30 MB of their own: as much as with a small model.
    bare = run(MEMORY, artifact.path, "mapped")
    assert result["anonymous"] - bare["anonymous"] < 0.25 * size
    copied = run(MEMORY, large.path, "copied")
    assert not copied["weights"]
    assert 0.9 * size < copied["anonymous"] - bare["anonymous"] < 1.25 * size


def test_saving_onto_itself_changes_nothing(artifact: rl.Artifact, tmp_path: Path) -> None:
    copy = artifact.save(tmp_path / "copy")
    before = {file.name: file.stat().st_mtime_ns for file in copy.path.iterdir()}
    link = tmp_path / "link"
    link.symlink_to(copy.path, target_is_directory=True)
    copy.save(copy.path)
    copy.save(link)
    assert {file.name: file.stat().st_mtime_ns for file in copy.path.iterdir()} == before


def test_an_artifact_is_replaced_by_another(artifact: rl.Artifact, tmp_path: Path) -> None:
    place = tmp_path / "place"
    artifact.save(place)
    (place / "manifest.json").write_text("{}")
    artifact.save(place)
    assert rl.load(place).manifest == artifact.manifest
    assert [file.name for file in tmp_path.iterdir()] == ["place"]


def test_saving_where_it_cannot_be(artifact: rl.Artifact, tmp_path: Path) -> None:
    file, full = tmp_path / "file", tmp_path / "full"
    file.write_text("precious")
    full.mkdir()
    (full / "notes.txt").write_text("precious")
    for place, message in (
        (file, "is a file"),
        (file / "below", "cannot be written"),
        (file / "below" / "deeper", "cannot be written"),
        (full, "holds something that is not an artifact"),
    ):
        with pytest.raises(ArtifactError, match=message) as caught:
            artifact.save(place)
        assert str(place) in str(caught.value)
    assert file.read_text() == "precious"
    assert [entry.name for entry in full.iterdir()] == ["notes.txt"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "full"]


def test_saving_one_that_has_lost_a_file(artifact: rl.Artifact, tmp_path: Path) -> None:
    broken = rl.load(shutil.copytree(artifact.path, tmp_path / "broken"))
    (broken.path / "lib.so").unlink()
    with pytest.raises(ArtifactError):
        broken.save(tmp_path / "copy")
    assert [entry.name for entry in tmp_path.iterdir()] == ["broken"]
