"""The plan as data: total, readable, editable."""

from __future__ import annotations

import json

import pytest

from relax_llm.errors import PlanError
from relax_llm.plan.plan import Candidate, Entry, Plan, Range


def entry(*ranges: Range) -> Entry:
    sites = ("layers.0.mlp.gate_proj+up_proj", "layers.1.mlp.gate_proj+up_proj")
    return Entry("matmul_n8_k4", sites, "plain", ranges, (Candidate("a", 1, 8, "serves M = 1..8"),))


SPLIT = entry(Range(1, 8, "a"), Range(9, 9, "b"), Range(10, None, "c"))


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ([], "from M = 1 on"),
        ([Range(2, None, "a")], "M = 1 is next"),
        ([Range(1, 8, "a")], "from M = 9 on"),
        ([Range(1, 8, "a"), Range(10, None, "b")], "M = 9 is next"),
        ([Range(1, 8, "a"), Range(8, None, "b")], "M = 9 is next"),
        ([Range(1, 0, "a"), Range(1, None, "b")], "not total"),
        ([Range(1, None, "a"), Range(9, None, "b")], "not total"),
    ],
)
def test_a_plan_that_is_not_total_is_refused(ranges: list[Range], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        entry(*ranges)


@pytest.mark.parametrize(("rows", "kernel"), [(1, "a"), (8, "a"), (9, "b"), (10, "c"), (10**9, "c")])
def test_every_size_has_one_kernel(rows: int, kernel: str) -> None:
    assert SPLIT.serving(rows).kernel == kernel
    assert [rows in part for part in SPLIT.ranges].count(True) == 1


def test_json_keeps_everything() -> None:
    plan = Plan((SPLIT,))
    assert Plan.from_json(plan.to_json()) == plan
    edited = json.loads(plan.to_json())
    edited["entries"][0]["ranges"][0]["last"] = 7
    with pytest.raises(PlanError, match="M = 8 is next"):
        Plan.from_json(json.dumps(edited))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"entries": [1]}', '{"entries": [{"problem": "x"}]}'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"mine\.json is not a plan"):
        Plan.from_json(text, "mine.json")


def test_a_site_is_found_by_its_name_and_by_its_parts() -> None:
    plan = Plan((SPLIT,))
    for site in ("layers.1.mlp.gate_proj+up_proj", "layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"):
        assert plan.at(site) is SPLIT
    with pytest.raises(PlanError, match=r"no site 'layers\.7\.mlp\.up_proj'"):
        plan.at("layers.7.mlp.up_proj")


def test_explain_says_which_kernel_and_why() -> None:
    plan = Plan((SPLIT,))
    at_five = plan.explain("layers.0.mlp.up_proj", M=5)
    assert "M = 1..8: a" in at_five
    assert "M = 9: b" not in at_five
    assert "serves M = 1..8" in at_five
    everything = plan.explain("layers.0.mlp.up_proj")
    assert "M = 9: b" in everything
    assert "M >= 10: c" in everything
    with pytest.raises(PlanError, match="at least 1"):
        plan.explain("layers.0.mlp.up_proj", M=0)
