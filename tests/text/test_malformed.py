"""Wrong tokenizer files: a sentence that names the file and the field, at once and in little memory."""

from __future__ import annotations

import json
import resource
import time
from typing import TYPE_CHECKING, Any

import pytest

from relax_llm.errors import TokenizerError
from relax_llm.text import Tokenizer
from tests.text.models import train_sentencepiece

if TYPE_CHECKING:
    from pathlib import Path

SIMPLE = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
}
CONFIG = "tokenizer_config.json"
VOCAB = {"vocab.json": {"a": 0, "b": 1, "ab": 2}, "merges.txt": "#version: 0.2\na b\n"}

# name: (files beside a good tokenizer.json, what the message must say); None takes a file away
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing there": ({"tokenizer.json": None}, r"holds no tokenizer: neither tokenizer\.json"),
    "empty": ({"tokenizer.json": ""}, r"tokenizer\.json: not a usable tokenizer"),
    "garbled": ({"tokenizer.json": "{]"}, r"tokenizer\.json: not a usable tokenizer"),
    "not utf-8": ({"tokenizer.json": b"\xff\xfe{}"}, r"tokenizer\.json: not UTF-8 text \(byte 0\)"),
    "a list": ({"tokenizer.json": []}, r"tokenizer\.json: not a usable tokenizer"),
    "no model": ({"tokenizer.json": {"version": "1.0"}}, r"tokenizer\.json: not a usable tokenizer"),
    "unknown model": (
        {"tokenizer.json": SIMPLE | {"model": {"type": "Magic"}}},
        r"tokenizer\.json: not a usable tokenizer",
    ),
    "merge of strangers": (
        {"tokenizer.json": SIMPLE | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "z"]]}}},
        r"tokenizer\.json: not a usable tokenizer",
    ),
    "bad pattern": (
        {
            "tokenizer.json": SIMPLE
            | {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "("},
                    "behavior": "Isolated",
                    "invert": False,
                }
            }
        },
        r"tokenizer\.json: not a usable tokenizer",
    ),
    "negative id": (
        {"tokenizer.json": SIMPLE | {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}},
        r"tokenizer\.json: not a usable tokenizer",
    ),
    "a directory": ({"tokenizer.json": Ellipsis}, r"tokenizer\.json: cannot be read: Is a directory"),
    "deep": ({"tokenizer.json": "[" * 100_000}, r"tokenizer\.json: not a usable tokenizer"),
    "config garbled": ({CONFIG: "{'a': 1}"}, r"tokenizer_config\.json: not valid JSON"),
    "config a list": ({CONFIG: [1]}, r"tokenizer_config\.json: holds a JSON list"),
    "config deep": ({CONFIG: "[" * 100_000}, r"tokenizer_config\.json: not valid JSON"),
    "role a number": (
        {CONFIG: {"eos_token": 2}},
        r"tokenizer_config\.json: eos_token must be a token's text",
    ),
    "role without text": ({CONFIG: {"eos_token": {"id": 2}}}, r"eos_token must be a token's text"),
    "role's flag": (
        {CONFIG: {"eos_token": {"content": "a", "lstrip": "no"}}},
        r"lstrip of eos_token must be true or false, not 'no'",
    ),
    "flag a text": ({CONFIG: {"add_bos_token": "yes"}}, r"add_bos_token must be true or false, not 'yes'"),
    "decoder a list": ({CONFIG: {"added_tokens_decoder": [1]}}, r"added_tokens_decoder must be an object"),
    "decoder's id": ({CONFIG: {"added_tokens_decoder": {"x": {}}}}, r"'x' is not the id of an added token"),
    "decoder's token": (
        {CONFIG: {"added_tokens_decoder": {"7": 7}}},
        r"the added token 7 must be a token's text",
    ),
    "decoder contradicts": (
        {CONFIG: {"added_tokens_decoder": {"1": {"content": "a"}}}},
        r"the added token 'a' has id 1, but the vocabulary says 0",
    ),
    "decoder beyond": (
        {CONFIG: {"added_tokens_decoder": {"9": {"content": "<x>"}}}},
        r"the added token '<x>' has id 9, but the vocabulary says 2",
    ),
    "extra tokens": (
        {CONFIG: {"additional_special_tokens": "x"}},
        r"additional_special_tokens must be a list",
    ),
    "extra token": (
        {CONFIG: {"extra_special_tokens": [3]}},
        r"additional_special_tokens\[0\] must be a token's",
    ),
    "template a number": ({CONFIG: {"chat_template": 3}}, r"tokenizer_config\.json: chat_template must be"),
    "template unnamed": ({CONFIG: {"chat_template": [{"template": "x"}]}}, r"chat_template must be"),
    "template of numbers": (
        {CONFIG: {"chat_template": [{"name": "a", "template": 1}]}},
        r"chat_template must be",
    ),
    "template list of texts": ({CONFIG: {"chat_template": ["x"]}}, r"chat_template must be"),
    "template file": ({"chat_template.jinja": b"\xff"}, r"chat_template\.jinja: not UTF-8"),
    "template json": (
        {"chat_template.json": {"chat_template": [1]}},
        r"chat_template\.json: chat_template must be",
    ),
    "stop tokens": ({CONFIG: {"stop_tokens": [1]}}, r"stop_tokens must be a list of texts"),
    "map garbled": ({"special_tokens_map.json": "x"}, r"special_tokens_map\.json: not valid JSON"),
    "added tokens": ({"added_tokens.json": {"<x>": "2"}}, r"added_tokens\.json: '2' is not the id"),
    "added tokens negative": ({"added_tokens.json": {"<x>": -1}}, r"added_tokens\.json: -1 is not the id"),
    "config.json garbled": ({"config.json": "{"}, r"config\.json: not valid JSON"),
    "vocab without merges": (
        {"tokenizer.json": None, **VOCAB, "merges.txt": None},
        r"merges\.txt: is missing",
    ),
    "vocab of texts": ({"tokenizer.json": None, **VOCAB, "vocab.json": {"a": "0"}}, r"vocab\.json: must map"),
    "vocab empty": ({"tokenizer.json": None, **VOCAB, "vocab.json": {}}, r"vocab\.json: must map"),
    "vocab huge id": (
        {"tokenizer.json": None, **VOCAB, "vocab.json": {"a": 1 << 40}},
        r"vocab\.json: must map",
    ),
    "vocab bool id": ({"tokenizer.json": None, **VOCAB, "vocab.json": {"a": True}}, r"vocab\.json: must map"),
    "merge of three": (
        {"tokenizer.json": None, **VOCAB, "merges.txt": "a b\na b c"},
        r"line 2 must be two tokens",
    ),
    "merge unknown": (
        {"tokenizer.json": None, **VOCAB, "merges.txt": "a z"},
        r"merges\.txt: does not fit vocab",
    ),
    "class unknown": (
        {"tokenizer.json": None, **VOCAB, CONFIG: {"tokenizer_class": "BertTokenizer"}},
        r"tokenizer_class 'BertTokenizer' cannot be built.*save_pretrained",
    ),
    "prefix space": (
        {"tokenizer.json": None, **VOCAB, CONFIG: {"add_prefix_space": True}},
        r"add_prefix_space cannot be built",
    ),
    "model empty": (
        {"tokenizer.json": None, "tokenizer.model": b""},
        r"tokenizer\.model: not a SentencePiece",
    ),
    "model text": (
        {"tokenizer.json": None, "tokenizer.model": b"hello"},
        r"tokenizer\.model: not a SentencePiece",
    ),
    "model length lies": (
        {"tokenizer.json": None, "tokenizer.model": b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"},
        r"tokenizer\.model: .*ends after the file",
    ),
    "model long number": (
        {"tokenizer.json": None, "tokenizer.model": b"\xff" * 40},
        r"longer than ten bytes",
    ),
    "model wrong field": (
        {"tokenizer.json": None, "tokenizer.model": b"\x08\x01"},
        r"a number where a message",
    ),
    "model twice": (
        {"tokenizer.json": None, "tokenizer.model": b"\x0a\x03\x0a\x01a" * 2 + b"\x12\x02\x18\x02"},
        r"tokenizer\.model: the vocabulary holds the token 'a' twice",
    ),
    "model unigram": (
        {"tokenizer.json": None, "tokenizer.model": b"\x0a\x03\x0a\x01a"},
        r"a SentencePiece model of the unigram kind.*save_pretrained",
    ),
}


@pytest.mark.timeout(20)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name: str, tmp_path: Path) -> None:
    files, message = FAULTS[name]
    for file, content in ({"tokenizer.json": SIMPLE} | files).items():
        path = tmp_path / file
        if content is Ellipsis:
            path.mkdir()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).endswith(".")


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="there is no such directory"):
        Tokenizer.load(tmp_path / "gone")


@pytest.mark.timeout(60)
def test_a_cut_off_model_file_is_refused_or_whole(tmp_path: Path) -> None:
    """Wherever the file ends: an error, or, at a boundary of the format, a smaller model that works."""
    proto = train_sentencepiece().proto
    refused = 0
    for end in [*range(64), *range(64, len(proto), 97)]:
        (tmp_path / "tokenizer.model").write_bytes(proto[:end])
        try:
            Tokenizer.load(tmp_path).encode("the fox")
        except TokenizerError as error:
            refused += "tokenizer.model" in str(error)
    assert refused > 100
