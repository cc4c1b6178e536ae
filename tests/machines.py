"""For which processor a test compiles, where it does not matter: one whose code is generated quickly."""

from __future__ import annotations

from relax_llm import cpu

_LEVEL = "x86-64-v3"

PLAINER: str | None = (
    _LEVEL if cpu.architecture() == "x86_64" and cpu.X86_LEVELS[_LEVEL] <= cpu.features() else None
)
"""The `target` of models whose tests are about no instruction: in AVX-512 they take four times as long to compile.

None is this processor, where it is no x86-64-v3 or nothing of the kind.
"""
