"""The cache of compiled artifacts: when it is used, when it must not be, and that it is always whole."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import sys
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm import cpu
from relax_llm.artifact.artifact import versions
from relax_llm.compiler import compile as compiling
from relax_llm.errors import ArchitectureError, ArtifactError, CheckpointError, CompileError
from relax_llm.layers import Decoder

from ..machines import PLAINER
from .checkpoints import LLAMA, llama_shapes, tensors_for, write
from .process import finish, forbid, run, start

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own: the folder with its artifacts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "relax_llm" / "artifacts"


@pytest.fixture
def builds(artifact: rl.Artifact, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the compiler by a copy of an artifact, so that a miss costs nothing, and list its calls."""
    made: list[Path] = []

    def build(_checkpoint: Any, directory: Path, _bars: Any, **_options: Any) -> None:
        made.append(directory)
        for file in artifact.path.iterdir():
            shutil.copyfile(file, directory / file.name)

    monkeypatch.setattr(compiling, "_build", build)
    return made


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A checkpoint that the test may change."""
    return write(tmp_path / "own", LLAMA, generation_config={"eos_token_id": 2})


def _entries(cache: Path) -> list[str]:
    """What a cache holds, but for locks, which stay so that they lock."""
    return sorted(entry.name for entry in cache.iterdir() if entry.suffix != ".lock")


def test_the_second_compilation_is_the_first(builds: list[Path], cache: Path, own: Path) -> None:
    first = rl.compile(own)
    assert rl.compile(own) == first == rl.compile(rl.open_checkpoint(own)) == rl.compile(str(own))
    assert len(builds) == 1
    assert _entries(cache) == [first.path.name]
    assert first.path.name.startswith("own-f32-")


def test_only_the_user_may_read_it(builds: list[Path], cache: Path, own: Path) -> None:
    artifact = rl.compile(own)
    for directory in (cache, artifact.path):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_without_a_variable_it_is_in_the_home(
    builds: list[Path], cache: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", None):
        if value is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert rl.compile(own).path.parent == tmp_path / "home" / ".cache" / "relax_llm" / "artifacts"
    assert len(builds) == 1


CHANGES: dict[str, Callable[[Path], Any]] = {
    "config.json": lambda path: (path / "config.json").write_text(
        json.dumps({**LLAMA, "rms_norm_eps": 1e-3})
    ),
    "the weights": lambda path: write(path, LLAMA, seed=1),
    "more weights": lambda path: write(path, LLAMA, {**tensors_for(llama_shapes(LLAMA)), "x": np.zeros(3)}),
    "generation_config.json": lambda path: (path / "generation_config.json").write_text(
        '{"eos_token_id": 3}'
    ),
    "tokenizer.json": lambda path: (path / "tokenizer.json").write_text("{}"),
    "tokenizer_config.json": lambda path: (path / "tokenizer_config.json").write_text("{}"),
    "chat_template.jinja": lambda path: (path / "chat_template.jinja").write_text("{{ messages }}"),
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_another_checkpoint(builds: list[Path], cache: Path, own: Path, what: str) -> None:
    first = rl.compile(own)
    CHANGES[what](own)
    assert rl.compile(own).path != first.path
    assert len(builds) == 2
    assert len(_entries(cache)) == 2


def test_a_checkpoint_with_another_config(builds: list[Path], cache: Path, own: Path) -> None:
    """A checkpoint in hand may be given another config than its file has."""
    opened = rl.open_checkpoint(own)
    rl.compile(opened)
    rl.compile(dataclasses.replace(opened, config={**opened.config, "rms_norm_eps": 0.5}))
    assert len(builds) == 2


def test_other_options(builds: list[Path], cache: Path, own: Path) -> None:
    paths = [
        rl.compile(own).path,
        rl.compile(own, weights="bf16").path,
        rl.compile(own, weights="bf16,lm_head=q8").path,
        rl.compile(own, target="x86-64").path,
        rl.compile(own, target="x86-64-v2").path,
        rl.compile(own, architecture="gpt2").path,
    ]
    assert len(set(paths)) == len(builds) == 6


def test_another_processor(
    builds: list[Path], cache: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that several machines share: what the host adds to its level is in the code."""
    rl.compile(own)
    features = cpu.features()
    monkeypatch.setattr(cpu, "features", lambda: features | {"avx1024"})
    rl.compile(own)
    assert len(builds) == 2


def test_another_version(builds: list[Path], cache: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rl.compile(own)
    monkeypatch.setattr(compiling, "versions", lambda: {**versions(), "apache-tvm": "9.9"})
    rl.compile(own)
    assert len(builds) == 2


def test_other_sources_of_the_package(
    builds: list[Path], cache: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed kernel, pass or architecture is not served from the cache."""
    rl.compile(own)
    extra = tmp_path / "extra"
    (extra / "deep").mkdir(parents=True)
    (extra / "deep" / "kernel.py").write_text("a = 1")
    monkeypatch.setattr(rl, "__path__", [*rl.__path__, str(extra)])
    rl.compile(own)
    assert len(builds) == 2
    (extra / "deep" / "kernel.py").write_text("a = 2")
    rl.compile(own)
    assert len(builds) == 3
    (extra / "deep" / "kernel.py").rename(extra / "deep" / "other.py")
    rl.compile(own)
    assert len(builds) == 4
    (extra / "notes.txt").write_text("no source")
    rl.compile(own)
    assert len(builds) == 4


SOURCE = """
from relax_llm.layers import Decoder


class Mine(Decoder):
    width = {width}
"""


def test_an_architecture_file(builds: list[Path], cache: Path, own: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE.format(width=1))
    rl.compile(own, architecture=file)
    rl.compile(own, architecture=str(file))
    assert len(builds) == 1
    file.write_text(SOURCE.format(width=2))
    rl.compile(own, architecture=file)
    file.write_bytes(b"# \xe9\n" + SOURCE.format(width=2).encode())
    rl.compile(own, architecture=file)
    assert len(builds) == 3
    with pytest.raises(ArchitectureError, match=r"nowhere\.py cannot be read"):
        rl.compile(own, architecture=tmp_path / "nowhere.py")


def _module(name: str, path: Path | None, source: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of this source, as if imported from a file, or typed into a session."""
    module = types.ModuleType(name)
    if path is not None:
        path.write_text(source)
        module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, name, module)
    exec(source, module.__dict__)
    return module


def test_an_architecture_class(
    builds: list[Path], cache: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for expected, width in ((1, 1), (1, 1), (2, 2)):
        module = _module("mine", tmp_path / "mine.py", SOURCE.format(width=width), monkeypatch)
        rl.compile(own, architecture=module.Mine)
        assert len(builds) == expected


def test_the_base_of_an_architecture_class(
    builds: list[Path], cache: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    derived = "from mine import Mine\n\n\nclass Derived(Mine):\n    pass\n"
    for expected, width in ((1, 1), (1, 1), (2, 2)):
        _module("mine", tmp_path / "mine.py", SOURCE.format(width=width), monkeypatch)
        module = _module("derived", tmp_path / "derived.py", derived, monkeypatch)
        rl.compile(own, architecture=module.Derived)
        assert len(builds) == expected


def test_classes_whose_source_says_too_little_are_never_taken_for_each_other(
    builds: list[Path], cache: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one name and without a file, or from one function with different arguments: they may be different models."""
    for width in (1, 2):
        module = _module("session", None, SOURCE.format(width=width), monkeypatch)
        rl.compile(own, architecture=module.Mine)

    def make(width: int) -> type[Decoder]:
        return type("Made", (Decoder,), {"width": width, "__qualname__": "make.<locals>.Made"})

    for width in (1, 2):
        rl.compile(own, architecture=make(width))
    assert len(builds) == 4


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "a manifest that is no JSON": lambda path: (path / "manifest.json").write_bytes(b"\xff\0{"),
    "a manifest of another shape": lambda path: (path / "manifest.json").write_text('{"format": 2}'),
    "no library": lambda path: (path / "lib.so").unlink(),
    "a changed library": lambda path: (path / "lib.so").write_bytes(b"no"),
    "cut weights": lambda path: os.truncate(path / "weights.safetensors", 100),
    "no files": lambda path: list(map(os.unlink, path.iterdir())),
}


@pytest.mark.parametrize("what", list(DAMAGE))
def test_a_damaged_entry_is_made_again(builds: list[Path], cache: Path, own: Path, what: str) -> None:
    first = rl.compile(own)
    DAMAGE[what](first.path)
    again = rl.compile(own)
    assert again == first
    assert len(builds) == 2
    assert rl.load(again.path) == again
    assert _entries(cache) == [first.path.name]


def test_an_output_is_served_from_the_cache_and_independent_of_it(
    builds: list[Path], cache: Path, own: Path, tmp_path: Path
) -> None:
    cached = rl.compile(own)
    copy = rl.compile(own, output=tmp_path / "out")
    assert len(builds) == 1
    assert copy.path == tmp_path / "out"
    shutil.rmtree(cached.path)
    assert rl.load(copy.path).manifest == cached.manifest
    rl.compile(own, output=tmp_path / "out", cache=False)
    assert len(builds) == 2
    with pytest.raises(CompileError, match="output"):
        rl.compile(own, cache=False)
    assert len(builds) == 2


OUTPUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a file": (lambda path: _touch(path / "file"), "is a file"),
    "below a file": (lambda path: _touch(path / "file") / "out", "cannot be written"),
    "far below a file": (lambda path: _touch(path / "file") / "a" / "out", "cannot be written"),
    "a folder of other things": (lambda path: _touch(path / "full" / "notes.txt").parent, "not an artifact"),
    "the checkpoint itself": (lambda path: path / "own", "not an artifact"),
    "its parent": (lambda path: path, "not an artifact"),
}


def _touch(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    return path


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("what", list(OUTPUTS))
def test_outputs_that_are_refused(
    builds: list[Path], cache: Path, own: Path, tmp_path: Path, what: str, cached: bool
) -> None:
    """Before anything is compiled, and without a trace."""
    if cached:
        rl.compile(own)
    place, message = OUTPUTS[what][0](tmp_path), OUTPUTS[what][1]
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(ArtifactError, match=message) as caught:
        rl.compile(own, output=place)
    assert str(place) in str(caught.value)
    assert len(builds) == cached
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_cache_that_cannot_be_made(
    builds: list[Path], own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(_touch(tmp_path / "file")))
    with pytest.raises(ArtifactError, match=r"The cache .*file.* cannot be used .*XDG_CACHE_HOME"):
        rl.compile(own)


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), OSError(28, "No space left on device"), KeyboardInterrupt()]
)
def test_a_build_that_fails_leaves_nothing(
    cache: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def build(_checkpoint: Any, directory: Path, _bars: Any, **_options: Any) -> None:
        (directory / "lib.so").write_bytes(b"half")
        raise error

    monkeypatch.setattr(compiling, "_build", build)
    expected = ArtifactError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        rl.compile(own)
    assert _entries(cache) == []
    with pytest.raises(expected):
        rl.compile(own, output=tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_options_that_are_refused(builds: list[Path], cache: Path, own: Path, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"weight format 'q4_9' is not known; known: f32"):
        rl.compile(own, weights="q4_9")
    with pytest.raises(CheckpointError, match="nowhere"):
        rl.compile(tmp_path / "nowhere")
    assert builds == []


def test_an_unknown_target_leaves_nothing(cache: Path, own: Path) -> None:
    with pytest.raises(CompileError, match=r"'x86-64-v7' is not known\. Known targets"):
        rl.compile(own, target="x86-64-v7")
    assert _entries(cache) == []


COMPILE = f"""
import json, sys
import relax_llm as rl

artifact = rl.compile(sys.argv[1], target={PLAINER!r})
print(json.dumps({{"path": str(artifact.path), "tvm": "tvm" in sys.modules}}))
"""


def test_a_hit_needs_no_compiler(cache: Path, own: Path, tmp_path: Path) -> None:
    """The first process compiles; the second could not if it wanted to."""
    environment = {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
    first = run(COMPILE, own, env=environment)
    assert first["tvm"]
    forbidden = forbid("tvm", "torch", "transformers", "relax_llm.kernels", "relax_llm.layers")
    second = run(forbidden + COMPILE, own, env=environment)
    assert second == {"path": first["path"], "tvm": False}
    with pytest.raises(AssertionError, match="was imported"):
        run(forbidden + COMPILE.replace(f"target={PLAINER!r}", "target='x86-64'"), own, env=environment)


def test_two_processes_at_once(cache: Path, own: Path, tmp_path: Path) -> None:
    """One compiles, the other waits; both get the one artifact."""
    environment = {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
    processes = [start(COMPILE, own, env=environment) for _ in range(2)]
    results = [finish(process) for process in processes]
    assert results[0]["path"] == results[1]["path"]
    assert sum(result["tvm"] for result in results) == 1, "both have compiled"
    assert _entries(cache) == [Path(results[0]["path"]).name]
    runner = rl.Runner(rl.load(results[0]["path"]))
    assert np.isfinite(runner.prefill(runner.start(), [1, 2, 3])).all()


INTERRUPTED = f"""
import contextlib, json, os, resource, signal, sys
import relax_llm as rl
from relax_llm.progress import Silent


class Trap(Silent):
    @contextlib.contextmanager
    def task(self, name, total):
        if name == "Packing weights":
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        yield lambda _: None


rl.compile(sys.argv[1], progress=Trap(), target={PLAINER!r})
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_an_interrupted_build_is_not_taken_for_a_whole_one(
    builds: list[Path], cache: Path, own: Path, tmp_path: Path, name: str
) -> None:
    process = start(INTERRUPTED, own, name, env={"XDG_CACHE_HOME": str(tmp_path / "xdg")})
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert (name == "SIGINT") == ("KeyboardInterrupt" in err)
    left = _entries(cache)
    assert all(entry.startswith(".") for entry in left)
    if name == "SIGINT":
        assert left == [], "what can be cleaned up is cleaned up"
    artifact = rl.compile(own, target=PLAINER)
    assert len(builds) == 1
    assert rl.load(artifact.path) == artifact
    assert [entry for entry in _entries(cache) if not entry.startswith(".")] == [artifact.path.name]


FULL = """
import resource, sys
import relax_llm as rl
from relax_llm.errors import RelaxLLMError

limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
import json
try:
    rl.compile(sys.argv[1], **json.loads(sys.argv[3]))
except RelaxLLMError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of processes are of POSIX")
def test_a_full_disk(tmp_path: Path) -> None:
    """The library still fits, the weights do not."""
    large, out = write(tmp_path / "large", {**LLAMA, "vocab_size": 60_000}), tmp_path / "out"
    kind, message = run(
        FULL, large, 4_000_000, json.dumps({"output": str(out), "cache": False, "target": PLAINER})
    )
    assert kind == "ArtifactError"
    assert message == f"{out} cannot be written: File too large."
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def _used(place: Path, hours: float) -> None:
    """Say that an artifact was used so many hours ago."""
    when = time.time() - 3600 * hours
    os.utime(place, (when, when))


def _three(cache: Path, own: Path) -> list[Path]:
    """Three artifacts in the cache, used three, two and four hours ago."""
    places = [rl.compile(own, weights=weights, target=PLAINER).path for weights in ("f32", "bf16", "f16")]
    for place, hours in zip(places, (3, 2, 4), strict=True):
        _used(place, hours)
    assert sorted(place.name for place in places) == sorted(
        path.name for path in cache.iterdir() if path.is_dir()
    )
    return places


def _gigabytes(place: Path, count: float) -> str:
    return str(count * sum(file.stat().st_size for file in place.iterdir()) / 1e9)


def test_what_was_used_longest_ago_goes(
    cache: Path, builds: list[Path], own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, half, other = _three(cache, own)
    monkeypatch.setenv("RELAX_LLM_CACHE_SIZE", _gigabytes(whole, 3.5))
    new = rl.compile(own, weights="q8", target=PLAINER).path
    assert len(builds) == 4
    assert [place.is_dir() for place in (whole, half, other, new)] == [True, True, False, True]
    rl.compile(own, target=PLAINER)  # found, and so used
    _used(new, 1.5)
    monkeypatch.setenv("RELAX_LLM_CACHE_SIZE", _gigabytes(whole, 2.5))
    newer = rl.compile(own, weights="q4", target=PLAINER).path
    assert len(builds) == 5
    assert [place.is_dir() for place in (whole, half, new, newer)] == [True, False, False, True]


def test_what_was_used_just_now_stays(
    cache: Path, builds: list[Path], own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = _three(cache, own)
    for place in places:
        _used(place, 0.5)
    monkeypatch.setenv("RELAX_LLM_CACHE_SIZE", "0")
    new = rl.compile(own, weights="q8", target=PLAINER).path
    assert all(place.is_dir() for place in (*places, new))


def test_a_cache_that_has_room_keeps_all(cache: Path, builds: list[Path], own: Path) -> None:
    places = _three(cache, own)
    rl.compile(own, weights="q8", target=PLAINER)
    assert all(place.is_dir() for place in places)


@pytest.mark.parametrize("told", ["much", "-1", "nan"])
def test_a_size_that_is_none(
    told: str, cache: Path, builds: list[Path], own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELAX_LLM_CACHE_SIZE", told)
    with pytest.raises(CompileError, match=f"RELAX_LLM_CACHE_SIZE is '{told}'"):
        rl.compile(own, target=PLAINER)
    assert builds == []
