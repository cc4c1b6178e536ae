"""What this machine can do at most, measured by two loops that every library carries, and remembered."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm import cpu, ffi
from relax_llm.artifact.manifest import Manifest
from relax_llm.places import cache_directory
from relax_llm.runtime import vm
from relax_llm.tracing.limits import Limits

MULTIPLY_ADD, READ = "relax_llm_multiply_add", "relax_llm_read"

_LANES = 16
_ALIGNMENT = 64  # bytes, which generated code counts on
_MEMORY = 2**28  # bytes; more than the caches that a few cores have for themselves
_LINE_OF_SUMS = 8 * _LANES
_COUNT = 10**5  # multiply-adds of a first try
_SECONDS = 0.02  # of one repetition: long enough for the threads to find cores of their own
_REPEATS = 5


def limits(machine: vm.VirtualMachine, manifest: Manifest, *, anew: bool = False) -> Limits:
    """What was measured on this machine before, or else what is measured now; that takes about half a second.

    Args:
        machine: That of a library, with the loops.
        manifest: The library's: what it may use of the processor decides what it can do at most.
        anew: Measure again; what is better counts.

    Raises:
        ArtifactError: The library has no such loops; it was compiled by another version.
    """
    threads = int(ffi.runtime().get_global_func("runtime.NumThreads")())
    key = f"{cpu.name()}, {threads} of {cpu.cores()} cores, {manifest.target}"
    file = cache_directory() / "limits.json"
    known = _remembered(file)
    if not anew and key in known:
        return known[key]
    found = measure(machine, threads)
    if key in known:  # the better of the two: what else ran takes away, and never adds
        found = Limits(max(found.flops, known[key].flops), max(found.bytes, known[key].bytes))
    known[key] = found
    with suppress(OSError):  # it is measured again next time
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = file.with_name(f"{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps({name: vars(one) for name, one in known.items()}, indent=1))
        temporary.replace(file)
    return found


def measure(machine: vm.VirtualMachine, threads: int) -> Limits:
    """Measure, on all threads that kernels use; the fastest of some repetitions counts."""
    multiply_add, read = machine.kernel(MULTIPLY_ADD), machine.kernel(READ)
    half, sums = _filled((threads, _LANES), 0.5), _filled((threads, _LANES), 0.0)
    out = vm.tensor(sums)
    factors = vm.tensor(half)
    count = _COUNT
    seconds = _fastest(lambda: multiply_add(factors, count, out))
    count = max(count, int(count * _SECONDS / seconds))
    seconds = _fastest(lambda: multiply_add(factors, count, out))
    flops = 2 * count * _LANES * threads / seconds
    elements = _MEMORY // 4 // threads // _LINE_OF_SUMS * _LINE_OF_SUMS
    memory = _filled((threads, elements), 1.0)
    block = vm.tensor(memory)
    return Limits(flops, memory.nbytes / _fastest(lambda: read(block, out)))


def _fastest(work: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return best


def _filled(shape: tuple[int, int], value: float) -> npt.NDArray[np.float32]:
    """An array that begins where generated code may assume that it does."""
    size = shape[0] * shape[1]
    raw = np.empty(size + _ALIGNMENT // 4, np.float32)
    start = -raw.ctypes.data % _ALIGNMENT // 4
    array = raw[start : start + size].reshape(shape)
    array[...] = value
    return array


def _remembered(file: Path) -> dict[str, Limits]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return {name: Limits(float(one["flops"]), float(one["bytes"])) for name, one in data.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # what is not there is measured
        return {}
