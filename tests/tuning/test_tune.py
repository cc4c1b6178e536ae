"""Tuning a model from end to end: the plan, what `compile` makes of it, interrupts, budgets, mistakes."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm.errors import InputError, PlanError
from relax_llm.plan.plan import Plan
from relax_llm.tuning import contest, explore, tune as tuning
from relax_llm.tuning.plot import plot
from relax_llm.tuning.rounds import Care, contend

from ..artifact.checkpoints import LLAMA, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from relax_llm.progress import Advance

DOWN = "layers.0.mlp.down_proj"
C_SOURCE = """
#include <stdint.h>
void in_c(const float *x, const float *weight, float *out, int64_t M) {
  for (int64_t i = 0; i < M; i++)
    for (int64_t j = 0; j < N; j++) {
      float sum = 0;
      for (int64_t k = 0; k < K; k++) sum += x[i * K + k] * weight[j * K + k];
      out[i * N + j] = sum;
    }
}
"""


SMALL = LLAMA | {"attention_bias": False, "mlp_bias": False}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Few sizes and short samples: what is tested is what becomes of the measurements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "Care", lambda: Care(batch=1e-5, least=3, most=3))
        patch.setattr(explore, "_LEVELS", ((1, 4, 16), (8, 64)))
        patch.setattr(explore, "_GAP", 5.0)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tuned") / "tiny", SMALL)


@pytest.fixture(scope="module")
def plan(checkpoint: Path, quick: None) -> rl.Plan:
    return rl.tune(checkpoint, budget=1000)


@pytest.fixture
def own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep what this test measures away from other tests."""
    monkeypatch.setattr(tuning, "store_path", lambda _, name: tmp_path / f"{name}.jsonl")


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is measured now is a fault."""

    def refuse(*_: Any) -> dict[str, list[float]]:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(contest, "contend", refuse)


def matmuls(plan: Plan) -> list[Any]:
    return [entry for entry in plan.entries if entry.operator == "matmul"]


def test_every_matmul_is_measured_and_every_kernel_has_a_reason(plan: rl.Plan) -> None:
    assert len(matmuls(plan)) == 5
    for entry in matmuls(plan):
        measured = {taken.kernel for taken in entry.measurements}
        assert {taken.cold for taken in entry.measurements} == {True, False}
        assert all(taken.seconds > 0 for taken in entry.measurements)
        serving = {part.kernel for part in entry.ranges}
        assert serving <= measured
        for candidate in entry.candidates:
            assert candidate.reason
            if candidate.kernel in serving:
                assert candidate.reason.startswith("serves ")
            elif candidate.kernel in measured:
                assert " us against " in candidate.reason


def test_what_has_no_choice_is_not_measured_and_says_so(plan: rl.Plan) -> None:
    others = [entry for entry in plan.entries if entry.operator != "matmul"]
    assert {"attention", "append", "norm", "embedding"} <= {entry.operator for entry in others}
    for entry in others:
        assert entry.measurements == ()
        assert [c.reason for c in entry.candidates] == ["serves every size; the only kernel that can"]


def test_the_plan_says_where_and_for_what_it_was_made(plan: rl.Plan) -> None:
    said = plan.machine
    assert said["threads"] >= 1
    assert said["features"] == sorted(said["features"])
    assert said["versions"]["apache-tvm"]
    assert said["distribution"] == "half of the time at M=1, half log-uniform over M=2..4096"
    assert (said["budget_seconds"], said["max_kernels"]) == (1000, 12)


def test_there_and_back_as_json(plan: rl.Plan, tmp_path: Path) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Plan.read(tmp_path / "plan.json") == plan


def test_a_plan_edited_by_hand_is_what_is_compiled(plan: rl.Plan, checkpoint: Path, tmp_path: Path) -> None:
    data = json.loads(plan.to_json())
    (entry,) = (entry for entry in data["entries"] if entry["sites"] == [DOWN])
    entry["ranges"] = [
        {"sizes": {"M": [1, 20]}, "kernel": "tiled"},
        {"sizes": {"M": [21, 100]}, "kernel": "blocked"},
        {"sizes": {"M": [101, None]}, "kernel": "tiled"},
    ]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data))
    artifact = rl.compile(checkpoint, plan=file)
    found = artifact.plan.at(DOWN)
    assert [str(part) for part in found.ranges] == ["M = 1..20", "M = 21..100", "M >= 101"]
    assert found.serving({"M": 50}).kernel == "blocked"
    assert found.measurements == plan.at(DOWN).measurements
    ids = np.arange(150) % 37
    logits = [
        rl.Runner(made).prefill(rl.Runner(made).start(), ids[:length].tolist())
        for made in (artifact, rl.compile(checkpoint))
        for length in (7, 50, 150)
    ]
    for one, other in zip(logits[:3], logits[3:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("no_launches")
def test_what_was_measured_is_not_measured_again(plan: rl.Plan, checkpoint: Path) -> None:
    assert rl.tune(checkpoint, budget=1000) == plan


@pytest.mark.usefixtures("no_launches")
def test_an_artifact_has_the_same_problems(plan: rl.Plan, checkpoint: Path, tmp_path: Path) -> None:
    artifact = rl.compile(checkpoint)
    again = rl.tune(artifact, budget=1000)
    assert {entry.problem: entry.ranges for entry in again.entries} == {
        entry.problem: entry.ranges for entry in plan.entries
    }
    assert {site for entry in matmuls(again) for site in entry.sites} == {
        site for entry in matmuls(plan) for site in entry.sites
    }
    assert rl.tune(artifact.path, budget=1000) == again


@pytest.mark.usefixtures("no_launches")
def test_a_budget_of_nothing_gives_the_plan_that_compile_makes(checkpoint: Path) -> None:
    untuned = rl.tune(checkpoint, budget=0)
    compiled = rl.compile(checkpoint).plan
    assert [entry.ranges for entry in untuned.entries] == [entry.ranges for entry in compiled.entries]
    for entry in untuned.entries:
        assert entry.measurements == ()
        serving = {part.kernel for part in entry.ranges}
        reasons = [c.reason for c in entry.candidates if c.kernel in serving]
        assert all(reason.endswith("; not measured: the budget is 0 s") for reason in reasons)


@pytest.mark.usefixtures("own_store")
def test_a_budget_that_is_over_at_once_says_so(checkpoint: Path) -> None:
    hurried = rl.tune(checkpoint, budget=1e-6, resume=False)
    for entry in matmuls(hurried):
        assert any("the budget of 1e-06 s was over" in candidate.reason for candidate in entry.candidates)


@pytest.mark.usefixtures("own_store")
def test_an_interrupt_keeps_what_was_measured(checkpoint: Path) -> None:
    """Interrupted twice, then left alone: no point is measured twice."""
    points: list[str] = []

    class Impatient:
        """Loses its patience at the end of the seventh point that was measured."""

        def __init__(self) -> None:
            self.limit = len(points) + 7

        @contextmanager
        def task(self, name: str, total: int) -> Iterator[Advance]:
            yield self._point if name == "Measuring" else lambda _: None

        def _point(self, _: int) -> None:
            if len(points) == self.limit:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:

        def counted(rivals: Any, *rest: Any) -> dict[str, list[float]]:
            points.append(",".join(rivals))
            return contend(rivals, *rest)

        patch.setattr(contest, "contend", counted)
        for _ in range(2):
            before = len(points)
            with pytest.raises(KeyboardInterrupt):
                rl.tune(checkpoint, budget=1000, progress=Impatient())
            assert len(points) - before == 7
        plan = rl.tune(checkpoint, budget=1000)
    points_of = [
        (entry.problem, taken.sizes["M"], taken.cold)
        for entry in plan.entries
        for taken in entry.measurements
    ]
    assert len(points) == len(set(points_of))


@pytest.mark.usefixtures("own_store")
def test_kernels_of_one_s_own_compete(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "_WORTH", float("inf"))  # however slow it is here, it is measured to its end

    @rl.kernel("matmul", m=(1, 8), sites=DOWN)
    def in_c(problem: Any) -> str:
        return C_SOURCE

    mine = rl.tune(checkpoint, kernels=[in_c], budget=1000)
    entry = mine.at(DOWN)
    measured: dict[str, set[int]] = {taken.kernel: set() for taken in entry.measurements}
    for taken in entry.measurements:
        measured[taken.kernel].add(taken.sizes["M"])
    assert {"in_c", "tiled", "plain_rows", "plain_panels"} <= set(measured)  # both layouts compete
    assert max(measured["in_c"]) == 8
    (reason,) = (candidate.reason for candidate in entry.candidates if candidate.kernel == "in_c")
    assert " us against " in reason
    assert entry.layout in ("plain", "tiled32", "tiled16")
    for other in matmuls(mine):
        if other != entry:
            reasons = {candidate.kernel: candidate.reason for candidate in other.candidates}
            assert reasons["in_c"] == f"is for the sites {DOWN}"


@pytest.mark.usefixtures("own_store")
def test_a_limit_of_one_kernel(checkpoint: Path) -> None:
    one = rl.tune(checkpoint, budget=1000, max_kernels=1, histogram={1: 3, 5: 1})
    assert {len(entry.ranges) for entry in matmuls(one)} == {1}
    assert one.machine["distribution"] == "of the launches 0.75 at M=1, 0.25 at M=5"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"budget": -1}, "The budget must be seconds, 0 or above, not -1"),
        ({"budget": float("nan")}, "not nan"),
        ({"budget": True}, "not True"),
        ({"max_kernels": 0}, "max_kernels must be a whole number, 1 or above, not 0"),
        ({"histogram": "1:x"}, "gives M=1 the weight 'x'"),
        ({"threads": 99999}, "more than the"),
    ],
)
def test_mistakes(checkpoint: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as refusal:
        rl.tune(checkpoint, **options)
    assert sentence in str(refusal.value)


def test_an_artifact_for_another_machine(checkpoint: Path) -> None:
    artifact = rl.compile(checkpoint)
    other = replace(artifact, manifest=replace(artifact.manifest, target="x86-64-v2"))
    with pytest.raises(InputError, match="is compiled for x86-64-v2, and this machine is"):
        rl.tune(other)


def test_a_picture_of_the_measurements(plan: rl.Plan, tmp_path: Path) -> None:
    from xml.etree import ElementTree

    plot(plan, tmp_path / "plan.svg")
    root = ElementTree.parse(tmp_path / "plan.svg").getroot()
    text = " ".join(root.itertext())
    for entry in matmuls(plan):
        assert entry.problem in text
        for part in entry.ranges:
            assert f"{part}: {part.kernel}" in text
    lines = root.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == sum(len({taken.kernel for taken in entry.measurements}) for entry in matmuls(plan))
    points = [
        float(at) for line in lines for pair in line.get("points", "").split() for at in pair.split(",")
    ]
    assert points
    assert all(0 <= at <= 640 for at in points)


def test_a_picture_needs_measurements_and_a_name(plan: rl.Plan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a name that ends in \.svg, not plan\.png"):
        plot(plan, tmp_path / "plan.png")
    with pytest.raises(InputError, match="cannot be written: No such file"):
        plot(plan, tmp_path / "nowhere" / "plan.svg")
    with pytest.raises(PlanError, match="no measurements"):
        plot(Plan(tuple(replace(entry, measurements=()) for entry in plan.entries)), tmp_path / "plan.svg")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    from relax_llm.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(map(str, arguments)))
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.mark.usefixtures("no_launches")
def test_the_command(
    call: Callable[..., tuple[int, str, str]], plan: rl.Plan, checkpoint: Path, tmp_path: Path
) -> None:
    file, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    code, out, err = call("tune", checkpoint, "--budget", 1000, "-o", file, "--plot", picture)
    assert (code, err) == (0, f"To compile by it: relax-llm compile {checkpoint} -o DIR --plan {file}\n")
    assert Plan.read(file) == plan
    assert picture.read_text().startswith("<svg")
    assert "half of the time at M=1" in out
    for entry in matmuls(plan):
        assert entry.problem in out
        assert all(f"  {part}: {part.kernel}\n" in out for part in entry.ranges)
    assert f"{len(plan.entries) - 5} more problems were not measured" in out
    code, out, err = call("tune", checkpoint, "--budget", 1000, "--json")
    assert (code, Plan.from_json(out)) == (0, plan)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--histogram", "1:x"), "error: The histogram '1:x' gives M=1 the weight 'x'"),
        (("--plot", "plan.png"), "error: Plots are SVG: give a name that ends in .svg, not plan.png."),
        (("-o", "nowhere/plan.json"), "error: nowhere/plan.json cannot be written: there is no directory"),
        (("--budget", "-3"), "error: The budget must be seconds"),
        (("--max-kernels", "0"), "error: max_kernels must be"),
        (("--threads", "0"), "error: --threads is 0"),
    ],
)
@pytest.mark.usefixtures("no_launches")
def test_mistakes_at_the_command_line(
    call: Callable[..., tuple[int, str, str]], checkpoint: Path, options: tuple[str, ...], sentence: str
) -> None:
    code, out, err = call("tune", checkpoint, *options)
    assert (code, out) == (2, "")
    assert err.startswith(sentence)


def test_an_interrupt_at_the_command_line(
    call: Callable[..., tuple[int, str, str]], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "explore", interrupted)
    code, out, err = call("tune", checkpoint)
    assert (code, out) == (130, "")
    assert "What was measured is kept; the same command goes on from there." in err
