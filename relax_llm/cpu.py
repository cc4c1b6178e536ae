"""What this machine's processor can do, read without a compiler: the runtime checks artifacts against it."""

import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path

# The microarchitecture levels of the x86-64 psABI, as the kernel names the features in /proc/cpuinfo.
X86_LEVELS: dict[str, frozenset[str]] = {
    "x86-64": frozenset({"sse2"}),
    "x86-64-v2": frozenset({"sse2", "ssse3", "sse4_1", "sse4_2", "popcnt", "cx16"}),
}
X86_LEVELS["x86-64-v3"] = X86_LEVELS["x86-64-v2"] | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
X86_LEVELS["x86-64-v4"] = X86_LEVELS["x86-64-v3"] | {
    "avx512f",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512vl",
}


@lru_cache(maxsize=1)
def features() -> frozenset[str]:
    """The instruction set extensions of this processor, in the spelling of /proc/cpuinfo.

    Returns:
        An empty set where the operating system does not tell.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return frozenset(value.split())
        return frozenset()
    if platform.system() == "Darwin":
        names = ("machdep.cpu.features", "machdep.cpu.leaf7_features")
        found = subprocess.run(
            ["/usr/sbin/sysctl", "-n", *names], capture_output=True, text=True, check=False
        )
        return frozenset(found.stdout.lower().replace("sse4.", "sse4_").replace("avx1.0", "avx").split())
    return frozenset()


@lru_cache(maxsize=1)
def architecture() -> str:
    """The instruction set family: "x86_64", "aarch64", ... as LLVM's triples spell it."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def x86_level() -> str:
    """The highest x86-64 microarchitecture level this processor has in full."""
    return max(level for level, needed in X86_LEVELS.items() if needed <= features() or level == "x86-64")


def cores() -> int:
    """The number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def name() -> str:
    """The processor's marketing name, for people; never for decisions."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()
