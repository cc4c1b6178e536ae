"""What each pass does, to be read: tests/compiler/golden has a function before and after it, for both families."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tvm import IRModule

from relax_llm.compiler.passes.hide_internal import HideInternal
from relax_llm.kernels import builder as b
from relax_llm.kernels.inner import INTERNAL

from .modules import after, before, functions_of, kernels_of, stages, text_of

if TYPE_CHECKING:
    from collections.abc import Callable

PASSES = ("CombineProjections", "FuseMatmul", "Legalize", "SelectKernels", "LiftWeights")
families = pytest.mark.parametrize("model", ["llama", "gpt2"])


def _section(title: str, mod: IRModule) -> str:
    names = "".join(f"# {name}\n" for name in sorted(kernels_of(mod)))
    return f"# {title}\n\n{text_of(mod['prefill'])}\n# kernels:\n{names}"


@families
@pytest.mark.parametrize("name", PASSES)
def test_pass(golden: Callable[[str, str], None], name: str, model: str) -> None:
    text = f"{_section('before', before(model, name))}\n\n{_section('after', after(model, name))}"
    golden(f"{model}-{name}", text)


@families
def test_schedule_rest(golden: Callable[[str, str], None], model: str) -> None:
    """The kernels that are plain loops until here; the functions that call them do not change."""
    old, new = before(model, "ScheduleRest"), after(model, "ScheduleRest")
    plain = [
        name
        for name, func in sorted(kernels_of(old).items())
        if "tirx.is_scheduled" not in (func.attrs or {})
    ]
    parts = [f"# before\n\n{text_of(old[name])}\n\n# after\n\n{text_of(new[name])}" for name in plain]
    golden(f"{model}-ScheduleRest", "\n\n".join(parts) or "# every kernel is scheduled already\n")
    for name, function in functions_of(old).items():
        assert text_of(function) == text_of(new[name])


def _double() -> None:
    rows = b.size("M")
    x, out = b.argument("x", (rows, 8)), b.argument("out", (rows, 8))
    b.store(out, b.load(x, 0, 0, lanes=8) * 2.0, 0, 0, lanes=8)


def test_hide_internal(golden: Callable[[str, str], None]) -> None:
    """What only a dispatcher calls loses its symbol; what the model calls keeps it."""
    called = b.prim_func("mine__double", _double).with_attr(INTERNAL, True)
    mod = IRModule({"mine__double": called, "dispatcher": b.prim_func("dispatcher", _double)})
    golden("HideInternal", f"# before\n\n{text_of(mod)}\n\n# after\n\n{text_of(HideInternal()(mod))}")


def digest(model: str) -> str:
    """A digest of a model's text after every pass."""
    texts = "".join(f"{name}\n{mod.script()}" for name, mod in stages(model))
    return hashlib.sha256(texts.encode()).hexdigest()


@pytest.mark.parametrize("seed", ["0", "4711"])
def test_the_result_is_the_same_in_every_process(seed: str) -> None:
    """Names and order follow from the model alone, whatever the order of sets and dictionaries of objects."""
    code = "from tests.compiler.test_golden import digest; print(digest('llama'), digest('gpt2'))"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest("llama"), digest("gpt2")]
