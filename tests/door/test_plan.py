"""The plan as data: total, readable, editable."""

from __future__ import annotations

import json
from itertools import product

import pytest
from hypothesis import given, strategies as st

from relax_llm.errors import PlanError
from relax_llm.plan.choosing import cover, merged
from relax_llm.plan.kernel import Kernel
from relax_llm.plan.plan import Candidate, Entry, Measurement, Plan, Range
from relax_llm.plan.sizes import Bounds, Box, cells, corner


def rows(first: int, last: int | None, kernel: str) -> Range:
    return Range(Box.of(M=(first, last)), kernel)


def entry(*ranges: Range) -> Entry:
    sites = ("layers.0.mlp.gate_proj+up_proj", "layers.1.mlp.gate_proj+up_proj")
    candidates = (Candidate("a", Box.of(M=(1, 8)), "serves M = 1..8"),)
    measurements = (Measurement("a", {"M": 3}, 1.5e-5, cold=True),)
    return Entry("matmul_n8_k4", "matmul", sites, "plain", ("M",), ranges, candidates, measurements)


SPLIT = entry(rows(1, 8, "a"), rows(9, 9, "b"), rows(10, None, "c"))


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ([], "nothing serves every size"),
        ([rows(2, None, "a")], "nothing serves M = 1"),
        ([rows(1, 8, "a")], "nothing serves M >= 9"),
        ([rows(1, 8, "a"), rows(10, None, "b")], "nothing serves M = 9"),
        ([rows(1, 8, "a"), rows(8, None, "b")], "a and b serve M = 8"),
        ([rows(1, None, "a"), rows(9, None, "b")], "a and b serve M >= 9"),
        ([Range(Box.of(seq=(1, None)), "a")], "a range of 'seq'"),
    ],
)
def test_a_plan_that_is_not_total_is_refused(ranges: list[Range], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        entry(*ranges)


@pytest.mark.parametrize("bounds", [(0, 4), (5, 4), (-1, None)])
def test_a_range_that_is_none_is_refused(bounds: Bounds) -> None:
    with pytest.raises(PlanError, match="not a range"):
        Box.of(M=bounds)


@pytest.mark.parametrize(("size", "kernel"), [(1, "a"), (8, "a"), (9, "b"), (10, "c"), (10**9, "c")])
def test_every_size_has_one_kernel(size: int, kernel: str) -> None:
    assert SPLIT.serving({"M": size}).kernel == kernel
    assert [{"M": size} in part.sizes for part in SPLIT.ranges].count(True) == 1


def test_two_axes_are_divided_into_boxes() -> None:
    ranges = (
        Range(Box.of(seq=1, kv_len=(1, 512)), "near"),
        Range(Box.of(seq=1, kv_len=(513, None)), "far"),
        Range(Box.of(seq=(2, None)), "many"),
    )
    made = Entry("attention", "attention", ("layers.0.self_attn",), "", ("seq", "kv_len"), ranges)
    assert made.serving({"seq": 1, "kv_len": 513}).kernel == "far"
    assert made.serving({"seq": 2, "kv_len": 513}).kernel == "many"
    explained = Plan((made,)).explain("layers.0.self_attn", kv_len=600)
    assert "seq = 1, kv_len >= 513: far" in explained
    assert "near" not in explained
    with pytest.raises(PlanError, match=r"seq = 1, kv_len = 1\.\.512"):
        Entry("attention", "attention", ("x",), "", ("seq", "kv_len"), ranges[1:])


def test_json_keeps_everything() -> None:
    plan = Plan((SPLIT,), {"cpu": "some"})
    assert Plan.from_json(plan.to_json()) == plan
    edited = json.loads(plan.to_json())
    edited["entries"][0]["ranges"][0]["sizes"]["M"][1] = 7
    with pytest.raises(PlanError, match="nothing serves M = 8"):
        Plan.from_json(json.dumps(edited))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"entries": [1]}',
        '{"entries": [{"problem": "x"}]}',
        Plan((SPLIT,)).to_json().replace("[\n       1,\n       8\n      ]", '["a", 8]'),
    ],
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"mine\.json is not a plan"):
        Plan.from_json(text, "mine.json")


def test_a_plan_that_cannot_be_read_is_refused(tmp_path: object) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.read(f"{tmp_path}/none.json")


def test_a_site_is_found_by_its_name_and_by_its_parts() -> None:
    plan = Plan((SPLIT,))
    for site in ("layers.1.mlp.gate_proj+up_proj", "layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"):
        assert plan.at(site) is SPLIT
    with pytest.raises(PlanError, match=r"no site 'layers\.7\.mlp\.up_proj'"):
        plan.at("layers.7.mlp.up_proj")


def test_two_operators_at_a_site_are_told_apart() -> None:
    everything = (Range(Box(), "a"),)
    plan = Plan(
        tuple(Entry(name, name, ("x",), "", ("seq",), everything) for name in ("append", "attention"))
    )
    assert plan.at("x", "append").problem == "append"
    with pytest.raises(PlanError, match="append, attention; name one"):
        plan.at("x")


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
    with pytest.raises(PlanError, match="not chosen by seq, but by M"):
        plan.explain("layers.0.mlp.up_proj", seq=1)


BOUNDS = st.one_of(
    st.tuples(st.integers(1, 9), st.none()),
    st.tuples(st.integers(1, 9), st.integers(0, 5)).map(lambda pair: (pair[0], pair[0] + pair[1])),
)


def _nothing() -> None:
    return None


@given(st.lists(st.tuples(BOUNDS, BOUNDS), max_size=5))
def test_the_first_valid_kernel_serves(boxes: list[tuple[Bounds, Bounds]]) -> None:
    """Whatever the boxes, the cover is total, and each size has the first kernel that is valid for it."""
    axes = ("seq", "kv_len")
    kernels = [
        Kernel(f"k{at}", "attention", "primfunc", _nothing, Box.of(seq=seq, kv_len=length))
        for at, (seq, length) in enumerate(boxes)
    ]
    kernels.append(Kernel("rest", "attention", "primfunc", _nothing))
    made = Entry("p", "attention", ("x",), "", axes, cover(kernels, None, axes))
    for seq, kv_len in product(range(1, 16), repeat=2):
        sizes = {"seq": seq, "kv_len": kv_len}
        assert made.serving(sizes).kernel == next(k.name for k in kernels if sizes in k.sizes)


@given(st.lists(BOUNDS, max_size=4))
def test_a_cell_is_wholly_inside_or_outside(bounds: list[Bounds]) -> None:
    boxes = [Box.of(M=each) for each in bounds]
    grid = cells(("M",), boxes)
    for size in range(1, 20):
        (cell,) = [cell for cell in grid if {"M": size} in cell]
        assert [corner(cell) in box for box in boxes] == [{"M": size} in box for box in boxes]


def test_predicted_costs_compete_and_wishes_win() -> None:
    def costing(name: str, fixed: float, each: float, box: Box = Box()) -> Kernel:  # noqa: B008 - frozen
        return Kernel(name, "matmul", "primfunc", _nothing, box, cost=lambda _, s: fixed + each * s["M"])

    few, many = costing("few", 1.0, 1.0), costing("many", 9.0, 0.5)
    ranges = cover([few, many], None, ("M",))
    assert [part.kernel for part in ranges] == ["few", "many"]
    assert ranges[1].sizes["M"][0] in range(16, 21)
    wish = Kernel("wish", "matmul", "primfunc", _nothing, Box.of(M=(3, 4)))
    assert [part.kernel for part in cover([wish, few, many], None, ("M",))] == ["few", "wish", "few", "many"]


def test_neighbours_are_joined() -> None:
    parts = [Range(Box.of(seq=s, kv_len=k), "a") for s in (1, (2, None)) for k in ((1, 5), (6, None))]
    assert merged(parts) == (Range(Box.of(seq=(1, None), kv_len=(1, None)), "a"),)
