"""`relax-llm trace` runs a prompt, says where the time went, and writes what Perfetto opens."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING

import pytest

import relax_llm as rl
from relax_llm.runtime import limits
from relax_llm.tracing.limits import Limits
from relax_llm.tracing.trace import Trace

from ..tracing.test_events import check
from .conftest import COMMAND
from .terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Outcome

GIVEN = ["--limits", "100,10"]


def test_where_the_time_went(call: Callable[..., Outcome], artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    done = call("trace", artifact, "--prompt", "Hello", "-n", 3, "-o", file, *GIVEN)
    assert done.code == 0
    manifest = rl.load(artifact).manifest
    launches = len(manifest.functions["prefill"]) + 3 * len(manifest.functions["decode"])
    assert done.err.splitlines()[-1] == f"{launches} launches in {file}; open it at https://ui.perfetto.dev"
    headline, operators, kernels, sites = done.out.strip().split("\n\n")
    assert headline.startswith(f"Calls: prefill 1, decode 3; {launches} launches in ")
    assert headline.endswith("This machine can do 100 GFLOP/s, 10.0 GB/s.")
    rows = [re.split(r"\s{2,}", line) for line in operators.splitlines()]
    assert rows[0] == ["operator", "launches", "ms", "share", "GFLOP/s", "GB/s", "of limit"]
    assert [row[0] for row in rows[-4:]] == ["all kernels", "outside kernels", "all calls", "between calls"]
    made = [launch.kernel for name in ("prefill", "decode") for launch in manifest.functions[name]]
    assert {row[0] for row in rows[1:-4]} == {manifest.kernels[kernel].operator for kernel in made}
    inside, outside, together = (float(row[2 if row[0] == "all kernels" else 1]) for row in rows[-4:-1])
    assert inside + outside == pytest.approx(together, abs=0.002)
    assert sum(int(row[1]) for row in rows[1:-4]) == launches
    assert kernels.startswith("kernel")
    assert "layers.*.mlp.down_proj" in sites
    check(json.loads(file.read_text()))
    assert len(Trace.read(file).launches) == launches
    assert [call.sizes["kv_len"] for call in Trace.read(file).calls] == [5, 6, 7, 8]


def test_layers_apart(call: Callable[..., Outcome], artifact: Path) -> None:
    out = call("trace", artifact, "-p", "1 2 3", "--ids", "-n", 0, "--sites", *GIVEN).out
    assert "layers.0.mlp.down_proj" in out
    assert "layers.1.mlp.down_proj" in out
    assert "layers.*" not in out
    assert out.startswith("Calls: prefill 1; ")


def test_models_that_take_turns(call: Callable[..., Outcome], artifact: Path) -> None:
    turns = ["trace", artifact, "--beside", artifact, "-p", "1 2 3", "--ids", "-n", 2, "--rounds", 2, *GIVEN]
    caption, header, *rows = call(*turns).out.strip().splitlines()
    assert (
        caption
        == f"{artifact}, then {artifact}, and how many times as fast that is, the median of the rounds"
    )
    assert header.split() == ["function", "site", "operator", "ms", "ms", "times"]
    assert [row.split()[:3] for row in rows[:2]] in (
        [["prefill", "all", "calls"], ["decode", "all", "calls"]],
        [["decode", "all", "calls"], ["prefill", "all", "calls"]],
    )
    assert all(float(row.split()[-1].removesuffix("x")) > 0 for row in rows)
    assert any("layers.*.mlp.down_proj" in row for row in rows)
    found = call(*turns, "--sites", "--json").json
    (other,) = found["beside"]
    assert (found["model"], other["model"]) == (str(artifact), str(artifact))
    assert found["prompt"] == [1, 2, 3]
    assert {"layers.0.mlp.down_proj", "layers.1.mlp.down_proj"} <= {
        pair["names"][1] for pair in other["pairs"]
    }
    assert all(len(pair["first"]) == len(pair["second"]) == 2 for pair in other["pairs"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cold"], "--beside takes turns; --output and --cold are of a single run."),
        (["-o", "trace.json"], "--beside takes turns; --output and --cold are of a single run."),
        (["--rounds", "0"], "--rounds is 0; it must be 1 or above."),
    ],
)
def test_what_does_not_go_with_turns(
    call: Callable[..., Outcome], artifact: Path, options: list[str], message: str
) -> None:
    done = call("trace", artifact, "--beside", artifact, *options)
    assert done.code != 0
    assert message in done.err


def test_as_json(call: Callable[..., Outcome], artifact: Path) -> None:
    found = call("trace", artifact, "-p", "4, 5", "--ids", "-n", 2, "--json", *GIVEN).json
    assert found["prompt"] == [4, 5]
    assert found["limits"] == {"flops": 100e9, "bytes": 10e9, "bf16": 0, "int8": 0, "loop": 0}
    assert [one["function"] for one in found["calls"]] == ["prefill", "decode", "decode"]
    assert found["seconds"] == pytest.approx(sum(one["seconds"] for one in found["calls"]))
    assert found["outside_kernels"] == pytest.approx(sum(one["outside_kernels"] for one in found["calls"]))
    for what in ("operator", "kernel", "site"):
        rows = found[f"by_{what}"]
        assert sum(row["launches"] for row in rows) == sum(one["launches"] for one in found["calls"])
        assert rows[0].keys() == {"names", "launches", "seconds", "share", "flops", "bytes", "limit"}


def test_limits_are_measured_where_none_are_given(
    call: Callable[..., Outcome], artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = iter([Limits(2e11, 2e10), Limits(3e11, 1e10)])
    monkeypatch.setattr(limits, "measure", lambda *_: next(measured))
    short = ["trace", artifact, "-p", "1", "--ids", "-n", 0]
    assert "This machine can do 200 GFLOP/s, 20.0 GB/s." in call(*short).out
    assert "This machine can do 200 GFLOP/s, 20.0 GB/s." in call(*short).out
    assert "This machine can do 300 GFLOP/s, 10.0 GB/s." in call(*short, "--limits", "anew").out


def test_more_than_the_limit_is_worth_a_note(call: Callable[..., Outcome], artifact: Path) -> None:
    done = call("trace", artifact, "-p", "1", "--ids", "-n", 0, "--limits", "0.001,0.001")
    assert "More than 100% of the limit: the data came from a cache" in done.err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["-n", "-1"], "--decodes is -1; it must be 0 or above."),
        (["-o", "nowhere/trace.json"], "cannot be written: there is no directory nowhere."),
        (["--limits", "fast"], "Limits are GFLOP/s and GB/s, such as 230,32, not 'fast'"),
        (["--ids", "-p", "one two"], "With --ids the prompt must be token ids"),
        (["-p", ""], "The prompt is empty; give some text."),
        (["-n", "256"], "and 256 more do not fit into a context of 256."),
        (["--threads", "0"], "--threads is 0; it must be from 1 to"),
        (["--weights", "f32"], "is compiled already, so --weights cannot change it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(call: Callable[..., Outcome], artifact: Path, flags: list[str], expected: str) -> None:
    done = call("trace", artifact, *flags)
    assert (done.code, done.out) == (2, "")
    assert expected in done.err
    assert "Traceback" not in done.err


def test_without_a_tokenizer(call: Callable[..., Outcome], without_tokenizer: Path) -> None:
    done = call("trace", without_tokenizer, "-p", "Hello")
    assert done.code == 2
    assert "has no tokenizer; give token ids with --ids." in done.err


def test_an_output_that_is_a_directory(call: Callable[..., Outcome], artifact: Path, tmp_path: Path) -> None:
    done = call("trace", artifact, "-n", 0, "-o", tmp_path, *GIVEN)
    assert done.code == 2
    assert "cannot be written: Is a directory." in done.err


@pytest.mark.parametrize("columns", [60, 100])
def test_nothing_is_cut_in_a_narrow_terminal(
    artifact: Path, environment: dict[str, str], columns: int
) -> None:
    flags = ["trace", str(artifact), "-p", "1 2", "--ids", "-n", "1", *GIVEN]
    with Terminal([*COMMAND, *flags], environment, columns) as terminal:
        assert terminal.finish() == 0
    assert max(map(len, terminal.text.split("\n"))) <= columns
    letters = Counter("".join(terminal.text.split()))  # cells are folded, so words are cut in two
    assert letters >= Counter("outsidekernels" + "layers.*.self_attn.q_proj+k_proj+v_proj")
    assert ("outside kernels" in terminal.text) == (columns == 100)
