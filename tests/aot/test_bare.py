"""An artifact in a process that has the runtime and no compiler: nothing of it can be imported or loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import relax_llm as rl

from ..artifact.process import COMPILERS, forbid, run

if TYPE_CHECKING:
    from pathlib import Path

SIZES = (1, 2, 7, 8, 9, 31, 64, 65, 120)
"""Tokens in one call: both sides of where tiles end and other kernels may take over."""

BARE = (
    forbid(*COMPILERS)
    + """
import json, sys


def refuse(event, arguments):
    if event == "ctypes.dlopen" and "compiler" in str(arguments[0]):
        raise AssertionError(f"{arguments[0]} was loaded")


sys.addaudithook(refuse)

import numpy as np
import relax_llm as rl

runner = rl.Runner(rl.load(sys.argv[1]))
ids = np.load(sys.argv[2])
found = {}
for size in json.loads(sys.argv[3]):
    state = runner.start()
    prefill = runner.prefill(state, ids[:size])
    found[str(size)] = [prefill.tolist(), runner.decode(state, int(ids[size])).tolist()]
with open("/proc/self/maps") as file:
    libraries = sorted({line.split("/")[-1].strip() for line in file if "libtvm" in line})
print(json.dumps({"logits": found, "libraries": libraries}))
"""
)


def test_it_runs_every_size_without_the_compiler(artifact: rl.Artifact, tmp_path: Path) -> None:
    ids = np.random.default_rng(3).integers(0, artifact.manifest.vocab_size, max(SIZES) + 1)
    np.save(tmp_path / "ids.npy", ids)
    found = run(BARE, artifact.path, tmp_path / "ids.npy", list(SIZES))
    assert {"libtvm_ffi.so", "libtvm_runtime.so"} <= set(found["libraries"])
    assert not any("compiler" in name for name in found["libraries"])
    runner = rl.Runner(artifact)
    for size in SIZES:
        state = runner.start()
        prefill = runner.prefill(state, ids[:size])
        decode = runner.decode(state, int(ids[size]))
        np.testing.assert_array_equal(np.float32(found["logits"][str(size)]), [prefill, decode])
