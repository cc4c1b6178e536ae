"""Rounds of measurement, on a clock of their own."""

from __future__ import annotations

import random

import pytest

from relax_llm.tuning.law import Law
from relax_llm.tuning.rounds import Care, contend, estimate

from .laws import Machine


def flat(seconds: float) -> Law:
    return Law(seconds, 0.0, 0.0, 0.0, 1)


def test_rivals_take_turns_and_samples_last_a_batch() -> None:
    machine = Machine({"a": flat(100e-6), "b": flat(110e-6)})
    samples = contend(["a", "b"], machine.prepare(8, True), Care(least=4), machine.clock.deadline(60))
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 4, "b": 4}
    assert [name for name, *_ in machine.launches] == ["a", "b"] * 5
    assert [count for *_, count in machine.launches] == [1, 1] + [10, 9] * 4


def test_the_hopeless_leave_the_race() -> None:
    machine = Machine({"a": flat(100e-6), "b": flat(135e-6), "c": flat(125e-6)})
    samples = contend(["a", "b", "c"], machine.prepare(1, True), Care(), machine.clock.deadline(60))
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 5, "b": 3, "c": 5}


def test_other_work_is_waited_out() -> None:
    """Two of three samples take up to nine times as long; the estimates do not show it."""
    rng = random.Random(0)
    machine = Machine(
        {"a": flat(100e-6), "b": flat(104e-6)}, slowed=lambda _: rng.choice([1, rng.uniform(1.2, 9), 3])
    )
    samples = contend(["a", "b"], machine.prepare(1, True), Care(most=40), machine.clock.deadline(60))
    assert estimate(samples["a"]) == pytest.approx(100e-6, rel=0.02)
    assert estimate(samples["b"]) == pytest.approx(104e-6, rel=0.02)
    assert len(samples["a"]) > 5


def test_one_lucky_sample_decides_nothing() -> None:
    assert estimate([5.0, 1.0, 5.1, 5.2, 9.0]) == 5.0


def test_past_the_deadline_no_more_than_the_least() -> None:
    rng = random.Random(1)
    machine = Machine({"a": flat(1e-3), "b": flat(1e-3)}, slowed=lambda _: rng.uniform(1, 9))
    samples = contend(["a", "b"], machine.prepare(1, True), Care(), machine.clock.deadline(0))
    assert {len(taken) for taken in samples.values()} == {Care().least}


def test_long_rounds_are_fewer() -> None:
    machine = Machine({"a": flat(0.2), "b": flat(0.2)})
    samples = contend(["a", "b"], machine.prepare(1, True), Care(), machine.clock.deadline(60))
    assert {len(taken) for taken in samples.values()} == {3}
