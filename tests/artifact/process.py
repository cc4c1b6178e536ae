"""Other processes: what they may import, and what they report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

FORBIDDING = '''
import importlib.machinery, sys


class Forbid(importlib.machinery.PathFinder):
    """Let forbidden modules be found, as they are installed, but fail to import."""

    names = {names!r}

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name not in cls.names:
            return None
        spec = super().find_spec(name, path, target)
        if spec is not None:
            spec.loader = cls
        return spec

    @staticmethod
    def create_module(spec):
        return None

    @staticmethod
    def exec_module(module):
        raise AssertionError(f"{{module.__name__}} was imported")


sys.meta_path.insert(0, Forbid)
'''
"""Code for the start of a process that must not import some modules."""

COMPILERS = (
    "tvm",
    "torch",
    "transformers",
    "relax_llm.compiler",
    "relax_llm.checkpoint",
    "relax_llm.kernels",
    "relax_llm.layers",
)


def forbid(*names: str) -> str:
    """Code that forbids the import of these modules."""
    return FORBIDDING.format(names=names)


def start(code: str, *arguments: Any, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start Python on some code, with warnings as errors; arguments arrive in sys.argv[1:]."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )


def finish(process: subprocess.Popen[str]) -> Any:
    """What a process printed last, read as JSON; it must have succeeded."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def run(code: str, *arguments: Any, env: Mapping[str, str] | None = None) -> Any:
    """Run code in a process of its own and return what it printed last, read as JSON."""
    return finish(start(code, *arguments, env=env))
