"""The pieces of a stream add up to decoding all at once, and no piece ends within a character."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Regex, Tokenizer, decoders, models

import relax_llm.text
from relax_llm.errors import TokenizerError
from relax_llm.text import Detokenizer
from tests.text.corpus import corpus
from tests.text.models import SPECIAL

if TYPE_CHECKING:
    from collections.abc import Iterable


def stream(tokenizer: relax_llm.text.Tokenizer, ids: Iterable[int], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> relax_llm.text.Tokenizer:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, relax_llm.text.Tokenizer)
    return found


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_random_ids_add_up(
    data: st.DataObject, byte_level: relax_llm.text.Tokenizer, sentencepiece: relax_llm.text.Tokenizer
) -> None:
    """Ids at random: bytes that are no text, special tokens anywhere, ids without a token."""
    tokenizer = data.draw(st.sampled_from([byte_level, sentencepiece]))
    rare = st.integers(0, 270)  # the bytes and the special tokens
    ids = data.draw(st.lists(st.one_of(rare, st.integers(0, tokenizer.vocab_size + 3)), max_size=40))
    skip = data.draw(st.booleans())
    assert "".join(stream(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)
    at = data.draw(st.integers(0, len(ids)))
    pushed, read = (Detokenizer(tokenizer, skip_special_tokens=skip) for _ in range(2))
    assert read.read(ids[:at]) == "".join(map(pushed.push, ids[:at]))
    assert read.read(ids[at:]) + read.flush() == "".join(map(pushed.push, ids[at:])) + pushed.flush()


def test_text_comes_back_in_whole_characters(tokenizer: relax_llm.text.Tokenizer) -> None:
    for text in corpus(1500, seed=20, special=SPECIAL):
        ids = tokenizer.encode(text)
        for skip in (True, False):
            pieces = stream(tokenizer, ids, skip=skip)
            whole = tokenizer.decode(ids, skip_special_tokens=skip)
            assert "".join(pieces) == whole
            if "\ufffd" not in whole:
                assert not any("\ufffd" in piece for piece in pieces)


def test_nothing_is_held_back_once_it_is_certain(byte_level: relax_llm.text.Tokenizer) -> None:
    """After each push, what has come out is all of the text but an unfinished character."""
    ids = byte_level.encode("naïve 你好 🙂 the end 👩\u200d💻")
    detokenizer = Detokenizer(byte_level)
    text = ""
    for count, i in enumerate(ids, 1):
        text += detokenizer.push(i)
        assert byte_level.decode(ids[:count]).rstrip("\ufffd") == text


def test_bytes_that_never_become_a_character_come_out_at_once(byte_level: relax_llm.text.Tokenizer) -> None:
    def byte(value: int) -> int:
        letters = relax_llm.text.bytelevel.byte_alphabet()
        found = byte_level.token_to_id(next(letter for letter, b in letters.items() if b == value))
        assert found is not None
        return found

    detokenizer = Detokenizer(byte_level)
    assert [detokenizer.push(byte(0xFF)) for _ in range(3)] == ["\ufffd"] * 3
    assert detokenizer.push(byte(0xF0)) == ""
    assert detokenizer.push(byte(0x9F)) == ""
    assert detokenizer.push(byte(0x41)) == "\ufffdA"
    assert detokenizer.push(byte(0xE4)) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(byte(0x42)) == "B"  # a new stream


def test_sentencepiece_bytes_come_out_when_their_run_ends(sentencepiece: relax_llm.text.Tokenizer) -> None:
    def ids(*tokens: str) -> list[int]:
        return [i for token in tokens if (i := sentencepiece.token_to_id(token)) is not None]

    run = ids("<0xE4>", "<0xBD>", "<0xA0>")
    assert len(run) == 3
    after = ids("▁")
    assert stream(sentencepiece, run + after) == ["", "", "", "你 ", ""]
    assert stream(sentencepiece, run) == ["", "", "", "你"]
    assert stream(sentencepiece, run[:2] + after) == ["", "", "\ufffd\ufffd ", ""]
    assert stream(sentencepiece, run[:2]) == ["", "", "\ufffd\ufffd"]


def test_the_space_prefix_goes_once(sentencepiece: relax_llm.text.Tokenizer) -> None:
    special = sentencepiece.bos_id
    ids = sentencepiece.encode("  the fox  ", add_special_tokens=False)
    assert special is not None
    assert "".join(stream(sentencepiece, [special, *ids])) == "  the fox  "
    assert (
        "".join(stream(sentencepiece, [special, *ids, special, *ids])) == "  the fox  " + " " + "  the fox  "
    )


def test_cost_does_not_grow_with_the_text(tokenizer: relax_llm.text.Tokenizer) -> None:
    """Four times the tokens take about four times as long; a quadratic way would take sixteen times."""
    rng = random.Random(1)
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(80_000)]

    def seconds(count: int) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            stream(tokenizer, ids[:count])
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(80_000) < 9 * seconds(20_000)


def with_decoder(decoder: decoders.Decoder | None) -> relax_llm.text.Tokenizer:
    vocab = {token: i for i, token in enumerate(["▁a", "b▁", "▁", "<0xC3>", "<0xA9>", "c", " ", "▁▁d", "xx"])}
    backend = Tokenizer(models.BPE(vocab, []))
    if decoder is not None:
        backend.decoder = decoder
    return relax_llm.text.Tokenizer.build(backend, {}, {})


DECODERS = {
    "none": None,
    "metaspace": decoders.Metaspace(),
    "metaspace-never": decoders.Metaspace(prepend_scheme="never"),
    "fallback-metaspace": decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    ),
    "gemma": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "strip-two": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    "strip-each": decoders.Sequence([decoders.Strip("▁", 1, 1), decoders.Fuse()]),
    "replace-regex": decoders.Sequence([decoders.Replace(Regex("[ab]"), "z"), decoders.Fuse()]),
    "replace-late": decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " "), decoders.Fuse()]),
}


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_that_is_taken_apart_adds_up(name: str) -> None:
    tokenizer = with_decoder(DECODERS[name])
    rng = random.Random(3)
    for _ in range(300):
        ids = rng.choices(range(9), k=rng.randint(0, 6))
        # `strip-each` cannot take "▁" apart from both sides: tokenizers itself fails there.
        ids = [i for i in ids if not (name == "strip-each" and i in (2,))]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
    ],
)
def test_a_decoder_that_needs_the_whole_text_is_refused(decoder: decoders.Decoder) -> None:
    with pytest.raises(TokenizerError, match="cannot be applied piece by piece"):
        Detokenizer(with_decoder(decoder))
