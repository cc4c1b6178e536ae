"""What the machine can do at most is measured once, by the library itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import pytest

import relax_llm as rl
from relax_llm.errors import InputError
from relax_llm.runtime import limits
from relax_llm.runtime.speed import measure
from relax_llm.tracing.limits import Limits, parse

from ..machines import PLAINER

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def llama(models: dict[str, Path], plainer_machine: None) -> rl.Runner:
    return rl.Runner(rl.compile(models["llama"]))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where limits are remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "relax_llm" / "limits.json"


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Callable[[Limits | None], None]:
    """Have measurements give this; or fail, where they must not be made."""

    def give(found: Limits | None) -> None:
        def measure(*_: object) -> Limits:
            assert found is not None, "it was measured again"
            return found

        monkeypatch.setattr(limits, "measure", measure)

    return give


def test_measured(llama: rl.Runner, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_MEMORY", 2**22)
    monkeypatch.setattr(limits, "_SECONDS", 0.001)
    found = llama.limits()
    assert 1e8 < found.flops < 1e14, "between a microcontroller and a data center"
    assert 1e8 < found.bytes < 1e13
    assert 0 <= found.loop < 1e-2, "0 for one thread alone"
    assert found.bf16 == found.int8 == 0 or not PLAINER, "the library has no instructions for these"
    assert [Limits(**one) for one in json.loads(file.read_text()).values()] == [found]


def test_a_loop_costs_what_it_takes_beside_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared 3 us, alone 4 us: of two threads each has 2 us to do. Never less than nothing."""

    class Machine:
        def kernel(self, name: str) -> Callable[..., None]:
            assert name == limits.LOOPS
            return lambda *_: None

    def costs(shared: float, alone: float, threads: int) -> float:
        seconds = iter([shared * limits._LOOPS, alone * limits._LOOPS])
        monkeypatch.setattr(limits, "_fastest", lambda work: next(seconds))
        return limits._loop(cast("Any", Machine()), threads)

    assert costs(3e-6, 4e-6, 2) == pytest.approx(1e-6)
    assert costs(3e-6, 4e-6, 4) == pytest.approx(2e-6)
    assert costs(3e-6, 9e-6, 2) == 0


def test_remembered(llama: rl.Runner, file: Path, measuring: Callable[[Limits | None], None]) -> None:
    measuring(Limits(2e11, 3e10))
    assert llama.limits() == Limits(2e11, 3e10)
    measuring(None)
    assert llama.limits() == Limits(2e11, 3e10)
    with llama.tracing() as trace:
        llama.prefill(llama.start(), [1])
    assert trace.limits == Limits(2e11, 3e10)


def test_the_last_one_counts(
    llama: rl.Runner, file: Path, measuring: Callable[[Limits | None], None]
) -> None:
    measuring(Limits(2e11, 3e10))
    llama.limits()
    measuring(Limits(3e11, 1e10))
    assert llama.limits(anew=True) == Limits(3e11, 1e10)
    measuring(None)
    assert llama.limits() == Limits(3e11, 1e10)


def test_speeds_are_compared_with_the_limits_of_their_rounds(
    llama: rl.Runner, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = iter([Limits(1e11, 5e10), Limits(3e11, 1e10), Limits(2e11, 2e10)])
    monkeypatch.setattr(limits, "measure", lambda *_: next(rounds))
    assert measure(llama, [2], decodes=0, rounds=3).limits == Limits(2e11, 2e10)
    assert next(rounds, None) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 1}', '{"x": {"flops": 1}}', "\x00"])
def test_a_file_that_is_none_is_measured_over(
    llama: rl.Runner, file: Path, measuring: Callable[[Limits | None], None], text: str
) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(text)
    measuring(Limits(1e11, 1e10))
    assert llama.limits() == Limits(1e11, 1e10)
    measuring(None)
    assert llama.limits() == Limits(1e11, 1e10)


def test_each_machine_has_its_own(
    llama: rl.Runner,
    file: Path,
    measuring: Callable[[Limits | None], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measuring(Limits(1e11, 1e10))
    llama.limits()
    monkeypatch.setattr("relax_llm.cpu.name", lambda: "another processor")
    measuring(Limits(5e11, 5e10))
    assert llama.limits() == Limits(5e11, 5e10)
    assert len(json.loads(file.read_text())) == 2


def test_products_have_limits_of_their_own() -> None:
    both = Limits(1e9, 1e9, bf16=2e9, int8=4e9)
    assert [both.seconds(8e9, 1e9, products) for products in ("f32", "bf16", "int8")] == [8, 4, 2]
    assert Limits(1e9, 1e9).seconds(8e9, 1e9, "int8") == 8, "without an instruction, what f32 can do"


def test_given() -> None:
    assert parse("230,32.5") == Limits(230e9, 32.5e9)
    assert str(parse("230,32.5")) == "230 GFLOP/s, 32.5 GB/s"
    assert parse("100,10").seconds(1e9, 1e9) == 0.1
    assert parse("230,32,460,920") == Limits(230e9, 32e9, bf16=460e9, int8=920e9)
    assert str(parse("230,32,460,920")) == "230 GFLOP/s, 460 in bf16, 920 in int8, 32.0 GB/s"
    for text in ("", "230", "230,32,1", "230,32,1,0", "a,b", "0,1", "1,-1", "nan,1", "inf,1"):
        with pytest.raises(InputError, match="Limits are GFLOP/s and GB/s, such as 230,32, not"):
            parse(text)
