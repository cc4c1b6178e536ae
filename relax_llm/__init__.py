"""Compile a language model once, for every length, into kernels that you own."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relax_llm.artifact.artifact import Artifact, load
    from relax_llm.checkpoint import Checkpoint, open_checkpoint
    from relax_llm.compiler.compile import compile
    from relax_llm.compiler.pipeline import pipeline
    from relax_llm.errors import RelaxLLMError
    from relax_llm.finding.bisect import bisect
    from relax_llm.finding.compare import compare
    from relax_llm.finding.float64 import float64
    from relax_llm.plan.kernel import Declined, Layout, kernel
    from relax_llm.plan.plan import Plan
    from relax_llm.runtime.chat import Chat
    from relax_llm.runtime.recording.replay import replay
    from relax_llm.runtime.runner import Runner
    from relax_llm.runtime.state import State
    from relax_llm.tuning.tune import tune

# Where each public name lives. They are imported on first use: running an artifact must not load the compiler.
_PLACES = {
    "Artifact": "relax_llm.artifact.artifact",
    "Chat": "relax_llm.runtime.chat",
    "Checkpoint": "relax_llm.checkpoint",
    "Layout": "relax_llm.plan.kernel",
    "Plan": "relax_llm.plan.plan",
    "RelaxLLMError": "relax_llm.errors",
    "Runner": "relax_llm.runtime.runner",
    "State": "relax_llm.runtime.state",
    "Declined": "relax_llm.plan.kernel",
    "bisect": "relax_llm.finding.bisect",
    "compare": "relax_llm.finding.compare",
    "compile": "relax_llm.compiler.compile",
    "float64": "relax_llm.finding.float64",
    "kernel": "relax_llm.plan.kernel",
    "load": "relax_llm.artifact.artifact",
    "open_checkpoint": "relax_llm.checkpoint",
    "pipeline": "relax_llm.compiler.pipeline",
    "replay": "relax_llm.runtime.recording.replay",
    "tune": "relax_llm.tuning.tune",
}
_IMPORTING_TVM = {"pipeline"}  # the others import it when they are called

__all__ = [
    "Artifact",
    "Chat",
    "Checkpoint",
    "Declined",
    "Layout",
    "Plan",
    "RelaxLLMError",
    "Runner",
    "State",
    "bisect",
    "compare",
    "compile",
    "float64",
    "kernel",
    "load",
    "open_checkpoint",
    "pipeline",
    "replay",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _IMPORTING_TVM:
        importlib.import_module("relax_llm.compiler.loading").load_tvm()
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
