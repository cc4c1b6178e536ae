"""What shows itself as a table in a notebook says the same as its text, and runs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from relax_llm.plan.plan import Candidate, Entry, Plan, Range
from relax_llm.plan.sizes import Box
from relax_llm.runtime.counts import Counts
from relax_llm.table import Table
from relax_llm.tracing.trace import Launches, Trace
from tests.tracing.notebook import Reader
from tests.tracing.traces import HOSTILE, LIMITS, launch, trace

if TYPE_CHECKING:
    from collections.abc import Callable


def _plan() -> Plan:
    entry = Entry(
        f"problem {HOSTILE}",
        "matmul",
        ("layers.0.x", "layers.1.x", HOSTILE),
        "tiled",
        ("M",),
        (Range(Box.of(M=(1, 8)), "small"), Range(Box.of(M=(9, None)), HOSTILE)),
        (Candidate("small", Box.of(M=(1, 8)), HOSTILE),),
    )
    return Plan((entry,))


def _counts() -> Counts:
    made = Counts()
    made.add([(HOSTILE, "matmul", HOSTILE, (("M", 1),)), ("site", HOSTILE, "tiled", (("M", 3),))])
    return made


def _trace() -> Trace:
    made = trace()
    call = made.calls[0]
    call.__dict__["launches"] = (*call.launches, launch(2, 4100, 4200, site=HOSTILE))
    return made


SHOWN: dict[str, Callable[[], Any]] = {
    "table": lambda: Table(("a", HOSTILE), [("1", HOSTILE), ("&amp;", "")], frozenset({0}), HOSTILE),
    "plan": _plan,
    "counts": _counts,
    "trace": _trace,
    "launches": lambda: Launches(_trace().launches),
}


@pytest.mark.parametrize("name", SHOWN)
def test_the_same_as_the_text(name: str) -> None:
    shown = SHOWN[name]()
    html = Reader(shown._repr_html_())
    assert "script" not in html.tags
    assert HOSTILE in html.text, "what it is called is shown as it is"
    assert repr(shown) == str(shown)
    text = " ".join(str(shown).split())
    for cell in filter(None, html.cells):
        assert " ".join(cell.split()) in text
    assert set(text.split()) <= {word for piece in (html.outside, *html.cells) for word in piece.split()}


def test_text_of_a_table() -> None:
    table = Table(("name", "count"), [("a", "1"), ("longer", "100")], frozenset({1}), "What it is")
    assert str(table) == "What it is\nname    count\na           1\nlonger    100"
    assert str(Table(("name",), [])) == "name"


def test_numbers_stand_on_the_right() -> None:
    html = Table(("name", "count"), [("a", "1")], frozenset({1}))._repr_html_()
    assert '<td style="text-align: left">a</td><td style="text-align: right">1</td>' in html


def test_a_summary_line_by_line() -> None:
    """7.514 us in five kernels of 15 us in three calls: 2.007 us twice, 1.5 us three times."""
    assert str(trace()) == (
        "Calls: prefill 1, decode 2; 5 launches in 0.015 ms. This machine can do 100 GFLOP/s, 10.0 GB/s.\n"
        "\n"
        "operator         launches     ms   share  GFLOP/s  GB/s  of limit\n"
        "matmul                  5  0.009   56.8%      0.6   0.1        1%\n"
        "all kernels             5  0.009   56.8%      0.6   0.1        1%\n"
        "outside kernels            0.006   43.2%\n"
        "all calls                  0.015  100.0%\n"
        "between calls              0.010\n"
        "\n"
        "kernel  serves     launches     ms  share  GFLOP/s  GB/s  of limit\n"
        "tiled   matmul_n4         5  0.009  56.8%      0.6   0.1        1%\n"
        "\n"
        "site                    operator  launches     ms  share  GFLOP/s  GB/s  of limit\n"
        "embed                   matmul           3  0.005  30.0%      0.7   0.1        1%\n"
        "layers.*.mlp.down_proj  matmul           2  0.004  26.8%      0.5   0.1        1%"
    )
    assert str(Trace(LIMITS)).startswith("Nothing was traced: no compiled function ran.")
    assert "layers.0.mlp.down_proj" in str(trace().launches)


def test_launches_in_the_middle_of_many_are_left_out() -> None:
    many = Launches(launch(index, 10 * index, 10 * index + 5) for index in range(100))
    lines = str(many).splitlines()
    assert len(lines) == 1 + 40 + 1
    assert lines[21].startswith("... 60 more")
    assert lines[1].startswith("decode[0]")
    assert lines[-1].startswith("decode[99]")
