"""`relax-llm env` and `--version` say what there is."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import TYPE_CHECKING

import pytest

from relax_llm import cpu

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Outcome


def test_json(call: Callable[..., Outcome], artifact: Path, cache_directory: Path) -> None:
    found = call("env", "--json").json
    assert found["packages"]["apache-tvm"] == metadata.version("apache-tvm")
    assert found["python"]["executable"] == sys.executable
    assert found["cpu"]["cores"] == cpu.cores()
    assert set(found["cpu"]["features"]) <= cpu.features()
    assert set(found["architectures"]) >= {"gpt2", "llama", "mistral"}
    assert found["cache"]["path"] == str(cache_directory / "relax_llm")
    assert found["cache"]["artifacts"] >= 1
    assert found["cache"]["bytes"] >= sum(file.stat().st_size for file in artifact.iterdir())
    assert found["extras"]["hf"] is True


def test_text(call: Callable[..., Outcome]) -> None:
    done = call("env")
    assert (done.code, done.err) == (0, "")
    assert f"numpy           {metadata.version('numpy')}\n" in done.out
    assert cpu.name() in done.out


def test_an_installation_that_is_broken_can_be_looked_at(
    call: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "relax_llm.compiler.architectures", None)
    monkeypatch.setitem(sys.modules, "tvm.support.cc", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = call("env")
    assert done.code == 0
    assert "none: ModuleNotFoundError" in done.out
    assert "compiling needs one" in done.out
    assert "0 artifacts, 0 B" in done.out


def test_version(call: Callable[..., Outcome]) -> None:
    done = call("--version")
    assert (done.code, done.out) == (0, f"relax-llm {metadata.version('relax-llm')}\n")
