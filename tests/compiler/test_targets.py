"""Other targets: compiled here for another processor, linked where a linker is installed, never run by mistake."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

import relax_llm as rl
from relax_llm import cpu
from relax_llm.artifact import artifact as artifacts
from relax_llm.cli import main
from relax_llm.compiler.link import cross_linker
from relax_llm.errors import ArtifactError, CompileError

from ..artifact.checkpoints import LLAMA, write
from ..door.kernels import in_c

if TYPE_CHECKING:
    from pathlib import Path

AARCH64 = 183
"""ELF's number for it."""

RELOCATABLE, SHARED = 1, 3

pytestmark = pytest.mark.skipif(
    cpu.architecture() != "x86_64", reason="aarch64 is not another processor here"
)

STAND_IN = """#!/bin/sh
# aarch64-linux-gnu-g++ -shared -o OUTPUT INPUTS...
echo "$@" > "{directory}/arguments"
cp "$4" "$3"
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("targets") / "tiny", LLAMA)


@pytest.fixture(scope="module")
def unlinked(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> rl.Artifact:
    """An artifact for aarch64 from where no linker for it is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relax_llm.compiler.link.cross_linker", lambda _: None)
        return rl.compile(checkpoint, target="aarch64", output=tmp_path_factory.mktemp("targets") / "objects")


def elf(data: bytes) -> tuple[int, int]:
    """An ELF file's type and machine."""
    assert data[:5] == b"\x7fELF\x02"
    kind, machine = struct.unpack_from("<HH", data, 16)
    return kind, machine


def test_objects_are_for_the_target(unlinked: rl.Artifact, tmp_path: Path) -> None:
    with tarfile.open(unlinked.path / "lib.tar") as archive:
        members = {member.name: member for member in archive.getmembers()}
        assert members
        for name, member in members.items():
            file = archive.extractfile(member)
            assert file is not None
            data = file.read()
            assert elf(data) == (RELOCATABLE, AARCH64), name
            (tmp_path / name).write_bytes(data)
    if shutil.which("readelf"):
        for name in members:
            shown = subprocess.run(
                ["readelf", "-h", tmp_path / name], capture_output=True, text=True, check=True
            )
            assert "AArch64" in shown.stdout


def test_the_manifest_says_that_it_is_not_linked(unlinked: rl.Artifact) -> None:
    assert unlinked.manifest.target == "aarch64"
    assert "lib.so" not in unlinked.manifest.files
    assert any(
        "The library is not linked: no linker for aarch64" in note and "lib.tar" in note
        for note in unlinked.manifest.notes
    )


def test_loading_it_here_says_what_it_is_for(unlinked: rl.Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"compiled for aarch64, but this processor is x86_64"):
        rl.load(unlinked.path)


def test_loading_it_there_says_how_to_link_it(
    unlinked: rl.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On its own machine the objects are all that is missing; what is linked by hand is taken, and copied along."""
    copied = unlinked.save(tmp_path / "copy")
    monkeypatch.setattr(cpu, "architecture", lambda: "aarch64")
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"asimd"}))
    with pytest.raises(
        ArtifactError, match=r"no linker for aarch64 was installed.*tar xf lib\.tar.*g\+\+ -shared"
    ):
        rl.load(copied.path)
    (copied.path / "lib.so").write_bytes(b"linked")
    assert rl.load(copied.path).library.read_bytes() == b"linked"
    assert (rl.load(copied.path).save(tmp_path / "again").path / "lib.so").read_bytes() == b"linked"


def test_the_command_to_link_is_right(tmp_path: Path) -> None:
    """The same command, on objects for this machine, gives a library."""
    source = tmp_path / "a.c"
    source.write_text("int answer(void) { return 42; }")
    subprocess.run(["gcc", "-fPIC", "-c", source, "-o", tmp_path / "a.o"], check=True)
    with tarfile.open(tmp_path / "lib.tar", "w") as archive:
        archive.add(tmp_path / "a.o", "a.o")
    command = artifacts.how_to_link("x86_64").split("`")[1]
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, check=True)
    assert elf((tmp_path / "lib.so").read_bytes()) == (SHARED, 62)


def test_it_can_be_inspected(unlinked: rl.Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(unlinked.path)]) == 0
    shown = capsys.readouterr()
    assert "target        aarch64" in shown.out
    assert "matmul" in shown.out
    assert "not linked" in " ".join(shown.err.split())


def test_a_linker_that_is_installed_is_used(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that writes down how it was called, and gives its first object."""
    command = tmp_path / "bin" / "aarch64-linux-gnu-g++"
    command.parent.mkdir()
    command.write_text(STAND_IN.format(directory=tmp_path))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    made = rl.compile(checkpoint, target="aarch64", output=tmp_path / "out")
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[:2] == ["-shared", "-o"]
    assert all(name.endswith(".o") for name in arguments[3:])
    assert elf(made.library.read_bytes())[1] == AARCH64
    assert not any("not linked" in note for note in made.manifest.notes)
    command.write_text("#!/bin/sh\necho no room >&2; exit 1")
    with pytest.raises(CompileError, match=r"aarch64-linux-gnu-g\+\+ -shared says: no room"):
        rl.compile(checkpoint, target="aarch64", output=tmp_path / "again", cache=False)


def test_c_for_this_machine_does_not_get_into_a_library_for_another(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CompileError, match=r"kernel in C was compiled for x86_64.*--target aarch64 takes kernels"
    ):
        rl.compile(checkpoint, target="aarch64", kernels=[in_c()], output=tmp_path / "out")


@pytest.mark.skipif(cross_linker("aarch64") is None, reason="no linker for aarch64 is installed")
def test_a_library_is_linked(checkpoint: Path, tmp_path: Path) -> None:
    made = rl.compile(checkpoint, target="aarch64", output=tmp_path / "out")
    assert elf(made.library.read_bytes()) == (SHARED, AARCH64)


@pytest.mark.parametrize("target", ["x86-64", "x86-64-v2", "x86-64-v3"])
def test_lower_levels_run_here(checkpoint: Path, target: str, tmp_path: Path) -> None:
    if not cpu.X86_LEVELS[target] <= cpu.features():
        pytest.skip(f"this processor is below {target}")
    made = rl.compile(checkpoint, target=target, output=tmp_path / "out")
    runner = rl.Runner(made)
    assert runner.prefill(runner.start(), [1, 2, 3]).shape == (LLAMA["vocab_size"],)
    assert set(made.manifest.features) == cpu.X86_LEVELS[target]


def test_an_unknown_target_is_answered_with_the_known_ones(checkpoint: Path) -> None:
    with pytest.raises(
        CompileError, match=r"target 'riscv64' is not known. Known targets: x86-64, .*aarch64"
    ):
        rl.compile(checkpoint, target="riscv64")
