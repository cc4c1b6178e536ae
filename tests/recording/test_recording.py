"""Recordings: bitwise the run that was recorded, made again alone, elsewhere, otherwise; and what goes wrong."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors import safe_open

import relax_llm as rl
from relax_llm.errors import ArtifactError, InputError, RecordingError
from relax_llm.runtime.recording.replay import Replay
from tests.recording.conftest import DOWN, IDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_recording_changes_nothing(runner: rl.Runner, tmp_path: Path) -> None:
    plain = runner.start()
    expected = [runner.prefill(plain, IDS).copy(), runner.decode(plain, 4).copy()]
    state = runner.start()
    with runner.recording(tmp_path / "x.rec") as recording:
        found = [runner.prefill(state, IDS), runner.decode(state, 4)]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert state.tokens == plain.tokens
    assert len(recording.launches) == sum(
        len(runner.artifact.manifest.functions[f]) for f in ("prefill", "decode")
    )
    assert np.array_equal(runner.prefill(runner.start(), IDS), expected[0])
    assert [path.name for path in tmp_path.iterdir()] == ["x.rec"]


def test_every_launch_is_made_again_bit_for_bit(recorded: Callable[..., Replay]) -> None:
    replayed = recorded()
    assert {launch.operator for launch in replayed} >= {"matmul", "attention", "append", "norm", "embedding"}
    for checked in replayed.check():
        assert checked.equal, checked
        assert checked.max_abs == 0
    append = next(
        launch for launch in replayed if launch.operator == "append" and launch.function == "decode"
    )
    assert set(append.results) == {"k_cache", "v_cache", "q"}
    grown = append.results["k_cache"] != append.inputs()["k_cache"]
    assert 0 < grown.sum() <= 2 * 6
    attention = next(launch for launch in replayed if launch.operator == "attention")
    assert set(attention.results) == {"out"}


def test_launches_are_chosen(recorded: Callable[..., Replay]) -> None:
    assert [str(launch) for launch in recorded(site=DOWN)] == [
        f"0:prefill[9] {DOWN}: matmul by few_rows (M = 5)",
        f"1:decode[9] {DOWN}: matmul by few_rows (M = 1)",
    ]
    assert {launch.operator for launch in recorded(operator="att*")} == {"attention"}
    assert {launch.kernel for launch in recorded(kernel="by_*")} == {"by_row", "by_position", "by_sequence"}
    assert len(recorded(site="layers.0.mlp.up_proj")) == 2  # a part of what was fused


def test_other_kernels_and_functions(recorded: Callable[..., Replay]) -> None:
    (launch, _) = recorded(site=DOWN)

    def by_hand(x: Any, weight: Any, bias: Any, residual: Any) -> Any:
        return x @ weight.T + bias + residual

    def doubled(*inputs: Any) -> Any:
        return by_hand(*inputs) * 2

    assert launch.check(kernel="any_rows").equal
    assert launch.check(kernel="plain_rows").max_abs < 1e-5
    assert launch.check(kernel=by_hand).max_abs < 1e-5
    wrong = launch.check(kernel=doubled)
    assert wrong.max_abs > 0.1
    assert "by doubled: off by at most" in str(wrong)
    for kernel in (None, "any_rows", by_hand):
        assert launch.time(kernel=kernel, repeat=2) > 0
    with pytest.raises(InputError, match=r"there are: .*few_rows"):
        launch.run(kernel="tiled")
    with pytest.raises(InputError, match=r"float32 of shape \(1, 5, 24\), not nothing"):
        launch.run(kernel=lambda *_: None)


def test_weights_by_value_need_no_artifact_to_compute(
    recorded: Callable[..., Replay], tmp_path: Path, artifact: rl.Artifact
) -> None:
    (launch, _) = recorded(site=DOWN, weights="values")
    copied = tmp_path / "moved.rec"
    data = launch._replay.path.read_bytes()
    copied.write_bytes(
        data.replace(str(artifact.path).encode(), b"/nowhere".ljust(len(str(artifact.path)), b"_"))
    )
    moved = rl.replay(copied)
    with pytest.raises(ArtifactError, match="recorded from cannot be opened"):
        moved[0].run()
    assert moved[0].check(kernel=lambda x, w, b, r: x @ w.T + b + r).max_abs < 1e-5
    assert moved[0].check(artifact).equal


def test_another_weight_is_refused(
    recorded: Callable[..., Replay], sources: tuple[Path, Path], tmp_path: Path, artifact: rl.Artifact
) -> None:
    copy = artifact.save(tmp_path / "copy")
    (launch, _) = recorded(site=DOWN)
    assert launch.check(copy).equal
    weights = copy.path / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    weights.write_bytes(data)
    other = rl.Artifact(tmp_path / "other", copy.manifest)
    copy.path.rename(other.path)
    replayed = recorded(operator="matmul")
    with pytest.raises(RecordingError, match=r'by reference, .* is another.*weights="values"'):
        replayed.check(other)


def test_in_another_process(recorded: Callable[..., Replay]) -> None:
    path = recorded(site=DOWN)[0]._replay.path
    code = (
        "import sys, relax_llm as rl\n"
        f"print([checked.equal for checked in rl.replay({str(path)!r}).check(kernel='any_rows')], 'tvm' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[True, True] False\n", "")


def test_one_launch_of_a_stepper(runner: rl.Runner, tmp_path: Path) -> None:
    state = runner.start()
    runner.prefill(state, IDS)
    with runner.steps("decode", state, 4) as steps:
        launch = steps.run_until(site=DOWN)
        assert launch is not None
        launch.record(tmp_path / "one.rec")
        out = launch.outputs[0].copy()
        with pytest.raises(InputError, match="was run already"):
            launch.record(tmp_path / "two.rec")
        logits = steps.finish()
    (found,) = rl.replay(tmp_path / "one.rec")
    assert np.array_equal(found.results["out"], out)
    state.truncate(len(IDS))
    assert np.array_equal(logits, runner.decode(state, 4))


def test_the_file_is_safetensors(recorded: Callable[..., Replay]) -> None:
    replayed = recorded(site=DOWN)
    with safe_open(replayed.path, "numpy") as opened:
        names = {one.after for launch in replayed for one in launch.made.arguments if one.after}
        assert names <= set(opened.keys())
        assert json.loads(opened.metadata()["recording"])["launches"][0]["site"] == DOWN


def test_nothing_that_matches_is_said(runner: rl.Runner, tmp_path: Path) -> None:
    path = tmp_path / "x.rec"
    for options, said in (
        ({"site": "nowhere"}, "no launch at 'nowhere' to record; sites are named like"),
        ({"kernel": "fastest"}, "No kernel 'fastest' .* few_rows"),
        ({"weights": "all"}, '"reference" or "values"'),
        ({"limit": 0}, "positive whole number of bytes"),
    ):
        with pytest.raises(InputError, match=said), runner.recording(path, **options):
            raise AssertionError
    with (
        pytest.raises(RecordingError, match="Nothing was recorded"),
        runner.recording(path, kernel="blocked"),
    ):
        runner.prefill(runner.start(), IDS)
    assert list(tmp_path.iterdir()) == []
    with runner.recording(path):
        with pytest.raises(InputError, match="one recording"), runner.recording(tmp_path / "y.rec"):
            raise AssertionError
        runner.prefill(runner.start(), IDS)


def test_what_was_recorded_before_an_error_is_kept(runner: rl.Runner, tmp_path: Path) -> None:
    path = tmp_path / "x.rec"
    state = runner.start()
    with (
        pytest.raises(RecordingError, match="exceed its limit of 3,000 bytes"),
        runner.recording(path, limit=3000),
    ):
        runner.prefill(state, IDS)
    assert state.length == 0
    kept = rl.replay(path)
    assert 0 < len(kept) < 14
    assert all(checked.equal for checked in kept.check())

    def interrupted() -> None:
        with runner.recording(path, site=DOWN):
            runner.prefill(state, IDS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(rl.replay(path)) == 1
    assert runner.decode(state, 1).shape == (37,)


class _Full:
    """A file on a full disk, which says so again when it is closed."""

    def write(self, data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        self.write(b"")


def test_a_full_disk_is_a_sentence(
    runner: rl.Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(path: Path) -> None:
        with runner.recording(path, site=DOWN):
            runner.prefill(runner.start(), IDS)

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", lambda source, target, size: _Full().write(b""))
        with pytest.raises(RecordingError, match="cannot be written: No space left"):
            record(tmp_path / "x.rec")
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", lambda **_: _Full())
        with pytest.raises(RecordingError, match="cannot be written: No space left"):
            record(tmp_path / "x.rec")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RecordingError, match="No such file"):
        record(tmp_path / "no" / "x.rec")


def test_another_file_is_not_overwritten(runner: rl.Runner, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(RecordingError, match="no recording; choose another name"),
        runner.recording(tmp_path / "thesis.tex"),
    ):
        raise AssertionError


def test_a_damaged_file_is_refused(recorded: Callable[..., Replay], tmp_path: Path) -> None:
    data = recorded(site=DOWN)[0]._replay.path.read_bytes()
    bad = tmp_path / "bad.rec"
    for end in (0, 5, 8, 200, len(data) - 1):
        bad.write_bytes(data[:end])
        with pytest.raises(RecordingError, match="truncated"):
            rl.replay(bad)
    for old, new, said in (
        (b"relax-llm recording 1", b"relax-llm recording 9", "not a recording that this version reads"),
        (b'"data_offsets":[0,', b'"data_offsets":[4,', "damaged"),
        (b"few_rows", b'few"rows', "damaged"),
    ):
        assert old in data
        bad.write_bytes(data.replace(old, new, 1))
        with pytest.raises(RecordingError, match=said):
            rl.replay(bad)
    for path, said in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(RecordingError, match=said):
            rl.replay(path)
