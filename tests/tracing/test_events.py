"""What a trace is written as is the Trace Event Format, and is read as what it was."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import relax_llm as rl
from relax_llm.errors import InputError
from relax_llm.tracing.trace import Trace
from tests.tracing.traces import LIMITS, trace

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PHASES = "BEXiICbneNODMVvsStfPpRcC(),"
"""Of the format's table of event phases."""

METADATA = {"process_name", "process_labels", "process_sort_index", "thread_name", "thread_sort_index"}

OTHER = '"producer": "relax-llm", "bytes": 1, "bf16": 0, "int8": 0'

TOP = {"traceEvents", "displayTimeUnit", "systemTraceEvents", "otherData", "stackFrames", "samples"}


def check(document: Mapping[str, Any]) -> None:
    """Whether a document keeps to the published format, section by section of it."""
    assert document.keys() <= TOP, "JSON object format"
    assert document["displayTimeUnit"] in ("ms", "ns")
    ends: dict[tuple[int, int], list[int]] = {}
    last: dict[tuple[int, int], int] = {}
    for event in document["traceEvents"]:
        assert isinstance(event["name"], str)
        assert len(event["ph"]) == 1
        assert event["ph"] in PHASES
        assert type(event["pid"]) is type(event["tid"]) is int
        assert isinstance(event.get("args", {}), dict)
        if event["ph"] == "M":
            assert event["name"] in METADATA
            assert isinstance(event["args"]["name"], str)
            continue
        assert event["ph"] == "X", "this writer's events are complete events"
        assert isinstance(event["cat"], str)
        assert min(event["ts"], event["dur"]) >= 0
        where = event["pid"], event["tid"]
        begun, ended = round(event["ts"] * 1000), round((event["ts"] + event["dur"]) * 1000)
        assert begun >= last.get(where, 0), "in the order of time"
        last[where] = begun
        around = ends.setdefault(where, [])
        while around and around[-1] <= begun:
            around.pop()
        assert not around or ended <= around[-1], "events of a thread lie in each other, or apart"
        around.append(ended)


def test_the_format() -> None:
    text = json.dumps(_document(trace()), allow_nan=False)
    document = json.loads(text)
    check(document)
    named = {
        (event["name"], event["tid"]): event["args"]["name"]
        for event in document["traceEvents"]
        if event["ph"] == "M"
    }
    assert named == {
        ("process_name", 11): "relax-llm",
        ("process_name", 12): "relax-llm",
        ("thread_name", 11): "MainThread",
        ("thread_name", 12): "worker",
    }
    calls = [event for event in document["traceEvents"] if event.get("cat") == "call"]
    assert [(call["name"], call["ts"], call["dur"], call["tid"]) for call in calls] == [
        ("prefill", 0.001, 5.0, 11),
        ("decode", 10.001, 5.0, 11),
        ("decode", 20.001, 5.0, 12),
    ]
    second = next(event for event in document["traceEvents"] if event["args"].get("index") == 1)
    assert second == {
        "ph": "X",
        "name": "matmul layers.0.mlp.down_proj",
        "cat": "matmul",
        "ts": 2.001,
        "dur": 2.007,
        "pid": 7,
        "tid": 11,
        "args": {
            "function": "prefill",
            "index": 1,
            "site": "layers.0.mlp.down_proj",
            "operator": "matmul",
            "kernel": "tiled",
            "symbol": "matmul_n4",
            "M": 1,
            "flops": 1000.0,
            "bytes": 200.0,
            "products": "f32",
            "GFLOP/s": round(1000 / 2007, 3),
            "GB/s": round(200 / 2007, 3),
            "% of limit": round(100 * 20 / 2007, 1),  # memory: 200 bytes at 10 GB/s
            "call": 0,
        },
    }


def test_what_does_not_keep_to_it_is_found() -> None:
    changes: list[dict[str, Any]] = [
        {"ts": -1.0},
        {"dur": 1e9},
        {"ph": "?"},
        {"tid": "main"},
        {"args": []},
        {"ts": 0.0, "dur": 0.0005},
    ]
    for change in changes:
        document = _document(trace())
        document["traceEvents"][-1].update(change)
        with pytest.raises((AssertionError, TypeError)):
            check(document)


def test_read_again(tmp_path: Path) -> None:
    made = trace()
    made.save(tmp_path / "trace.json")
    found = Trace.read(tmp_path / "trace.json")
    assert found.limits == LIMITS
    assert found.process == 7
    assert found.launches == made.launches
    assert str(found) == str(made)
    for one, other in zip(found.calls, made.calls, strict=True):
        assert (one.function, one.sizes, one.begun, one.ended, one.thread) == (
            other.function,
            other.sizes,
            other.begun,
            other.ended,
            other.thread,
        )
        assert one.launches == other.launches


def test_limits_without_loops_are_read(tmp_path: Path) -> None:
    document = _document(trace())
    del document["otherData"]["loop"]
    (tmp_path / "trace.json").write_text(json.dumps(document))
    assert Trace.read(tmp_path / "trace.json").limits == LIMITS


def test_a_trace_of_nothing(tmp_path: Path) -> None:
    made = Trace(LIMITS)
    made.save(tmp_path / "trace.json")
    check(json.loads((tmp_path / "trace.json").read_text()))
    assert Trace.read(tmp_path / "trace.json").calls == ()


def test_calls_of_several_threads_at_once(tmp_path: Path) -> None:
    """They wait for each other, but begin their Python in any order: events are written in the order of time."""
    made = Trace(LIMITS)
    for call in reversed(trace().calls):
        made.add(call)
    document = _document(made)
    check(document)
    made.save(tmp_path / "trace.json")
    assert [call.begun for call in Trace.read(tmp_path / "trace.json").calls] == [1, 10_001, 20_001]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "\x00\xff",
        '{"traceEvents": []}',
        '{"traceEvents": [], "otherData": {"producer": "chrome"}}',
        f'{{"traceEvents": [{{"ph": "X"}}], "otherData": {{{OTHER}, "flops": 1}}}}',
        f'{{"traceEvents": 3, "otherData": {{{OTHER}, "flops": 1}}}}',
        f'{{"traceEvents": [], "otherData": {{{OTHER}, "flops": "x"}}}}',
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "trace.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"trace\.json is not a trace of relax-llm .*; make one with"):
        Trace.read(tmp_path / "trace.json")


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        Trace.read(tmp_path / "missing.json")
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        trace().save(tmp_path)
    with pytest.raises(rl.RelaxLLMError, match="grouped by operator, kernel, site, place, not by 'layer'"):
        trace().by("layer")  # type: ignore[arg-type]


def _document(made: Trace) -> dict[str, Any]:
    from relax_llm.tracing.events import document

    return document(made)
