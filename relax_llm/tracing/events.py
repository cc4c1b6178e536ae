"""Traces in the Trace Event Format, which Perfetto and chrome://tracing open.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. A call is a complete event
(phase X) that contains a complete event for each of its launches; times are microseconds, to the nanosecond.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from relax_llm.errors import InputError
from relax_llm.tracing.limits import Limits
from relax_llm.tracing.trace import Trace, TracedCall, TracedLaunch

_PRODUCER = "relax-llm"
_SIZES = ("M", "batch", "seq", "kv_len")


def document(trace: Trace) -> dict[str, Any]:
    """A trace as the file has it."""
    return {
        "displayTimeUnit": "ns",
        "otherData": {"producer": _PRODUCER, **vars(trace.limits)},
        "traceEvents": list(_events(trace)),
    }


def write(trace: Trace, path: str | os.PathLike[str]) -> None:
    """See `Trace.save`."""
    try:
        Path(path).write_text(json.dumps(document(trace)), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{os.fspath(path)} cannot be written: {error.strerror or error}.") from error


def read(path: str | os.PathLike[str]) -> Trace:
    """See `Trace.read`."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8", errors="replace"))
        about = data["otherData"]
        if about["producer"] != _PRODUCER:
            raise ValueError(f"it was written by {about['producer']}")
        events = data["traceEvents"]
        trace = Trace(Limits.from_json(about), int(events[0]["pid"]) if events else None)
        names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
        launches: dict[int, list[TracedLaunch]] = {}
        for event in events:
            if event["ph"] == "X" and event["cat"] != "call":
                launches.setdefault(event["args"]["call"], []).append(_launch(event))
        for number, event in enumerate(event for event in events if event.get("cat") == "call"):
            trace.add(_call(event, names, tuple(launches.get(number, ()))))
    except OSError as error:
        raise InputError(f"The trace {os.fspath(path)} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"{os.fspath(path)} is not a trace of relax-llm ({type(error).__name__}: {error}); "
            "make one with `relax-llm trace -o trace.json`."
        ) from error
    return trace


def _events(trace: Trace) -> Iterator[dict[str, Any]]:
    for thread, name in dict(call.thread for call in trace.calls).items() or [(0, "main")]:
        for kind, text in (("process_name", _PRODUCER), ("thread_name", name)):
            yield {"ph": "M", "name": kind, "pid": trace.process, "tid": thread, "args": {"name": text}}
    for number, call in enumerate(sorted(trace.calls, key=lambda call: call.begun)):
        where = {"pid": trace.process, "tid": call.thread[0]}
        yield {
            "ph": "X",
            "name": call.function,
            "cat": "call",
            **_span(call),
            **where,
            "args": {**call.sizes, "outside kernels us": round(call.outside * 1e6, 3)},
        }
        for launch in call.launches:
            yield {
                "ph": "X",
                "name": f"{launch.operator} {launch.site}",
                "cat": launch.operator,
                **_span(launch),
                **where,
                "args": {
                    "function": launch.function,
                    "index": launch.index,
                    "site": launch.site,
                    "operator": launch.operator,
                    "kernel": launch.kernel,
                    "symbol": launch.symbol,
                    **launch.sizes,
                    "flops": launch.flops,
                    "bytes": launch.bytes,
                    "products": launch.products,
                    "GFLOP/s": round(launch.gflops, 3),
                    "GB/s": round(launch.gbytes, 3),
                    "% of limit": round(100 * launch.share(trace.limits), 1),
                    "call": number,
                },
            }


def _span(timed: TracedCall | TracedLaunch) -> dict[str, float]:
    return {"ts": timed.begun / 1000, "dur": (timed.ended - timed.begun) / 1000}


def _times(event: Mapping[str, Any]) -> tuple[int, int]:
    begun = round(event["ts"] * 1000)
    return begun, begun + round(event["dur"] * 1000)


def _call(
    event: Mapping[str, Any], threads: Mapping[int, str], launches: tuple[TracedLaunch, ...]
) -> TracedCall:
    sizes = {name: int(size) for name, size in event["args"].items() if name in _SIZES}
    thread = (event["tid"], threads[event["tid"]])
    return TracedCall(event["name"], sizes, *_times(event), thread, lambda: launches)


def _launch(event: Mapping[str, Any]) -> TracedLaunch:
    said = event["args"]
    texts = {
        name: str(said[name]) for name in ("function", "site", "operator", "kernel", "symbol", "products")
    }
    sizes = {name: int(size) for name, size in said.items() if name in _SIZES}
    begun, ended = _times(event)
    return TracedLaunch(
        index=int(said["index"]),
        sizes=sizes,
        begun=begun,
        ended=ended,
        flops=float(said["flops"]),
        bytes=float(said["bytes"]),
        **texts,
    )
