"""Distributions of sizes: what users may say, and what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from relax_llm.errors import InputError
from relax_llm.tuning.distribution import LARGEST, default, distribution

if TYPE_CHECKING:
    from pathlib import Path


def test_half_of_the_default_is_decoding() -> None:
    weights = default().weights
    assert weights[1] == 0.5
    assert sum(weights.values()) == pytest.approx(1)
    assert sum(weights[m] for m in range(2, 64)) == pytest.approx(
        sum(weights[m] for m in range(64, 2048)), rel=0.02
    )
    assert distribution(None) == default()


def test_the_same_histogram_in_three_forms(tmp_path: Path) -> None:
    file = tmp_path / "sizes.json"
    file.write_text('{"1": 900, "64": 100}')
    forms: list[Any] = ["1:0.9,64:0.1", {1: 9, 64: 1}, file, str(file)]
    for given in forms:
        found = distribution(given)
        assert found.of == "launches"
        assert found.weights == pytest.approx({1: 0.9, 64: 0.1})
        assert found.text == "of the launches 0.9 at M=1, 0.1 at M=64"


def test_a_file_may_have_a_colon_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1:2").write_text('{"5": 1}')
    assert distribution("1:2").weights == {5: 1.0}


def test_sizes_are_each_once_ascending_and_end_beyond_all() -> None:
    sizes = distribution({1: 1, 10_000: 1}).sizes()
    assert list(sizes[:LARGEST]) == list(range(1, LARGEST + 1))
    assert list(sizes[LARGEST:]) == [10_000, 20_000]
    assert list(default().sizes()[LARGEST:]) == [2 * LARGEST]


def test_launches_weigh_by_what_they_take_and_time_does_not() -> None:
    best = np.where(default().sizes() < 64, 1e-5, 1e-3)
    counted = distribution({1: 0.5, 64: 0.5})
    sizes = counted.sizes()
    share = counted.over(sizes, best) * best
    assert share.sum() == pytest.approx(1)
    assert share[63] / share[0] == pytest.approx(100, rel=0.1)
    timed = default().over(sizes, best) * best
    assert timed.sum() == pytest.approx(1)
    assert timed[0] == pytest.approx(0.5, rel=0.02)


def test_no_size_is_without_weight() -> None:
    found = distribution("1:1")
    sizes = found.sizes()
    assert (found.over(sizes, np.ones(len(sizes))) > 0).all()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("1:0.5,64", "'64', which is not M:WEIGHT"),
        ("0:1", "the size '0'"),
        ("-3:1", "the size '-3'"),
        ("1.5:1", "the size '1.5'"),
        ("1:x", "gives M=1 the weight 'x'"),
        ("1:-1", "gives M=1 the weight '-1'"),
        ("1:nan", "weights are numbers"),
        ("1:inf", "weights are numbers"),
        ("1:1,1:2", "M=1 twice"),
        ("1:0", "no weight above 0"),
        ("99999999999:1", "from 1 to 16777216"),
        ({}, "no weight above 0"),
        ({1: None}, "gives M=1 the weight None"),
        ({1: True}, "gives M=1 the weight True"),
        ("nowhere.json", "cannot be read: No such file"),
    ],
)
def test_refused(given: Any, sentence: str) -> None:
    with pytest.raises(InputError) as refusal:
        distribution(given)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "is not JSON"), ("[1, 2]", "must be a JSON object"), ('{"a": 1}', "the size 'a'")],
)
def test_refused_files(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "sizes.json"
    file.write_text(text)
    with pytest.raises(InputError) as refusal:
        distribution(file)
    assert sentence in str(refusal.value)
    assert str(file) in str(refusal.value)


def test_a_large_file_is_summed_up(tmp_path: Path) -> None:
    file = tmp_path / "sizes.json"
    file.write_text(json.dumps(dict.fromkeys(range(1, 11), 1)))
    assert distribution(file).text.endswith("0.1 at M=6, and 4 more sizes")
