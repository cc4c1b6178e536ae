"""Two models that were traced in turns are compared within rounds."""

from __future__ import annotations

import pytest

from relax_llm.tracing.beside import ALL, pairs, table
from relax_llm.tracing.trace import Trace, TracedCall
from tests.tracing.traces import LIMITS, launch


def _trace(begun: int, *durations: int, site: str = "layers.{}.mlp.down_proj", whole: int = 10_000) -> Trace:
    """A decode with a launch in each of some layers, of so many nanoseconds."""
    made, at = Trace(LIMITS, process=7), begun
    launches = []
    for number, duration in enumerate(durations):
        launches.append(launch(number, at, at + duration, site=site.format(number)))
        at += duration
    sizes = {"batch": 1, "seq": 1, "kv_len": 1}
    made.add(TracedCall("decode", sizes, begun, begun + whole, (1, "MainThread"), lambda: tuple(launches)))
    return made


def test_ratios_are_those_within_rounds() -> None:
    """The machine is three times as slow in the second round, which medians alone would show as a difference."""
    first = [_trace(0, 100, 200), _trace(0, 300, 600, whole=30_000), _trace(0, 110, 190)]
    second = [
        _trace(0, 50, 100, whole=5_000),
        _trace(0, 150, 300, whole=15_000),
        _trace(0, 60, 90, whole=5_000),
    ]
    whole, layers = pairs(first, second)
    assert whole.names == ("decode", ALL, "")
    assert whole.times == pytest.approx(2)
    assert layers.names == ("decode", "layers.*.mlp.down_proj", "matmul")
    assert layers.first == pytest.approx((300e-9, 900e-9, 300e-9))
    assert layers.times == pytest.approx(2)
    assert str(table([whole, layers])).splitlines() == [
        "function  site                    operator     ms     ms   times",
        "decode    all calls                         0.010  0.005  2.000x",
        "decode    layers.*.mlp.down_proj  matmul    0.000  0.000  2.000x",
    ]


def test_layers_apart_and_what_one_of_them_lacks() -> None:
    found = pairs([_trace(0, 100, 200)], [_trace(0, 100, site="head")], every_site=True)
    assert [pair.names[1] for pair in found] == [
        ALL,
        "layers.1.mlp.down_proj",
        "layers.0.mlp.down_proj",
        "head",
    ]
    assert found[-1].first == ()
    assert found[-1].second == pytest.approx((100e-9,))
    assert [pair.times for pair in found] == [1, None, None, None]
    assert str(table(found[-1:])).splitlines()[1].split() == ["decode", "head", "matmul", "0.000"]
