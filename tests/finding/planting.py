"""Errors to be found: kernels that pass the door and are wrong at one size, and launches that are tampered with."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import relax_llm as rl
from relax_llm.plan.plan import Plan, Range
from relax_llm.plan.sizes import Box
from relax_llm.runtime.launch import Launch
from tests.artifact.checkpoints import GPT2, LLAMA

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

UNTRIED = 11
"""A number of rows that is no tile's edge: the door does not try it."""

LAYERS = 6

LLAMA_DEEP: dict[str, Any] = LLAMA | {"num_hidden_layers": LAYERS}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"num_hidden_layers": 2, "tie_word_embeddings": False},
    "mistral": LLAMA
    | {
        "num_hidden_layers": 2,
        "model_type": "mistral",
        "sliding_window": 9,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "gpt2": GPT2 | {"n_layer": 2},
}

DOWN = "layers.{}.mlp.down_proj"
GUILTY = DOWN.format(3)
ALSO_GUILTY = DOWN.format(1)

SOURCE = """
#include <stdint.h>
void NAME(const float *x, const float *weight, float *out, int64_t M) {
  for (int64_t i = 0; i < M; i++)
    for (int64_t j = 0; j < N; j++) {
      float sum = 0;
      for (int64_t k = 0; k < K; k++) sum += x[i * K + k] * weight[j * K + k];
      out[i * N + j] = sum;
    }
  WRONG
}
"""


def _kernel(name: str, wrong: str, sites: Any) -> Any:
    def make(problem: Any) -> str:
        return SOURCE.replace("NAME", name).replace("WRONG", wrong)

    return rl.kernel("matmul", name=name, sites=sites)(make)


right = _kernel("right", "", "layers.*.mlp.down_proj")
also_right = _kernel("also_right", "", "layers.*.mlp.down_proj")
wrong = _kernel("wrong", f"if (M == {UNTRIED}) out[M * N - 2] += 0.5f;", (GUILTY, ALSO_GUILTY))
KERNELS = [right, also_right, wrong]

GOOD = {"layers.*": "right"}
BAD = {"layers.*": "also_right", GUILTY: "wrong"}
WORSE = {**BAD, ALSO_GUILTY: "wrong"}


def bad_plan(own: Plan) -> Plan:
    """`WORSE` for 11 rows and more, as a plan."""
    entries = []
    for entry in own.entries:
        if entry.sites[0].endswith("down_proj"):
            above = "wrong" if GUILTY in entry.sites else "also_right"
            parts = (Range(Box.of(M=(1, 10)), "right"), Range(Box.of(M=(11, None)), above))
            entries.append(replace(entry, ranges=parts))
    return replace(own, entries=tuple(entries))


@contextmanager
def tampered(
    monkeypatch: pytest.MonkeyPatch,
    runner: rl.Runner,
    spoil: Callable[[Launch], None],
    site: str,
    operator: str,
    function: str = "prefill",
) -> Iterator[None]:
    """Behind each launch of a runner's at a site, have something done to what it has written."""
    launch_of = Launch._launch

    def launch(self: Launch, *given: Any, **options: Any) -> float:
        seconds = launch_of(self, *given, **options)
        if self._execution.knowledge.control is runner._control and (
            self.site,
            self.operator,
            self.function,
        ) == (site, operator, function):
            spoil(self)
        return seconds

    with monkeypatch.context() as patch:
        patch.setattr(Launch, "_launch", launch)
        yield
