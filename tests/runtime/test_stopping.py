"""Stop strings across pieces, against a reference that looks at every beginning of the text; stop tokens."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from relax_llm.errors import InputError
from relax_llm.runtime.stopping import StopStrings, end_tokens, stop_strings

if TYPE_CHECKING:
    from collections.abc import Sequence


def reference(text: str, stops: Sequence[str]) -> tuple[str, str, str | None]:
    """By brute force: what is certain, what is held back, and the stop string that ended the text."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], "", longest
    held = max(
        (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
    )  # the longest end of the text that begins a stop string
    return text[: len(text) - held], text[len(text) - held :], None


SMALL_TEXT = st.text("abc\n", max_size=30)


@given(st.lists(st.text("abc\n", min_size=1, max_size=6), max_size=4), st.lists(SMALL_TEXT, max_size=8))
@example(["abcd", "bc"], ["abcd"])
@example(["aab"], ["aaaab"])
@example(["abab", "baba"], ["ab", "ab"])
@example(["\n\n"], ["a\n", "\n"])
@example(["aa", "aaa"], ["aaaa"])
@settings(max_examples=600, deadline=None)
def test_every_push_emits_what_is_certain_and_no_more(stops: list[str], pieces: list[str]) -> None:
    matcher = StopStrings(stops)
    emitted = text = ""
    for piece in pieces:
        emitted += matcher.push(piece)
        text += piece
        certain, _, found = reference(text, stops)
        assert emitted == certain
        assert matcher.found == found
    certain, held, found = reference(text, stops)
    assert matcher.flush() == held
    assert matcher.flush() == ""


@given(
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    st.text("ab", max_size=40),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_the_cut_into_pieces_does_not_matter(stops: list[str], text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    bounds = [0, *cuts, len(text)]

    def run(pieces: list[str]) -> tuple[str, str | None]:
        matcher = StopStrings(stops)
        return "".join([matcher.push(piece) for piece in pieces]) + matcher.flush(), matcher.found

    cut = [text[begin:end] for begin, end in itertools.pairwise(bounds)]
    assert run(cut) == run([text]) == run(list(text))


def test_the_example_everyone_has() -> None:
    matcher = StopStrings(["\n\n", "User:"])
    assert [matcher.push(piece) for piece in ["Hi", "!\n", "Us", "age\nUse", "r", ": no", "more"]] == [
        "Hi",
        "!",
        "\n",
        "Usage\n",
        "",
        "",
        "",
    ]
    assert matcher.found == "User:"
    assert matcher.flush() == ""


def test_no_stop_strings_hold_nothing_back() -> None:
    matcher = StopStrings([])
    assert matcher.push("abc") == "abc"
    assert matcher.flush() == ""


def test_long_and_repetitive_stop_strings_take_no_time() -> None:
    """A naive hold-back compares every prefix at every piece: 10^10 characters here."""
    stop = "a" * 100_000 + "b"
    matcher = StopStrings([stop])
    began = time.perf_counter()
    emitted = "".join(matcher.push("a" * 100) for _ in range(2_000))
    assert time.perf_counter() - began < 2
    assert emitted == "a" * 100_000
    assert matcher.push("b") == ""
    assert matcher.found == stop


@pytest.mark.parametrize("wrong", ["", 3, None])
def test_empty_stop_strings_are_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="each must be a string that is not empty"):
        StopStrings(["ok", wrong])


def test_stop_strings_come_from_the_caller_or_the_config() -> None:
    config = {"stop_strings": ["x", "y"]}
    assert stop_strings(None, config) == ("x", "y")
    assert stop_strings(None, {"stop_strings": "xy"}) == ("xy",)
    assert (
        stop_strings(None, {}) == stop_strings(None, {"stop_strings": None}) == stop_strings([], config) == ()
    )
    assert stop_strings("ab", config) == ("ab",)
    assert stop_strings(iter(["a", "b"]), config) == ("a", "b")
    with pytest.raises(InputError, match="stop is 5; it must be a string or a list"):
        stop_strings(5, config)  # type: ignore[arg-type]


def test_end_tokens_come_from_the_caller_the_config_or_the_tokenizer() -> None:
    config = {"eos_token_id": [2, 7]}
    assert end_tokens(None, config, [5], 100) == {2, 7}
    assert end_tokens(None, {"eos_token_id": 2}, [5], 100) == {2}
    assert end_tokens(None, {}, frozenset({5, 6}), 100) == {5, 6}
    assert end_tokens(None, {"eos_token_id": None}, (), 100) == frozenset()
    assert end_tokens([], config, [5], 100) == frozenset()
    assert end_tokens(9, config, [5], 100) == {9}
    assert end_tokens(np.array([9, 10]), config, [5], 100) == {9, 10}
    assert end_tokens(None, {"eos_token_id": [2, 50256]}, (), 100) == {2}, "it can never be chosen"


@pytest.mark.parametrize(
    ("asked", "config", "sentence"),
    [
        ([3, 100], {}, "stop_tokens contains 100; token ids go from 0 to 99"),
        (-1, {}, "stop_tokens contains -1"),
        (["a"], {}, "stop_tokens is .'a'.; it must be a token id"),
        (1.5, {}, "stop_tokens is 1.5"),
        (True, {}, "stop_tokens is True"),
        (None, {"eos_token_id": "</s>"}, "generation config, eos_token_id is '</s>'"),
        (None, {"eos_token_id": [1, None]}, "generation config, eos_token_id is "),
    ],
)
def test_wrong_stop_tokens_are_refused(asked: Any, config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        end_tokens(asked, config, (), 100)
