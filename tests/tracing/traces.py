"""A trace made by hand."""

from __future__ import annotations

from relax_llm.tracing.limits import Limits
from relax_llm.tracing.trace import Trace, TracedCall, TracedLaunch

LIMITS = Limits(100e9, 10e9)
HOSTILE = '<script>alert("1 & 2")</script>'


def launch(
    index: int, begun: int, ended: int, *, function: str = "decode", site: str = "layers.0.mlp.down_proj"
) -> TracedLaunch:
    """A matmul of one row: 1000 operations, 200 bytes."""
    return TracedLaunch(
        function, index, site, "matmul", "tiled", "matmul_n4", {"M": 1}, begun, ended, 1000.0, 200.0
    )


def trace() -> Trace:
    """A prefill and two decodes, of two launches each; the last on another thread, and its second launch failed."""
    made = Trace(LIMITS, process=7)
    for number, function in enumerate(("prefill", "decode", "decode")):
        at = 10_000 * number + 1
        launches = [
            launch(0, at + 100, at + 1600, function=function, site="embed"),
            launch(1, at + 2000, at + 4007, function=function),
        ]
        count = 1 if number == 2 else 2
        thread = (12, "worker") if number == 2 else (11, "MainThread")
        sizes = {"batch": 1, "seq": 1, "kv_len": number + 1}
        made.add(
            TracedCall(function, sizes, at, at + 5000, thread, lambda made=tuple(launches[:count]): made)  # type: ignore[misc]
        )
    return made
