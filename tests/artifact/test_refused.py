"""Artifacts that must not run: each is refused with a sentence that names the file or the field."""

from __future__ import annotations

import json
import platform
import shutil
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm import cpu
from relax_llm.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Damaged


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    """Set a field: "weights.0.shape" goes through lists by index."""
    *outer, last = path.split(".")

    def change(data: dict[str, Any]) -> None:
        inner: Any = data
        for name in outer:
            inner = inner[int(name) if isinstance(inner, list) else name]
        inner[int(last) if isinstance(inner, list) else last] = value

    return change


OTHER = "aarch64" if cpu.architecture() == "x86_64" else "x86-64"

MACHINES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a processor feature": (
        lambda data: data["features"].append("avx1024"),
        r"this processor lacks avx1024\b.*--target",
    ),
    "another processor": (_set("target", OTHER), rf"was compiled for {OTHER}, but this processor is"),
    "an unknown processor": (_set("target", "riscv64"), r"was compiled for riscv64"),
    "another TVM": (_set("versions", {"apache-tvm": "0.1.0"}), r"compiled with apache-tvm 0\.1\.0, but"),
    "no TVM": (_set("versions", {}), r"compiled with apache-tvm None, but"),
    "another format": (_set("format", 1), r"manifest\.json: the artifact has format 1, but .* format 3"),
    "a format of text": (_set("format", "1"), r"has format '1'"),
    "no format": (lambda data: data.pop("format"), r"manifest\.json: .*format"),
}

FIELDS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a field is missing": (lambda data: data.pop("vocab_size"), "vocab_size"),
    "a field too many": (_set("colour", "red"), "colour"),
    "vocab_size is text": (_set("vocab_size", "37"), "vocab_size"),
    "vocab_size is true": (_set("vocab_size", True), "vocab_size"),
    "context_length is a fraction": (_set("context_length", 200.0), "context_length"),
    "hidden_size is null": (_set("hidden_size", None), "hidden_size"),
    "target is a number": (_set("target", 3), "target"),
    "features is text": (_set("features", "avx2"), "features"),
    "features has lists": (_set("features", [["avx2"]]), "features"),
    "features is null": (_set("features", None), "features"),
    "versions is a list": (_set("versions", ["apache-tvm"]), "versions"),
    "versions has numbers": (_set("versions", {"apache-tvm": 0.27}), "versions.apache-tvm"),
    "config is a list": (_set("config", []), "config"),
    "generation_config is null": (_set("generation_config", None), "generation_config"),
    "notes is text": (_set("notes", "be careful"), "notes"),
    "caches is an object": (_set("caches", {}), "caches"),
    "a cache is a list": (_set("caches.0", ["layers.0", 2, 6]), "caches"),
    "a cache has text for heads": (_set("caches.0.kv_heads", "2"), "caches.kv_heads"),
    "a cache lacks a field": (lambda data: data["caches"][0].pop("site"), "caches"),
    "a weight's shape is a number": (_set("weights.0.shape", 5), "weights.shape"),
    "a weight's shape has text": (_set("weights.0.shape", ["x"]), "weights.shape"),
    "a weight's dtype is null": (_set("weights.0.dtype", None), "weights.dtype"),
    "kernels is a list": (_set("kernels", []), "kernels"),
    "a kernel is null": (_set("kernels", {"positions": None}), "kernels.positions"),
    "functions is a list": (_set("functions", ["prefill"]), "functions"),
    "a function is null": (_set("functions.decode", None), "functions.decode"),
    "a launch lacks its kernel": (
        lambda data: data["functions"]["decode"][0].pop("kernel"),
        "functions.decode",
    ),
    "an argument's shape is text": (_set("functions.decode.0.arguments.0.shape", "1"), "arguments.shape"),
    "files is a list": (_set("files", ["lib.so"]), "files"),
    "a file is a number": (_set("files", {"lib.so": 7}), r"files\.lib\.so"),
    "a file's size is text": (
        _set("files", {"lib.so": {"size": "7", "digest": ""}}),
        r"files\.lib\.so\.size",
    ),
    "no library": (lambda data: data["files"].pop("lib.so"), r"does not list lib\.so"),
    "no weights": (
        lambda data: data["files"].pop("weights.safetensors"),
        r"does not list weights\.safetensors",
    ),
}

OUTSIDE = ("../secret", "/etc/hostname", "a/../../secret", "sub/file", "../damaged/lib.so", ".")


@pytest.mark.parametrize("case", list(MACHINES))
def test_made_for_something_else(damaged: Damaged, case: str) -> None:
    change, message = MACHINES[case]
    damaged.edit(change)
    with pytest.raises(ArtifactError, match=message) as caught:
        rl.load(damaged.path)
    assert str(damaged.path) in str(caught.value)


@pytest.mark.parametrize("case", list(FIELDS))
def test_fields_of_the_manifest(damaged: Damaged, case: str) -> None:
    change, message = FIELDS[case]
    damaged.edit(change)
    with pytest.raises(ArtifactError, match=message) as caught:
        rl.load(damaged.path)
    assert str(damaged.path / "manifest.json") in str(caught.value)


@pytest.mark.parametrize("name", OUTSIDE)
def test_file_names_that_point_outside(damaged: Damaged, name: str) -> None:
    """Neither read nor reported as changed: whatever lies there is none of the artifact's business."""
    (damaged.path.parent / "secret").write_text("secret")
    damaged.edit(lambda data: data["files"].update({name: {"size": 6, "digest": "0"}}))
    with pytest.raises(ArtifactError, match="points outside the artifact") as caught:
        rl.load(damaged.path)
    assert repr(name) in str(caught.value)


TEXTS = {
    "empty": b"",
    "not JSON": b"hello",
    "cut off": b'{"format": 1, "vers',
    "a list": b"[1, 2]",
    "a number": b"1",
    "a string": b'"manifest"',
    "null": b"null",
    "not UTF-8": b"\xff\xfe\x00{",
    "nested without end": b"[" * 100_000,
    "an empty object": b"{}",
}


@pytest.mark.parametrize("case", list(TEXTS))
def test_what_is_no_manifest(damaged: Damaged, case: str) -> None:
    (damaged.path / "manifest.json").write_bytes(TEXTS[case])
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        rl.load(damaged.path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "cut off": (_cut, "has changed"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "has changed"),
    "one bit": (_flip, "has changed"),
    "empty": (lambda path: path.write_bytes(b""), "has changed"),
    "a directory": (_replace_by_directory, "is missing"),
    "a link to nowhere": (_dangling, "is missing"),
}


@pytest.mark.parametrize("name", ["lib.so", "weights.safetensors"])
@pytest.mark.parametrize("case", list(DAMAGE))
def test_damaged_files(damaged: Damaged, case: str, name: str) -> None:
    damage, message = DAMAGE[case]
    damage(damaged.path / name)
    with pytest.raises(ArtifactError, match=message) as caught:
        rl.load(damaged.path)
    assert str(damaged.path / name) in str(caught.value)


def test_large_files_are_sampled(tmp_path: Path) -> None:
    """Of a file over 64 MiB, size and samples are compared, both ends among them."""
    from relax_llm.artifact.artifact import describe

    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(65 * 2**20)
    before = describe(path)
    assert describe(path) == before
    for position in (0, 65 * 2**20 - 1):
        with path.open("r+b") as file:
            file.seek(position)
            file.write(b"\1")
        assert describe(path) != before
        with path.open("r+b") as file:
            file.seek(position)
            file.write(b"\0")
    with path.open("ab") as file:
        file.write(b"\0")
    assert describe(path) != before


def test_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in (
        ("nowhere", "the directory does not exist"),
        ("empty", r"it has no manifest\.json"),
        ("file", r"it has no manifest\.json"),
        ("file/below", r"is not an artifact"),
    ):
        with pytest.raises(ArtifactError, match=message) as caught:
            rl.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "relax-llm compile" in str(caught.value)


# What the digests vouch for may still be wrong; then the runner refuses it.

LIBRARIES: dict[str, bytes] = {
    "empty": b"",
    "text": b"not a library",
    "an ELF header alone": b"\x7fELF\x02\x01\x01" + bytes(57),
}


@pytest.mark.parametrize("case", list(LIBRARIES))
def test_a_library_that_cannot_be_loaded(damaged: Damaged, case: str) -> None:
    (damaged.path / "lib.so").write_bytes(LIBRARIES[case])
    damaged.vouch("lib.so")
    with pytest.raises(ArtifactError, match=r"lib\.so cannot be loaded"):
        rl.Runner(rl.load(damaged.path))


@pytest.mark.skipif(platform.system() != "Linux", reason="names a library of Linux")
def test_a_library_of_something_else(damaged: Damaged) -> None:
    import _ctypes

    shutil.copyfile(_ctypes.__file__, damaged.path / "lib.so")
    damaged.vouch("lib.so")
    with pytest.raises(ArtifactError, match=r"lib\.so cannot be loaded"):
        rl.Runner(rl.load(damaged.path))


def test_a_function_that_the_library_lacks(damaged: Damaged) -> None:
    damaged.edit(lambda data: data["functions"].update({"dream": []}))
    with pytest.raises(ArtifactError, match="dream"):
        rl.Runner(rl.load(damaged.path))


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write(path: Path, header: Any, rest: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def _entry(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        header, rest = _header(path)
        change(next(iter(header.values())))
        _write(path, header, rest)

    return damage


WEIGHTS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "a header length alone": lambda path: path.write_bytes(bytes(8)),
    "a header length that lies": lambda path: path.write_bytes(
        struct.pack("<Q", 2**63) + path.read_bytes()[8:]
    ),
    "a header that is a list": lambda path: _write(path, [1], _header(path)[1]),
    "a header that is no JSON": lambda path: path.write_bytes(struct.pack("<Q", 4) + b"{{{{" + bytes(100)),
    "a header nested without end": lambda path: path.write_bytes(struct.pack("<Q", 10**5) + b"[" * 10**5),
    "a tensor is missing": lambda path: _write(
        path, dict(list(_header(path)[0].items())[1:]), _header(path)[1]
    ),
    "a tensor is null": lambda path: _write(path, dict.fromkeys(_header(path)[0]), _header(path)[1]),
    "data is cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "another dtype": _entry(lambda entry: entry.update(dtype="F16")),
    "another shape": _entry(lambda entry: entry.update(shape=[1, 2])),
    "offsets beyond the file": _entry(
        lambda e: e.update(data_offsets=[x + 2**40 for x in e["data_offsets"]])
    ),
    "offsets before the file": _entry(
        lambda e: e.update(data_offsets=[x - 2**20 for x in e["data_offsets"]])
    ),
    "offsets of text": _entry(lambda entry: entry.update(data_offsets=["0", "1"])),
    "no offsets": _entry(lambda entry: entry.pop("data_offsets")),
    "offsets of another size": _entry(lambda entry: entry.update(data_offsets=[0, 4])),
}


@pytest.mark.parametrize("case", list(WEIGHTS))
def test_weights_that_cannot_be_read(damaged: Damaged, case: str) -> None:
    WEIGHTS[case](damaged.path / "weights.safetensors")
    damaged.vouch("weights.safetensors")
    with pytest.raises(ArtifactError, match=r"weights\.safetensors: the weights cannot be read"):
        rl.Runner(rl.load(damaged.path))


def test_offsets_may_not_reach_into_the_header(damaged: Damaged) -> None:
    """A tensor that begins a little before the data would read the header's own bytes as weights."""
    _entry(lambda e: e.update(data_offsets=[x - 64 for x in e["data_offsets"]]))(
        damaged.path / "weights.safetensors"
    )
    damaged.vouch("weights.safetensors")
    with pytest.raises(ArtifactError, match="cannot be read"):
        rl.Runner(rl.load(damaged.path))


def test_what_is_vouched_for_and_right_runs(damaged: Damaged, artifact: rl.Artifact) -> None:
    """The damage above is refused for what it is, not for the vouching."""
    damaged.vouch("lib.so")
    damaged.vouch("weights.safetensors")
    expected = rl.Runner(artifact)
    runner = rl.Runner(rl.load(damaged.path))
    np.testing.assert_array_equal(runner.decode(runner.start(), 1), expected.decode(expected.start(), 1))
