"""The kernels that make a result wrong: one, several, several only together; and what cannot be told."""

from __future__ import annotations

import itertools
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm.errors import InputError, PlanError
from relax_llm.finding.ddmin import minimal
from tests.finding.planting import ALSO_GUILTY, BAD, DOWN, GOOD, GUILTY, LAYERS, UNTRIED, WORSE, bad_plan

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@pytest.mark.parametrize("count", [1, 2, 3, 8, 100, 257])
def test_one_of_many_takes_two_logarithms(count: int) -> None:
    for guilty in {0, count // 2, count - 1}:
        tests: list[Sequence[int]] = []

        def fails(changes: Sequence[int], guilty: int = guilty, tests: list[Sequence[int]] = tests) -> bool:
            tests.append(changes)
            return guilty in changes

        assert minimal(range(count), fails) == (guilty,)
        assert len(tests) <= 2 * math.ceil(math.log2(count)) if count > 1 else not tests


@pytest.mark.parametrize("together", [1, 2, 3, 5])
def test_changes_that_fail_only_together(together: int) -> None:
    random = np.random.default_rng(together)
    for _ in range(20):
        guilty = set(random.choice(40, together, replace=False).tolist())
        assert set(minimal(range(40), guilty.issubset)) == guilty


def test_all_of_them() -> None:
    assert minimal(range(9), lambda changes: len(changes) == 9) == tuple(range(9))


@pytest.fixture
def runner(planted: rl.Artifact) -> rl.Runner:
    return rl.Runner(planted)


def sites(found: Any) -> list[list[str]]:
    return [[change.site for change in group] for group in found.culprits]


def test_the_one_that_is_guilty(runner: rl.Runner) -> None:
    found = rl.bisect(runner, good=GOOD, bad=BAD, length=UNTRIED)
    assert sites(found) == [[GUILTY]]
    ((change,),) = found.culprits
    assert (change.operator, change.good, change.bad) == ("matmul", "right (M = 1..11)", "wrong (M = 1..11)")
    assert (found.changes, found.is_complete, found.is_steady) == (LAYERS, True, True)
    assert found.runs <= 4 + 2 * math.ceil(math.log2(LAYERS)) + 2
    assert found.off > 0.01
    assert f"matmul at {GUILTY} by wrong (M = 1..11), and not right (M = 1..11): it alone" in str(found)


def test_two_that_are_guilty_each_by_itself(runner: rl.Runner) -> None:
    found = rl.bisect(runner, good=GOOD, bad=WORSE, length=UNTRIED)
    assert sorted(sites(found)) == [[ALSO_GUILTY], [GUILTY]]
    assert found.is_complete


def served(runner: rl.Runner, kernel: str) -> set[str]:
    with runner.counting() as counts:
        runner.prefill(runner.start(), [1, 2, 3])
    return {row.site for row in counts.rows if row.kernel == kernel}


def test_two_that_are_guilty_only_together(runner: rl.Runner) -> None:
    pair = {DOWN.format(0), DOWN.format(4)}
    found = rl.bisect(
        runner,
        good=GOOD,
        bad={"layers.*": "also_right"},
        check=lambda runner: not pair <= served(runner, "also_right"),
    )
    assert [set(group) for group in sites(found)] == [pair]
    assert math.isnan(found.off)
    assert "2 changes make the result wrong together, and none can be left out:" in str(found)


def test_plans_as_data_and_as_files(runner: rl.Runner, planted: rl.Artifact, tmp_path: Path) -> None:
    """Some sizes are served as the good plan has it."""
    bad = bad_plan(planted.plan)
    (tmp_path / "bad.json").write_text(bad.to_json())
    for plan in (bad, tmp_path / "bad.json"):
        found = rl.bisect(runner, good=GOOD, bad=plan, length=UNTRIED, decodes=1)
        assert sorted(sites(found)) == [[ALSO_GUILTY], [GUILTY]]
        assert found.culprits[0][0].bad == "wrong (M = 11), right (M = 1)"


def test_two_artifacts(planted: rl.Artifact) -> None:
    right, wrong = rl.Runner(planted), rl.Runner(planted)
    with right.plan(GOOD), wrong.plan(WORSE):
        found = rl.bisect(wrong, right, length=UNTRIED)
    assert sorted(sites(found)) == [[ALSO_GUILTY], [GUILTY]]
    assert {change.bad for group in found.culprits for change in group} == {"wrong (M = 1..11)"}
    assert found.is_complete
    assert found.changes == len({(s.site, s.operator) for s in rl.compare(planted, planted, length=2).sites})


def test_what_many_do_together_is_not_blamed_on_one(runner: rl.Runner) -> None:
    found = rl.bisect(
        runner,
        good=GOOD,
        bad={"layers.*": "also_right"},
        check=lambda runner: len(served(runner, "also_right")) < LAYERS,
    )
    assert [len(group) for group in found.culprits] == [LAYERS]
    with pytest.raises(InputError, match=r"8 runs were not enough .*: many contribute"):
        rl.bisect(
            runner,
            good=GOOD,
            bad={"layers.*": "also_right"},
            check=lambda runner: len(served(runner, "also_right")) < LAYERS,
            most_runs=8,
        )


def test_when_runs_are_used_up_what_was_found_is_said(runner: rl.Runner) -> None:
    found = rl.bisect(runner, good=GOOD, bad=WORSE, length=UNTRIED, most_runs=11)
    assert len(found.culprits) == 1
    assert not found.is_complete
    assert "there are more that were not looked for" in str(found)


def test_what_does_not_reproduce_is_said(runner: rl.Runner) -> None:
    flips = itertools.cycle([True, False])
    with pytest.raises(InputError, match="The good way is right in one run and wrong in the next"):
        rl.bisect(
            runner, good=GOOD, bad=BAD, check=lambda runner: served(runner, "x") == set() and next(flips)
        )
    asked = itertools.count()

    def seldom(runner: rl.Runner) -> bool:
        """Wrong with the guilty kernel, up to the run that makes sure."""
        return GUILTY not in served(runner, "wrong") or (
            len(served(runner, "wrong")) == 1 and not served(runner, "also_right") and next(asked) > 0
        )

    found = rl.bisect(runner, good=GOOD, bad=BAD, check=seldom)
    assert sites(found) == [[GUILTY]]
    assert not found.is_steady
    assert "does not reproduce" in str(found)


def always(runner: rl.Runner) -> bool:
    return served(runner, "x") == set()


def never(runner: rl.Runner) -> bool:
    return not always(runner)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "Name two ways"),
        ({"other": "self", "bad": BAD}, "Name two ways"),
        ({"other": "self", "check": bool}, "A check of your own"),
        ({"good": BAD, "bad": BAD, "length": UNTRIED}, "Both ways launch the same kernels"),
        ({"good": GOOD, "bad": BAD, "length": 12}, "The bad way gives a right result: its logits are off by"),
        (
            {"good": GOOD, "bad": BAD, "check": always},
            "The bad way gives a right result. Lower",
        ),
        (
            {"good": GOOD, "bad": BAD, "check": never},
            "The good way gives a wrong result itself",
        ),
        ({"bad": {"layers.*": "nothing"}}, "No kernel 'nothing'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_is_refused(runner: rl.Runner, options: dict[str, Any], said: str) -> None:
    options = {name: runner if value == "self" else value for name, value in options.items()}
    with pytest.raises(InputError, match=said):
        rl.bisect(runner, **options)
    with pytest.raises(PlanError):
        rl.bisect(runner, bad="nowhere.json")


def test_nothing_stays_behind(runner: rl.Runner) -> None:
    before = runner.prefill(runner.start(), list(range(UNTRIED)))
    rl.bisect(runner, good=GOOD, bad=BAD, length=UNTRIED)
    assert not runner._control.active
    np.testing.assert_array_equal(runner.prefill(runner.start(), list(range(UNTRIED))), before)


def test_other_formats_need_a_bound(families: dict[str, Path]) -> None:
    from tests.machines import PLAINER

    exact, rounded = (
        rl.compile(families["llama"], weights=weights, target=PLAINER) for weights in ("f32", "bf16")
    )
    with pytest.raises(InputError, match="different formats"):
        rl.bisect(rounded, exact)
    with pytest.raises(InputError, match="The bad way gives a right result"):
        rl.bisect(rounded, exact, bound=0.5)


def test_json_of_a_change_is_plain(runner: rl.Runner) -> None:
    from relax_llm.cli.bisect import _data

    found = rl.bisect(runner, good=GOOD, bad=BAD, length=UNTRIED)
    assert json.loads(json.dumps(_data(found)))["culprits"][0][0]["site"] == GUILTY
