"""`relax-llm inspect` shows what the manifest says, at any width and as JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

import relax_llm as rl
from relax_llm.artifact import formulas
from relax_llm.cli.tables import quantity

from .conftest import COMMAND, edit_manifest
from .terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from relax_llm.artifact import Manifest

    from .conftest import Outcome

AT = {"batch": 2, "seq": 1, "kv_len": 100}


@pytest.fixture(scope="module")
def manifest(artifact: Path) -> Manifest:
    return rl.load(artifact).manifest


def table_of(out: str) -> list[list[str]]:
    """The rows of the table that comes after the facts, without its header."""
    return [re.split(r"\s{2,}", line.strip()) for line in out.split("\n\n")[1].splitlines()[1:]]


def test_every_kernel_is_a_line_of_a_pipe(
    call: Callable[..., Outcome], artifact: Path, manifest: Manifest
) -> None:
    rows = {row[0]: row[1:] for row in table_of(call("inspect", artifact).out)}
    assert rows.keys() == manifest.kernels.keys()
    for name, kernel in manifest.kernels.items():
        sites = {
            launch.site for calls in manifest.functions.values() for launch in calls if launch.kernel == name
        }
        count, problem, shapes, *costs = rows[name]
        assert count == str(len(sites))
        assert problem.split()[0] == kernel.operator
        assert " -> " in shapes
        assert "T." not in shapes
        assert costs == [kernel.flops, kernel.bytes]
    (gated,) = (row for name, row in rows.items() if "gated" in name)
    assert gated[1] == "matmul n=256 k=64 weight_format=f32 activation=silu gated"
    assert gated[2] == "[batch, seq, 64], weight [8, 64, 32] -> [batch, seq, 128]"
    assert gated[0] == "2"


def test_costs_at_some_sizes(call: Callable[..., Outcome], artifact: Path, manifest: Manifest) -> None:
    out = call("inspect", artifact, "--at", "batch=2,kv_len=100").out
    rows = {row[0]: row[1:] for row in table_of(out)}
    launched = [launch.kernel for launch in manifest.functions["decode"]]
    assert rows.keys() == set(launched)
    flops = 0.0
    for name, (count, *costs) in rows.items():
        kernel = manifest.kernels[name]
        once = [eval(cost, {}, AT) for cost in (kernel.flops, kernel.bytes)]  # Python reads them too
        assert int(count) == launched.count(name)
        every = [cost * int(count) for cost in once]
        assert costs == [
            quantity(value, unit)
            for values in (once, every)
            for value, unit in zip(values, ("", "B"), strict=True)
        ]
        flops += once[0] * int(count)
    assert f"decode at batch=2, kv_len=100, seq=1: {len(launched)} launches, {quantity(flops, 'flop')}" in out


@pytest.mark.parametrize("function", ["decode", "prefill", "logits", "hidden", "greedy"])
def test_launches_come_in_order(
    call: Callable[..., Outcome], artifact: Path, manifest: Manifest, function: str
) -> None:
    rows = table_of(call("inspect", artifact, "--sites", "--function", function).out)
    calls = manifest.functions[function]
    assert rows == [[str(number), launch.site, launch.kernel] for number, launch in enumerate(calls)]
    out = call("inspect", artifact, "--sites", "--function", function, "--at", "batch=2,seq=1,kv_len=100").out
    costs = [row[3] for row in table_of(out)]
    assert costs == [
        quantity(formulas.evaluate(manifest.kernels[launch.kernel].flops, AT)) for launch in calls
    ]


def test_weights_and_what_they_are_made_from(
    call: Callable[..., Outcome], artifact: Path, manifest: Manifest
) -> None:
    rows = table_of(call("inspect", artifact, "--weights-table").out)
    assert rows == [
        [weight.name, weight.dtype, str(list(weight.shape)), weight.recipe] for weight in manifest.weights
    ]


def test_json(call: Callable[..., Outcome], artifact: Path, manifest: Manifest) -> None:
    found = call("inspect", artifact, "--json").json
    assert found["target"] == manifest.target
    assert found["files"]["lib.so"] == (artifact / "lib.so").stat().st_size
    assert {kernel["kernel"] for kernel in found["kernels"]} == manifest.kernels.keys()
    assert "at" not in found
    assert "sites" not in found
    flags = ["--sites", "--weights-table", "--at", "batch=2,kv_len=100", "--json"]
    found = call("inspect", artifact, *flags).json
    assert [site["site"] for site in found["sites"]] == [
        launch.site for launch in manifest.functions["decode"]
    ]
    assert found["total"]["flops"] == sum(site["flops"] for site in found["sites"])
    assert found["at"] == AT
    assert [weight["name"] for weight in found["weights"]] == [weight.name for weight in manifest.weights]
    for kernel in found["kernels"]:
        assert kernel["at"]["bytes"] == formulas.evaluate(kernel["bytes"], AT)
        assert sum(kernel["launches"].values()) >= len(kernel["sites"]) > 0


def test_a_checkpoint_is_inspected_by_way_of_the_cache(
    call: Callable[..., Outcome], artifact: Path, checkpoint: Path
) -> None:
    assert table_of(call("inspect", checkpoint).out) == table_of(call("inspect", artifact).out)


COSTS = ["--sites", "--at", "batch=1,kv_len=7"]


@pytest.mark.parametrize(
    ("flags", "columns"),
    [
        ([], 40),
        ([], 80),
        ([], 132),
        ([], 400),
        (["--weights-table"], 80),
        (["--sites"], 80),
        (COSTS, 80),
    ],
    ids=str,
)
def test_nothing_is_cut_at_any_width(
    artifact: Path, environment: dict[str, str], call: Callable[..., Outcome], flags: list[str], columns: int
) -> None:
    with Terminal([*COMMAND, "inspect", str(artifact), *flags], environment, columns) as terminal:
        assert terminal.finish() == 0
    assert max(map(len, terminal.text.split("\n"))) <= columns
    shown = terminal.text.partition("\n\n")[2]
    plain = call("inspect", artifact, *flags).out.partition("\n\n")[2]
    if columns == 400:
        assert shown == plain
    elif "--sites" in flags:  # cells are folded, so words are cut in two, but every letter is there
        assert Counter("".join(shown.split())) == Counter("".join(plain.split()))
    else:  # blocks: every cell is there as it is, but for the ends of lines
        joined = "".join(shown.split())
        for row in plain.splitlines()[1:]:
            for cell in re.split(r"\s{2,}", row):
                assert "".join(cell.split()) in joined


def test_what_a_manifest_says_cannot_command_the_terminal(
    copy_of_artifact: Path, environment: dict[str, str]
) -> None:
    def taint(manifest: dict[str, Any]) -> None:
        manifest["architecture"] = "evil\x1b[2J"
        manifest["notes"] = ["evil\x1b]0;title\x07"]

    edit_manifest(copy_of_artifact, taint)
    with Terminal([*COMMAND, "inspect", str(copy_of_artifact)], environment) as terminal:
        assert terminal.finish() == 0
    assert "evil\\x1b[2J" in terminal.raw
    assert "evil\\x1b]0;title\\x07" in terminal.raw
    assert "\x1b[2J" not in terminal.raw


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (999, "B", "999 B"),
        (999.4, "", "999"),
        (0.5, "", "0.5"),
        (1000, "B", "1.00 kB"),
        (999_499, "B", "999 kB"),
        (999_500, "B", "1.00 MB"),
        (12_345_678, "flop", "12.3 Mflop"),
        (10**9, "", "1.00 G"),
        (3 * 10**12, "B", "3.00 TB"),
        (10**18, "", "1000 P"),
    ],
)
def test_quantities_have_three_digits(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_the_plan_names_a_kernel_for_every_site(artifact: Path, call: Callable[..., Outcome]) -> None:
    told = call("inspect", artifact, "--plan").out
    entries = json.loads(call("inspect", artifact, "--plan", "--json").out)["entries"]
    assert entries
    manifest = json.loads((artifact / "manifest.json").read_text())
    launched = {launch["site"] for launches in manifest["functions"].values() for launch in launches}
    assert launched <= {site for entry in entries for site in entry["sites"]}
    for entry in entries:
        assert entry["problem"] in told
        assert all(part["kernel"] in told for part in entry["ranges"])
