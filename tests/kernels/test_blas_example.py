"""The example of a kernel that calls a BLAS, through the door that a user's kernel takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import relax_llm as rl
from relax_llm.kernels.checking import check
from relax_llm.kernels.forms import realize
from relax_llm.kernels.machine import machine
from relax_llm.kernels.matmul import Matmul

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "blas.py"


@pytest.fixture
def example() -> Any:
    spec = importlib.util.spec_from_file_location("blas_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_passes_the_check_at_the_door(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if example.library() is None:
        pytest.skip("there is no BLAS here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    realized = realize(example.blas, Matmul(70, 33, bias=True), machine())
    assert realized.problem == Matmul(70, 33)  # the bias is added beside it
    assert check(realized, machine()).startswith("checked at M=64")


def test_the_example_declines_without_a_blas(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "library", lambda: None)
    with pytest.raises(rl.Declined, match="RELAX_LLM_BLAS"):
        realize(example.blas, Matmul(70, 33), machine())
