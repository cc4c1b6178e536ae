"""Every range of a plan in a process without the compiler: which kernel runs, told by the kernels themselves."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

import relax_llm as rl

from ..artifact.process import COMPILERS, forbid, run
from .conftest import PLAIN

if TYPE_CHECKING:
    from pathlib import Path

BOUNDS = {"few": (1, 2), "some": (3, 8), "many": (9, None)}
SIZES = (1, 2, 3, 8, 9, 40)

COUNTING = """
#include <stdint.h>
#define PASTE(a, b) a##b
#define COUNTER(function) PASTE(function, _launches)
int64_t COUNTER({name});
void {name}(const float *x, const float *weight, float *out, int64_t M) {{
  COUNTER({name})++;
  for (int64_t i = 0; i < M; i++)
    for (int64_t j = 0; j < N; j++) {{
      float sum = 0;
      for (int64_t k = 0; k < K; k++) sum += x[i * K + k] * weight[j * K + k];
      out[i * N + j] = sum;
    }}
}}
"""

BARE = (
    forbid(*COMPILERS)
    + """
import ctypes, json, sys
import numpy as np
import relax_llm as rl

artifact = rl.load(sys.argv[1])
runner = rl.Runner(artifact)
library = ctypes.CDLL(str(artifact.library))
counters = {name: ctypes.c_int64.in_dll(library, name) for name in json.loads(sys.argv[3])}
ids, found = np.load(sys.argv[2]), {}
for size in json.loads(sys.argv[4]):
    for counter in counters.values():
        counter.value = 0
    plain = runner.prefill(runner.start(), ids[:size])
    own = {name: counter.value for name, counter in counters.items()}
    with runner.counting() as counts:
        counted = runner.prefill(runner.start(), ids[:size])
    np.testing.assert_array_equal(plain, counted)
    told = {kernel: counts.launches(kernel=kernel, operator="matmul") for kernel in ("few", "some", "many")}
    found[str(size)] = [own, told]
print(json.dumps(found))
"""
)


def _counting(name: str) -> Any:
    source = COUNTING.format(name=name)
    return rl.kernel("matmul", name=name, m=BOUNDS[name], sites="*.down_proj")(lambda problem: source)


def _serving(rows: int) -> str:
    return next(
        name for name, (first, last) in BOUNDS.items() if first <= rows and (last is None or rows <= last)
    )


def test_each_ranges_kernel_runs(checkpoint: Path, tmp_path: Path) -> None:
    artifact = rl.compile(
        checkpoint, kernels=[_counting(name) for name in BOUNDS], output=tmp_path / "artifact", target=PLAIN
    )
    product = re.match(r"matmul_n\d+_k\d+", artifact.plan.at("layers.0.mlp.down_proj").problem)
    assert product
    symbols = {name: f"{name}__{product[0]}_launches" for name in BOUNDS}
    ids = np.random.default_rng(0).integers(0, artifact.manifest.vocab_size, max(SIZES))
    np.save(tmp_path / "ids.npy", ids)
    told = run(
        BARE, artifact.path, tmp_path / "ids.npy", json.dumps(list(symbols.values())), json.dumps(SIZES)
    )
    layers = len(artifact.manifest.caches)
    for size, (own, counted) in told.items():
        serving, of_last = (_serving(rows) for rows in (int(size), 1))
        expected = {name: (layers - 1) * (name == serving) + (name == of_last) for name in BOUNDS}
        assert {name: own[symbol] for name, symbol in symbols.items()} == expected
        assert counted == expected
