"""Machine code in parts: how functions are divided, what is kept, and when it is used again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tvm import ir

from relax_llm.compiler import objects
from relax_llm.kernels.inner import complete
from relax_llm.kernels.library import build
from relax_llm.kernels.lookup import Embedding
from relax_llm.kernels.machine import Machine, machine
from relax_llm.kernels.matmul.problem import Matmul
from tests.machines import PLAINER

if TYPE_CHECKING:
    from pathlib import Path

    from tvm.tirx import PrimFunc

    from relax_llm.kernels.problem import Problem

HERE = machine(PLAINER)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where parts are kept, which is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "relax_llm" / "objects"


def functions(*problems: Problem) -> dict[ir.GlobalVar, PrimFunc]:
    return complete({ir.GlobalVar(problem.name): build(problem, HERE) for problem in problems})


def kept(cache: Path) -> dict[str, int]:
    """The parts that are kept, and the file of each, which is another one where it was written again."""
    return {file.name: file.stat().st_ino for file in cache.iterdir()}


def test_inner_functions_are_parts_of_their_own() -> None:
    """Two products with the same K share what multiplies; the entry lies with what it calls."""
    first, second = Matmul(40, 32), Matmul(72, 32)
    divided = [
        {var.name_hint for var in part} for part in objects.parts(functions(first, second, Embedding(32, 16)))
    ]
    alone = [part for part in divided if not part & {first.name, second.name}]
    shared = next(part for part in alone if any(name.endswith("__entry") for name in part))
    assert {first.name, second.name} & set().union(*divided) == {first.name, second.name}
    assert not any({first.name, second.name} <= part for part in divided)
    for problem in (first, second):
        own = next(part for part in divided if problem.name in part)
        assert own & shared
        assert not any(name.endswith("__entry") for name in own)
    assert {Embedding(32, 16).name} in divided


def test_what_was_generated_is_used_again(cache: Path) -> None:
    first = objects.compiled(functions(Matmul(40, 32)), HERE, cache=True)
    before = kept(cache)
    assert len(before) == len(first)
    assert objects.compiled(functions(Matmul(40, 32)), HERE, cache=True) == first
    assert kept(cache) == before
    more = objects.compiled(functions(Matmul(72, 32)), HERE, cache=True)
    after = kept(cache)
    assert before.items() < after.items()
    assert len(after) == len(before) + 1  # the inner functions are known
    assert len(more) == len(first)


def test_code_depends_on_the_target(cache: Path) -> None:
    plain: Machine = machine("x86-64" if HERE.architecture == "x86_64" else None)
    func = functions(Embedding(32, 16))
    first = objects.compiled(func, HERE, cache=True)
    other = objects.compiled(func, plain, cache=True)
    assert (other != first) == (plain != HERE)


def test_without_the_cache_nothing_is_read_or_kept(cache: Path) -> None:
    func = functions(Embedding(32, 16))
    expected = objects.compiled(func, HERE, cache=False)
    assert not cache.exists()
    objects.compiled(func, HERE, cache=True)
    for file in cache.iterdir():
        file.write_bytes(b"broken")
    assert objects.compiled(func, HERE, cache=False) == expected
    assert {file.read_bytes() for file in cache.iterdir()} == {b"broken"}


@pytest.mark.parametrize("left", [0, 100])
def test_what_is_broken_is_generated_anew(cache: Path, left: int) -> None:
    func = functions(Embedding(32, 16))
    expected = objects.compiled(func, HERE, cache=True)
    (file,) = cache.iterdir()
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:left])
    assert objects.compiled(func, HERE, cache=True) == expected
    assert file.stat().st_size == whole


def test_what_was_used_longest_ago_goes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects.compiled(functions(Embedding(32, 16)), HERE, cache=True)
    (first,) = cache.iterdir()
    monkeypatch.setattr(objects, "_MOST", 1.5 * first.stat().st_size)
    objects.compiled(functions(Embedding(33, 16)), HERE, cache=True)
    (second,) = cache.iterdir()
    assert second != first
    monkeypatch.setattr(objects, "_MOST", 0)
    objects.compiled(functions(Embedding(33, 16)), HERE, cache=True)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file")
    assert objects.compiled(functions(Embedding(32, 16)), HERE, cache=True)
