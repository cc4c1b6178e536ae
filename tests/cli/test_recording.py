"""The commands record, replay and repro, and the code that inspect shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    from tests.cli.conftest import Outcome

    Call = Callable[..., Outcome]

DOWN = "layers.0.mlp.down_proj"


def test_record_and_replay(call: Call, artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.rec"
    done = call("record", artifact, "--ids", "-p", "1,2,3", "--site", "layers.0.mlp.*", "-o", file, "-n", "2")
    assert done.code == 0, done.err
    assert "launches, " in done.out
    done = call("replay", file, "--time", "--repeat", "2")
    assert done.code == 0, done.err
    assert "all equal bit for bit" in done.out
    assert DOWN in done.out
    done = call("replay", file, "--json", "--with", artifact, "--site", DOWN)
    assert [row["equal"] for row in done.json["launches"]] == [True] * 3
    for arguments, said in (
        ([file, "--kernel", "fastest"], "no kernel 'fastest'"),
        ([file, "--site", "nowhere"], "no launch at 'nowhere'"),
        ([file, "--cold"], "--cold goes with --time"),
        ([tmp_path / "none"], "No such file"),
        ([artifact / "weights.safetensors"], "not a recording"),
    ):
        done = call("replay", *arguments)
        assert (done.code, done.out) == (2, "")
        assert said in done.err
    done = call("record", artifact, "--ids", "-p", "1,2", "--site", "nowhere", "-o", file)
    assert done.code == 2
    assert "sites are named like" in done.err


def test_repro(call: Call, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("repro", artifact, "--ids", "-p", "1,2,3", "--site", DOWN)
    assert done.code == 0, done.err
    made = {file.name for file in (tmp_path / f"repro-{DOWN}").iterdir()}
    assert {"repro.py", "kernel.py", "x.npy", "weight.npy", "expected_out.npy"} <= made
    assert f"repro-{DOWN}/repro.py" in done.out
    for arguments, said in (
        ([], "with --site"),
        (["--site", "layers.0.*"], "name one site"),
        (["--site", DOWN, "--function", "train"], "no function 'train'"),
        (["--site", DOWN, "--kernel", "fastest"], "'fastest'"),
    ):
        done = call("repro", artifact, "--ids", "-p", "1,2,3", *arguments)
        assert (done.code, done.out) == (2, "")
        assert said in done.err


def test_inspect_shows_code(call: Call, artifact: Path) -> None:
    for form, said in (
        ("--source", "def streaming("),
        ("--tir", "@T.prim_func"),
        ("--llvm", "define "),
        ("--assembly", "ret"),
    ):
        done = call("inspect", artifact, form, "streaming")
        assert done.code == 0, done.err
        assert said in done.out
    assert call("inspect", artifact, "--tir", DOWN).out.count("def tiled__matmul") == 1
    done = call("inspect", artifact, "--tir", "nowhere")
    assert done.code == 2
    assert "no kernel and no site 'nowhere'" in done.err
