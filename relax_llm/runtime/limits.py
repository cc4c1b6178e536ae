"""What this machine can do at most, measured by loops that every library carries, and remembered."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm import cpu, ffi
from relax_llm.artifact.manifest import Manifest
from relax_llm.places import cache_directory
from relax_llm.runtime import vm
from relax_llm.tracing.limits import Limits

MULTIPLY_ADD, READ, LOOPS = "relax_llm_multiply_add", "relax_llm_read", "relax_llm_chains"
MULTIPLY_BF16, MULTIPLY_INT8 = "relax_llm_multiply_add_bf16", "relax_llm_multiply_add_int8"

_LANES = 16
_ALIGNMENT = 64  # bytes, which generated code counts on
_MEMORY = 2**28  # bytes; more than the caches that a few cores have for themselves
_LINE_OF_SUMS = 8 * _LANES
_COUNT = 10**5  # multiply-adds of a first try
_LOOPS = 1000  # some milliseconds
_TASKS = 32  # of each thread in a loop: as many as it takes in small parts
_STEPS = 64  # multiply-adds of a task in a chain, so that a thread's share takes about a microsecond
_SECONDS = 0.02  # of one repetition: long enough for the threads to find cores of their own
_REPEATS = 5


def limits(machine: vm.VirtualMachine, manifest: Manifest, *, anew: bool = False) -> Limits:
    """What was measured on this machine last, or else what is measured now; that takes about half a second.

    Args:
        machine: That of a library, with the loops.
        manifest: The library's: what it may use of the processor decides what it can do at most.
        anew: Measure again: a virtual machine may have got other cores, or more or less of memory's speed.

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
    known[key] = found
    with suppress(OSError):  # it is measured again next time
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = file.with_name(f"{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps({name: vars(one) for name, one in known.items()}, indent=1))
        temporary.replace(file)
    return found


def measure(machine: vm.VirtualMachine, threads: int) -> Limits:
    """Measure, on all threads that kernels use; the fastest of some repetitions counts."""
    read = machine.kernel(READ)
    flops = _operations(machine, MULTIPLY_ADD, threads, np.float32(0.5), "float32", 1)
    bf16 = _operations(machine, MULTIPLY_BF16, threads, np.int32(0x3F003F00), "float32", 2)  # a half, twice
    int8 = _operations(machine, MULTIPLY_INT8, threads, np.int32(0x01010101), "int32", 4)
    elements = _MEMORY // 4 // threads // _LINE_OF_SUMS * _LINE_OF_SUMS
    memory = _filled((threads, elements), np.float32(1))
    block, out = vm.tensor(memory), vm.tensor(_filled((threads, _LANES), np.float32(0)))
    seconds = _fastest(lambda: read(block, out))
    return Limits(flops, memory.nbytes / seconds, bf16, int8, _loop(machine, threads))


def _loop(machine: vm.VirtualMachine, threads: int) -> float:
    """Seconds that a loop over all threads takes longer than each has to do: what it costs to begin and to end.

    The threads must have something to do for that: of an empty loop the first one has done all before another begins.
    """
    loops = machine.kernel(LOOPS)
    rows = vm.tensor(_filled((_TASKS * threads, _LANES), np.float32(0)))
    shared, alone = (_fastest(partial(loops, _LOOPS, _STEPS, alone, rows)) / _LOOPS for alone in (0, 1))
    return max(0.0, shared - alone / threads)


def _operations(
    machine: vm.VirtualMachine, loop: str, threads: int, factor: Any, result: str, products: int
) -> float:
    """Operations in a second of a loop with some products in each lane; 0 where the library does not have it."""
    if not machine.has_kernel(loop):
        return 0.0
    multiply_add = machine.kernel(loop)
    factors = vm.tensor(_filled((threads, _LANES), factor))
    out = vm.tensor(_filled((threads, _LANES), np.dtype(result).type(0)))
    count = _COUNT
    seconds = _fastest(lambda: multiply_add(factors, count, out))
    count = max(count, int(count * _SECONDS / seconds))
    seconds = _fastest(lambda: multiply_add(factors, count, out))
    return 2 * products * count * _LANES * threads / seconds


def _fastest(work: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return best


def _filled(shape: tuple[int, int], value: Any) -> npt.NDArray[Any]:
    """An array of four-byte elements that begins where generated code may assume that it does."""
    size = shape[0] * shape[1]
    raw = np.empty(size + _ALIGNMENT // 4, value.dtype)
    start = -raw.ctypes.data % _ALIGNMENT // 4
    array = raw[start : start + size].reshape(shape)
    array[...] = value
    return array


def _remembered(file: Path) -> dict[str, Limits]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return {key: Limits.from_json(one) for key, one in data.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # what is not there is measured
        return {}
