"""`relax-llm bench` measures prompts and decoding, beside what the machine can do."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

import relax_llm as rl
from relax_llm.errors import ContextLengthError, InputError
from relax_llm.runtime import speed
from relax_llm.tracing.least import least_seconds
from relax_llm.tracing.limits import Limits

from .conftest import CONTEXT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Outcome

GIVEN = ["--limits", "100,10"]


def test_a_row_for_each_length(call: Callable[..., Outcome], artifact: Path) -> None:
    done = call("bench", artifact, "--lengths", "3, 17", "-n", 2, "--rounds", 2, *GIVEN)
    assert done.code == 0
    headline, table = done.out.strip().split("\n\n")
    assert headline == (
        "Medians of 2 rounds, in tokens a second. This machine can do 100 GFLOP/s, 10.0 GB/s."
    )
    header, *rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    assert header == ["prompt", "ms", "tokens/s", "of limit", "decode ms", "tokens/s", "of limit"]
    assert [row[0] for row in rows] == ["3", "17"]
    for length, ms, rate, _, decode_ms, decode_rate, _ in rows:
        # Times are written in hundredths of a millisecond, a tiny model's token takes a few.
        assert float(ms) == pytest.approx(1e3 * int(length) / float(rate), rel=0.01, abs=0.006)
        assert float(decode_ms) == pytest.approx(1e3 / float(decode_rate), rel=0.01, abs=0.006)


def test_as_json(call: Callable[..., Outcome], artifact: Path) -> None:
    found = call("bench", artifact, "--lengths", "5", "-n", 0, "--rounds", 3, "--json", *GIVEN).json
    assert found["limits"] == {"flops": 100e9, "bytes": 10e9, "bf16": 0, "int8": 0, "loop": 0}
    assert found["rounds"] == []
    (row,) = found["lengths"]
    assert (row["length"], len(row["prefill"]), row["decode"]) == (5, 3, [])
    sizes = {"batch": 1, "seq": 5, "kv_len": 5}
    manifest = rl.load(artifact).manifest
    assert row["least_prefill"] == least_seconds(manifest, "prefill", sizes, Limits(100e9, 10e9))


def test_models_take_turns(call: Callable[..., Outcome], artifact: Path) -> None:
    options = ("--beside", artifact, "--lengths", "3,5", "-n", 1, "--rounds", 3, *GIVEN)
    done = call("bench", artifact, *options)
    assert done.code == 0
    headline, first, second, ratios = done.out.strip().split("\n\n")
    assert headline.startswith("Medians of 3 rounds")
    for text in (first, second):
        assert text.splitlines()[0] == str(artifact)
        assert [line.split()[0] for line in text.splitlines()[2:]] == ["3", "5"]
    said, header, *rows = ratios.splitlines()
    assert said == f"{artifact}, times as fast as {artifact}, the median of the rounds"
    assert header.split() == ["prompt", "prefill", "decode"]
    found = call("bench", artifact, *options, "--json").json
    (other,) = found["beside"]
    assert [row["length"] for row in other["lengths"]] == [3, 5]
    assert all(re.fullmatch(r"\s*[35]( +\d+\.\d{3}x){2}", row) for row in rows)


def test_ratios_are_those_within_rounds() -> None:
    limits = Limits(1e9, 1e9)
    one = speed.Speeds.of([speed.Speed(4, (1.0, 2.0, 9.0), (), 0.0, 0.0)], limits)
    other = speed.Speeds.of([speed.Speed(4, (0.5, 4.0, 3.0), (), 0.0, 0.0)], limits)
    assert other.beside(one).rows == [("4", "2.000x", "")]
    assert other.beside(one, (1,)).rows == [("4", "0.500x", "")]


def test_rounds_are_told_apart_by_where_cores_were(
    call: Callable[..., Outcome], artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = iter([1.0e-6, 0.5e-6, 0.6e-6, 1.1e-6])
    monkeypatch.setattr(rl.Runner, "limits", lambda _, anew: Limits(1e11, 1e10, loop=next(loops)))
    done = call("bench", artifact, "--beside", artifact, "--lengths", "3", "-n", 0, "--rounds", 4)
    assert done.code == 0
    *_, near, far = done.out.strip().split("\n\n")
    assert near.splitlines()[0] == "In the 2 rounds in which a loop over all threads cost 0.55 us"
    assert far.splitlines()[0] == "In the 2 rounds in which a loop over all threads cost 1.05 us"


@pytest.mark.parametrize(
    ("loops", "places"),
    [
        ([], [()]),
        ([0.0, 0.0], [(0, 1)]),
        ([5e-7, 6e-7, 7e-7], [(0, 1, 2)]),
        ([1e-6, 5e-7, 2e-6, 6e-7], [(0, 1, 3), (2,)]),
        ([1e-6, 5e-7, 1.1e-6, 6e-7], [(1, 3), (0, 2)]),
    ],
)
def test_places(loops: list[float], places: list[tuple[int, ...]]) -> None:
    rounds = [Limits(1e9, 1e9, loop=loop) for loop in loops]
    assert speed.Speeds.of([], Limits(1e9, 1e9), rounds).places == places


def test_in_python(artifact: Path) -> None:
    runner = rl.Runner(rl.load(artifact))
    found = speed.measure(runner, [2], decodes=3, rounds=1, limits=Limits(1e9, 1e9))
    assert str(found).startswith(
        "Measured once, in tokens a second. This machine can do 1 GFLOP/s, 1.0 GB/s."
    )
    assert "<table>" in found._repr_html_()
    assert found[0].prefill_rate == 2 / found[0].prefill[0]
    for lengths, decodes, rounds in (([], 1, 1), ([0], 1, 1), ([1], -1, 1), ([1], 1, 0)):
        with pytest.raises(InputError):
            speed.measure(runner, lengths, decodes=decodes, rounds=rounds)
    with pytest.raises(ContextLengthError, match="do not fit into a context of"):
        speed.measure(runner, [CONTEXT], decodes=1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lengths", "16,x"], "--lengths is '16,x'; it must be numbers of tokens, such as 16,64."),
        (["--lengths", "0"], "--lengths is '0'"),
        (["--rounds", "0"], "Lengths and rounds must be 1 or above"),
        (["--lengths", f"{CONTEXT}"], "do not fit into a context"),
        (["--limits", "fast"], "Limits are GFLOP/s and GB/s"),
    ],
)
def test_mistakes(call: Callable[..., Outcome], artifact: Path, arguments: list[str], said: str) -> None:
    done = call("bench", artifact, *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
