"""The benchmark of whole models: who takes turns, what is made for them, and what is said of it."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest

import relax_llm as rl
from benchmarks.chart import chart
from benchmarks.limits import Limits, LimitsProgram
from benchmarks.llm import Table, seats_of
from benchmarks.models import Forms, gguf_letter, write_gguf, write_huggingface
from benchmarks.peers import ENGINES, OURS
from benchmarks.report import Figures, Report, to_json
from benchmarks.turns import DECODED, Case, Seat, Unavailable, Worker
from relax_llm.tracing.least import least_seconds

from . import engines

if TYPE_CHECKING:
    from relax_llm.artifact.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
UNLIMITED = float("inf")


@pytest.fixture(scope="module")
def manifest(smollm2_path: Path) -> Manifest:
    return rl.compile(smollm2_path).manifest


@pytest.mark.model
def test_the_least_time_of_a_prompt_is_that_of_its_multiplications(manifest: Manifest) -> None:
    """Layers see every token, what follows the last one's keys and the head one; norms add little to 1024 tokens."""
    keys, others = 576 * 960, 576 * 576 + 3 * 576 * 1536
    flops = 2 * (1024 * (30 * keys + 29 * others) + others + 576 * 49152)
    attention = 4 * 576 * (29 * 1024 * 1025 / 2 + 1024)
    seconds = least_seconds(
        manifest, "prefill", Case("prefill", 1024).sizes(), Limits(flops=1.0, bytes=UNLIMITED)
    )
    assert flops + attention < seconds < 1.01 * (flops + attention)


@pytest.mark.model
def test_the_least_time_of_a_token_is_that_of_its_weights(manifest: Manifest) -> None:
    parameters = 134_515_008
    cache = 30 * 2 * 192 * (33 + DECODED // 2)
    seconds = least_seconds(
        manifest, "decode", Case("decode", 32).sizes(), Limits(flops=UNLIMITED, bytes=1.0)
    )
    assert 4 * (parameters + cache) < seconds < 4.08 * (parameters + cache)


def test_limits_are_those_of_a_computer() -> None:
    with LimitsProgram(threads=1) as program:
        found = program.measure(memory=1 << 24)
    assert 1e9 < found.flops < 1e12
    assert 1e8 < found.bytes < 1e13
    for rate in (found.bf16, found.int8, found.bf16_tiles, found.int8_tiles):
        assert rate == 0 or 1e9 < rate < 1e14


def test_limits_of_nothing() -> None:
    with LimitsProgram(threads=1) as program:
        for memory in (0, 1 << 24, 0):
            if memory:
                assert program.measure(memory).bytes > 0
            else:
                with pytest.raises(SystemExit, match="exit code 1"):
                    program.measure(memory)


def test_cases_are_named_as_llama_bench_does() -> None:
    assert Case.parse("pp64") == Case("prefill", 64)
    assert Case.parse("tg1024") == Case("decode", 1024)
    assert str(Case.parse("tg32")) == "tg32"
    for text in ("pp", "pp0", "64", "xx64", "pp-4", "pp1.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="such as pp64"):
            Case.parse(text)
    seconds = [2.0, 9.0, *[0.25] * DECODED]
    assert Case.parse("pp64").rate(seconds) == 32
    assert Case.parse("tg64").rate(seconds) == 4


@pytest.fixture
def forms(tmp_path: Path) -> Forms:
    """A GGUF file with a vector, and a matrix of numbers that are 4-bit blocks already."""
    path = tmp_path / "model.gguf"
    blocks = np.random.default_rng(0).integers(0, 256, (64, 2 * 18), np.uint8)
    blocks[:, [0, 1, 18, 19]] = np.frombuffer(np.float16(0.125).tobytes() * 2, np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü"])
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tensor("matrix.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("norm.weight", np.linspace(-1, 1, 64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Forms(path, tmp_path / "forms")


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("F32", 0), ("F16", 0), ("BF16", 0), ("Q4_0", 0), ("Q8_0", 0.005), ("Q4_1", 0.07)]
)
def test_a_gguf_file_in_another_type(forms: Forms, kind: str, tolerance: float) -> None:
    """-8 to 7 eighths are numbers that every float has; Q4_0's own blocks stay as they are."""
    path = forms.gguf(kind)
    assert forms.gguf(kind) == path
    source, written = gguf.GGUFReader(forms.source), gguf.GGUFReader(path)
    matrix, norm = written.tensors
    assert matrix.tensor_type.name == kind
    assert norm.tensor_type.name == "F32"
    values, expected = (
        gguf.quants.dequantize(reader.tensors[0].data, reader.tensors[0].tensor_type)
        for reader in (written, source)
    )
    assert values.shape == expected.shape == (64, 64)
    np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance)
    if kind == "Q4_0":
        np.testing.assert_array_equal(matrix.data, source.tensors[0].data)
    assert written.fields["tokenizer.ggml.tokens"].contents() == ["a", "ü"]
    assert written.fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert written.fields["general.name"].contents() == "tiny"
    assert (
        written.fields["general.file_type"].contents()
        == gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]
    )


@pytest.mark.model
def test_a_hugging_face_directory_has_the_same_tensors(smollm2_path: Path, tmp_path: Path) -> None:
    write_huggingface(smollm2_path, tmp_path / "made", "float32")
    source, made = rl.open_checkpoint(smollm2_path), rl.open_checkpoint(tmp_path / "made")
    assert {name: t.shape for name, t in made.tensors.items()} == {
        n: t.shape for n, t in source.tensors.items()
    }
    for name in ("model.layers.3.self_attn.q_proj.weight", "model.norm.weight"):
        np.testing.assert_array_equal(made.tensors[name].read(), source.tensors[name].read())
    text = "Naïve   text,\n1 2 3"
    assert made.load_tokenizer().encode(text) == source.load_tokenizer().encode(text)


def test_what_is_not_made_whole_is_not_there(forms: Forms) -> None:
    def fails(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forms.made("thing", fails)
    assert list(forms.folder.iterdir()) == []
    with pytest.raises(KeyError):
        write_gguf(forms.source, forms.folder / "other.gguf", "Q9_9")


def test_letters_of_bytes() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(map(gguf_letter, range(256))) == sorted(ByteLevel.alphabet())
    assert gguf_letter(ord(" ")) == "Ġ"
    assert gguf_letter(ord("\n")) == "Ċ"


def seat(variant: str) -> Seat:
    return Seat(engines.__name__, f"Fake {variant}", variant)


def test_a_worker_answers_and_is_measured(forms: Forms) -> None:
    with Worker(seat("counts"), forms, 3, patience=20) as worker:
        assert worker.load_seconds < 1
        for length, count in ((1, 1), (4, 3)):
            tokens, seconds = worker.answer(range(length), count)
            assert tokens == list(range(length - 1, length - 1 + count))
            assert seconds[0] >= engines.TOKEN * (length + 1)
            assert all(later >= engines.TOKEN for later in seconds[1:])
        assert 1e6 < worker.peak_bytes() < 1e10
        assert 0 <= worker.others <= 1
    log = forms.folder / "logs" / "Fake-counts.txt"
    assert "loaded counts 3 3" in log.read_text()


@pytest.mark.parametrize(
    ("variant", "why"),
    [
        ("dies", "its process ended with exit code 7"),
        ("sleeps", "it took more than 1 s"),
        ("short", "Unavailable: it gave 2 tokens where 3 were asked for"),
    ],
)
def test_a_worker_that_fails_says_why_and_ends(forms: Forms, variant: str, why: str) -> None:
    with Worker(seat(variant), forms, 1, patience=1) as worker:
        with pytest.raises(Unavailable, match=why):
            worker.answer([1, 2], 3)
        assert not worker._process.is_alive()


def test_limits_are_measured_around_our_turns(forms: Forms) -> None:
    """Around those of the first of ours, for each prompt once, and not in the round that warms up."""
    measured = itertools.count()
    names = ("relax_llm fake", "relax_llm other", "Fake")
    with ExitStack() as stack:
        table = Table([PP, TG, Case("decode", 16)], 20, {}, lambda: Limits(next(measured), 1))
        for name in names:
            place = Seat(engines.__name__, name, "counts")
            table.add(stack.enter_context(Worker(place, forms, 1, patience=20)))
        for recorded in (False, True, True):
            for length in (16, 32):
                table.turn(list(range(length)), recorded=recorded)
    assert table.ours == list(names[:2])
    found = {
        case: [[int(each.flops) for each in pair] for pair in pairs] for case, pairs in table.limits.items()
    }
    assert found == {PP: [[0, 1], [4, 5]], Case("decode", 16): [[0, 1], [4, 5]], TG: [[2, 3], [6, 7]]}
    assert all(len(rates) == 2 for name in names for rates in table.figures[name].rates.values())


def test_a_model_that_cannot_be_prepared(forms: Forms) -> None:
    with pytest.raises(Unavailable, match=r"^ValueError: no such model$"):
        Worker(seat("unprepared"), forms, 1, patience=1)
    assert "and more about it" in (forms.folder / "logs" / "Fake-unprepared.txt").read_text()


def test_everybody_has_a_place_or_a_reason() -> None:
    names = [engine.NAME for engine in ENGINES]
    for weights in OURS.VARIANTS:
        seats, missing = seats_of(names, weights)
        assert seats[0].name.startswith(OURS.NAME)
        placed = {name for name in names if any(s.name.startswith(f"{name} ") for s in seats)}
        assert placed | set(missing) == set(names)
        assert not placed & set(missing)
    assert seats_of(["CTranslate2"], "q4") == ([], {"CTranslate2": "has no q4 on a CPU"})


PP, TG = Case("prefill", 16), Case("decode", 32)


@pytest.fixture
def report() -> Report:
    """Three rounds, the second of which is a slow one for all."""

    def figures(prefill: list[float | None], decode: list[float | None]) -> Figures:
        return Figures(0.5, {PP: prefill, TG: decode}, 123_456_789, 0.034, "one\ntwo")

    return Report(
        "tiny on nothing",
        "q8",
        [PP, TG],
        [
            Limits(1e9, 2e9, int8=3e9, apart=8e-8),
            Limits(5e8, 1e9, int8=1e9, apart=4e-7),
            Limits(1e9, 2e9, int8=3e9, apart=9e-8),
        ],
        {PP: [0.001, 0.002, 0.001], TG: [0.01, 0.02, 0.01]},
        {
            "relax_llm 1.0 q8": figures([300, 90, 330], [50, 25, 50]),
            "Other 2.0 Q8_0": figures([200, 100, 220], [40, 40, 20]),
            "Other 2.0 int8": figures([250, 30, 270], [10, 10, 10]),
            "Third 3 x": figures([999, None, 999], [5, 5, 5]),
        },
        ["relax_llm 1.0 q8"],
        {"Third 3 x": "pp16: it stopped"},
    )


def test_ratios_are_medians_within_rounds(report: Report) -> None:
    assert report.figures["relax_llm 1.0 q8"].rate(PP) == 300
    assert report.best == {PP: "Other 2.0 int8", TG: "Other 2.0 Q8_0"}
    assert report.ratio(PP) == pytest.approx(330 / 270)
    assert report.ratio(TG) == pytest.approx(50 / 40)
    assert report.ratio(PP, "Other 2.0 Q8_0") == pytest.approx(1.5)
    assert report.ratio(PP, "Third 3 x") is None
    assert report.prefill == report.ratio(PP)
    assert report.of_limit(PP) == pytest.approx(0.3)
    assert report.of_limit(TG) == pytest.approx(0.5)


def test_the_table_says_it_all(report: Report) -> None:
    lines = report.text().split("\n")
    assert lines[1] == "limits: f32 1 GFLOP/s, int8 3; 2.0 GB/s read; 80 to 400 ns from core to core and back"
    assert lines[3].split() == ["q8", "pp16", "tg32", "load", "s", "peak", "MB", "others"]
    rows = {line.split("  ")[0]: line.split()[-5:] for line in lines[4:8]}
    assert rows["relax_llm 1.0 q8"] == ["300.0", "50.0", "0.50", "123", "3%"]
    assert rows["Third 3 x"] == ["-", "5.0", "0.50", "123", "3%"]
    assert "relax_llm 1.0 q8 : best peer  1.22x  1.25x" in report.text()
    assert "  Third 3 x: pp16: it stopped" in lines
    assert "  Other 2.0 int8: 'one\\ntwo'" in lines
    assert len({len(line) for line in lines[3:8]}) == 1


def test_nobody_to_compare_with(report: Report) -> None:
    name = report.ours[0]
    alone = Report(
        "alone", "f32", [PP], report.limits, report.least, {name: report.figures[name]}, [name], {}
    )
    assert alone.ratio(PP) is None
    assert f"{name} : best peer      -" in alone.text()
    without = Report("none", "f32", [PP], report.limits, report.least, {}, [], {"relax_llm": "is broken"})
    assert "relax_llm: is broken" in without.text()
    assert json.loads(to_json([without]))[0]["ratio"] == {"pp16": None}
    assert len(list(ElementTree.fromstring(chart([alone])).iter("{http://www.w3.org/2000/svg}circle"))) == 1


def test_json_has_every_round(report: Report) -> None:
    (data,) = json.loads(to_json([report]))
    assert data["engines"]["Other 2.0 int8"]["rounds"]["pp16"] == [250, 30, 270]
    assert data["engines"]["Third 3 x"]["tokens_per_second"] == {"pp16": None, "tg32": 5}
    assert data["best_peer"] == {"pp16": "Other 2.0 int8", "tg32": "Other 2.0 Q8_0"}
    assert data["limits"][1]["int8"] == 1e9


def test_the_chart_has_a_dot_for_each_engine_and_case(report: Report) -> None:
    root = ElementTree.fromstring(chart([report]))
    space = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.iter(f"{space}text")]
    for expected in ("relax_llm", "Other", "Third", "q8", "pp16", "tg32"):
        assert expected in texts
    legend, dots = 3, 2 * 2 + 1  # Third has one case, and Other's better variant stands for it
    assert len(list(root.iter(f"{space}circle"))) == legend + dots


@pytest.mark.slow
@pytest.mark.model
def test_it_runs(smollm2_path: Path, tmp_path: Path) -> None:
    """With this project alone, by its name; the others may not be there."""
    asked = ["--engines", "relax_llm", "CTranslate2", "--cases", "pp16", "tg16", "--rounds", "2"]
    written = ["--json", str(tmp_path / "r.json"), "--chart", str(tmp_path / "c.svg")]
    command = [sys.executable, "-m", "benchmarks.llm", str(smollm2_path), *asked, *written]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    (report,) = json.loads((tmp_path / "r.json").read_text())
    (ours,) = report["ours"]
    figures: dict[str, Any] = report["engines"][ours]
    assert [len(rounds) for rounds in figures["rounds"].values()] == [2, 2]
    assert all(rate > 0 for rate in figures["tokens_per_second"].values())
    assert 0 < figures["load_seconds"] < 30
    assert 1e8 < figures["peak_bytes"] < 4e9
    assert "red" in figures["says"]
    assert ours in done.stdout
    ElementTree.parse(tmp_path / "c.svg")
