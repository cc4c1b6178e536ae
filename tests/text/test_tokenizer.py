"""Tokenizer directories in every form people have them, against transformers reading the same directory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import transformers

from relax_llm.errors import InputError, TokenizerError
from relax_llm.text import Tokenizer
from tests.text.corpus import corpus
from tests.text.models import SPECIAL, USER_DEFINED, train_sentencepiece

if TYPE_CHECKING:
    from pathlib import Path

STRINGS = corpus(2000, seed=30, special=SPECIAL + USER_DEFINED)
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
}


def write(directory: Path, tokenizer_json: str | None, **files: Any) -> Path:
    """Writes a directory; a keyword is a file's name, with ``__`` for the dot, and its value JSON or text."""
    if tokenizer_json is not None:
        (directory / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (directory / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return directory


def reference(directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory)


def assert_same(directory: Path, *, strings: list[str] = STRINGS) -> Tokenizer:
    ours, theirs = Tokenizer.load(directory), reference(directory)
    for text in strings:
        assert ours.encode(text) == theirs.encode(text)
    for text in strings[::10]:
        ids = ours.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_id == theirs.eos_token_id
    assert ours.pad_id == theirs.pad_token_id
    assert ours.unk_id == theirs.unk_token_id
    assert ours.special_ids >= set(theirs.all_special_ids)
    assert ours.vocab_size == len(theirs)
    return ours


def test_tokenizer_json_and_config(byte_level_json: str, tmp_path: Path) -> None:
    """The truncation in the file, which training leaves there, is not applied, as in transformers."""
    assert_same(write(tmp_path, byte_level_json, tokenizer_config__json=CONFIG))


def test_tokens_as_objects(byte_level_json: str, tmp_path: Path) -> None:
    flags = {"lstrip": False, "rstrip": True, "single_word": False, "normalized": False}
    token = {"__type": "AddedToken", "content": "<|im_end|>", **flags}
    config = CONFIG | {"eos_token": token, "pad_token": token | {"content": "<|pad|>"}, "unk_token": None}
    ours = assert_same(write(tmp_path, byte_level_json, tokenizer_config__json=config))
    assert ours.pad_id == ours.vocab_size - 1
    assert ours.special_tokens["eos_token"] == "<|im_end|>"


def test_special_tokens_map(byte_level_json: str, tmp_path: Path) -> None:
    roles = {"eos_token": {"content": "<|endoftext|>"}, "pad_token": "<|endoftext|>"}
    extra = {"additional_special_tokens": ["<|im_start|>", "<|new|>"]}
    ours = assert_same(
        write(
            tmp_path, byte_level_json, tokenizer_config__json=CONFIG, special_tokens_map__json=roles | extra
        )
    )
    assert (ours.eos_id, ours.pad_id) == (0, 0)
    assert ours.encode("<|new|>") == [ours.vocab_size - 1]


def test_added_tokens_outside_tokenizer_json(byte_level_json: str, tmp_path: Path) -> None:
    size = Tokenizer.load(write(tmp_path, byte_level_json)).vocab_size
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    decoder = {
        str(size + 1): {"content": "<|b|>", "special": True, **flags},
        str(size): {"content": "<|a|>", "special": False, **flags},
    }
    config = CONFIG | {"added_tokens_decoder": decoder}
    strings = [*STRINGS[::4], "x<|a|>y<|b|>z"]
    ours = assert_same(write(tmp_path, byte_level_json, tokenizer_config__json=config), strings=strings)
    assert ours.encode("<|a|><|b|>") == [size, size + 1]
    assert size + 1 in ours.special_ids
    assert size not in ours.special_ids


def test_the_post_processor_of_tokenizer_json_counts(byte_level_json: str, tmp_path: Path) -> None:
    """As in transformers 5, flags of tokenizer_config.json count only where tokenizer.json says nothing."""
    document = json.loads(byte_level_json)
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    config = CONFIG | {"add_bos_token": False, "add_eos_token": True}
    ours = assert_same(
        write(tmp_path, json.dumps(document), tokenizer_config__json=config), strings=STRINGS[:300]
    )
    assert ours.encode("x")[0] == 1
    assert ours.encode("x")[-1] != 2


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_flags_where_nothing_else_says(byte_level_json: str, bos: bool, eos: bool, tmp_path: Path) -> None:
    config = CONFIG | {"add_bos_token": bos, "add_eos_token": eos}
    ours = Tokenizer.load(write(tmp_path, byte_level_json, tokenizer_config__json=config))
    inner = ours.encode("the fox", add_special_tokens=False)
    assert ours.encode("the fox") == [1] * bos + inner + [2] * eos
    assert ours.encode("") == [1] * bos + [2] * eos


def test_vocab_and_merges(byte_level_json: str, tmp_path: Path) -> None:
    model = json.loads(byte_level_json)["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]) + "\n"
    directory = write(tmp_path, None, vocab__json=model["vocab"], merges__txt=merges)
    ours = assert_same(
        write(directory, None, tokenizer_config__json={"tokenizer_class": "GPT2Tokenizer"}),
        strings=[s for s in STRINGS if not any(t in s for t in ("<|im_", *USER_DEFINED))],
    )
    assert ours.eos_id == ours.bos_id == 0
    qwen = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(qwen | {"bos_token": None, "unk_token": None}))
    ours, theirs = Tokenizer.load(directory), reference(directory)
    assert type(theirs).__name__ == "Qwen2Tokenizer"
    for text in STRINGS:
        assert ours.encode(text) == theirs.encode(text)
    assert (ours.bos_id, ours.unk_id) == (None, None)


def test_roles_from_config_json(byte_level_json: str, tmp_path: Path) -> None:
    """GPT-2's own directory names roles in config.json alone, by id; a role that is null stays absent."""
    model = {"model_type": "gpt2", "bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 10**12}
    ours = Tokenizer.load(write(tmp_path, byte_level_json, config__json=model))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, None)
    ours = Tokenizer.load(write(tmp_path, byte_level_json, tokenizer_config__json={"bos_token": None}))
    assert (ours.bos_id, ours.eos_id) == (None, 2)


@pytest.mark.parametrize(
    "options", [{}, {"add_dummy_prefix": False, "pad_id": 3}, {"remove_extra_whitespaces": True}]
)
def test_sentencepiece_model_file(options: dict[str, Any], tmp_path: Path) -> None:
    model = train_sentencepiece(**options)
    model.write(tmp_path)
    ours = Tokenizer.load(tmp_path)
    special = [piece for piece, kind in zip(model.pieces, model.types, strict=True) if kind in (2, 3)] + ["▁"]
    strings = [s for s in corpus(2400, seed=31) if not any(t in s for t in special)]
    assert len(strings) > 2000
    for text in strings:
        assert ours.encode(text, add_special_tokens=False) == model.processor.encode(text)
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (1, 2, 0)
    assert ours.pad_id == options.get("pad_id")
    assert ours.encode("x")[0] == 1
    assert ours.encode("x<|im_end|>")[-1] == ours.token_to_id("<|im_end|>")


TEMPLATES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "none": ({}, {}),
    "text": ({"tokenizer_config__json": {"chat_template": "A"}}, {"default": "A"}),
    "list": (
        {
            "tokenizer_config__json": {
                "chat_template": [{"name": "default", "template": "A"}, {"name": "rag", "template": "B"}]
            }
        },
        {"default": "A", "rag": "B"},
    ),
    "no default": (
        {"tokenizer_config__json": {"chat_template": [{"name": "rag", "template": "B"}]}},
        {"rag": "B"},
    ),
    "file first": (
        {"tokenizer_config__json": {"chat_template": "A"}, "chat_template__jinja": "é\r\n\n"},
        {"default": "é\r\n\n"},
    ),
    "json": ({"chat_template__json": {"chat_template": "J"}}, {"default": "J"}),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(name: str, byte_level_json: str, tmp_path: Path) -> None:
    files, expected = TEMPLATES[name]
    files = {key: value for key, value in files.items() if not key.endswith("jinja")}
    write(tmp_path, byte_level_json, **files)
    if name == "file first":
        (tmp_path / "chat_template.jinja").write_bytes("é\r\n\n".encode())
    ours = Tokenizer.load(tmp_path)
    assert dict(ours.chat_templates) == expected
    assert ours.chat_template == expected.get("default")
    ours.save(tmp_path / "saved")
    assert dict(Tokenizer.load(tmp_path / "saved").chat_templates) == expected


def test_further_template_files(byte_level_json: str, tmp_path: Path) -> None:
    write(tmp_path, byte_level_json, chat_template__jinja="A")
    (tmp_path / "additional_chat_templates").mkdir()
    write(tmp_path / "additional_chat_templates", None, rag__jinja="B")
    assert dict(Tokenizer.load(tmp_path).chat_templates) == {"default": "A", "rag": "B"}
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.chat_template == {"default": "A", "rag": "B"}


def test_saving_keeps_everything(byte_level: Tokenizer, sentencepiece: Tokenizer, tmp_path: Path) -> None:
    templates = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    for i, tokenizer in enumerate((byte_level, sentencepiece)):
        made = Tokenizer.build(tokenizer.backend, tokenizer.special_tokens, templates, ["<|im_start|>"])
        made.save(tmp_path / str(i))
        made.save(tmp_path / str(i))  # over itself
        again = Tokenizer.load(tmp_path / str(i))
        assert again.backend.to_str() == made.backend.to_str()
        assert dict(again.special_tokens) == dict(made.special_tokens)
        assert again.stop_ids == made.stop_ids != frozenset()
        assert dict(again.chat_templates) == templates
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / str(i))
        for text in STRINGS[::5]:
            assert again.encode(text) == made.encode(text) == theirs.encode(text)
        assert theirs.eos_token_id == again.eos_id
    Tokenizer.build(byte_level.backend, byte_level.special_tokens, {}).save(tmp_path / "0")
    assert dict(Tokenizer.load(tmp_path / "0").chat_templates) == {}


def test_a_template_name_that_is_a_path_is_not_written(byte_level: Tokenizer, tmp_path: Path) -> None:
    made = Tokenizer.build(byte_level.backend, {}, {"../../x": "A"})
    with pytest.raises(TokenizerError, match=r"name '\.\./\.\./x' cannot be a file's name"):
        made.save(tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("*"))


def test_input_that_is_not_text_or_ids(byte_level: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"half a surrogate pair \(U\+D83D\) at position 2"):
        byte_level.encode("ab\ud83d")
    with pytest.raises(InputError, match="encode takes text"):
        byte_level.encode(b"bytes")  # type: ignore[arg-type]
    for wrong in (-1, 1 << 32, 1 << 70):
        with pytest.raises(InputError, match=f"{wrong} is not a token id"):
            byte_level.decode([1, wrong])
        assert byte_level.id_to_token(wrong) is None
    assert byte_level.decode([byte_level.vocab_size + 5]) == ""
    assert byte_level.id_to_token(byte_level.vocab_size) is None


def test_numpy_ids(byte_level: Tokenizer) -> None:
    ids = np.array(byte_level.encode("the fox"), np.int64)
    assert byte_level.decode(ids) == "the fox"
    assert byte_level.id_to_token(ids[0]) == byte_level.id_to_token(int(ids[0]))


def test_loading_is_fast(smollm2_directory: Path) -> None:
    """The best of three, so that another process on the machine does not count."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        Tokenizer.load(smollm2_directory)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


@pytest.fixture(scope="session")
def smollm2_directory(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import gguf

    from relax_llm.checkpoint.gguf_tokenizer import tokenizer_from_gguf

    metadata = {key: entry.contents() for key, entry in gguf.GGUFReader(smollm2_path).fields.items()}
    directory = tmp_path_factory.mktemp("smollm2")
    tokenizer_from_gguf(metadata, smollm2_path).save(directory)
    return directory


def test_importing_is_light() -> None:
    """Neither the reference libraries nor what only some uses need."""
    heavy = ["torch", "transformers", "tvm", "jinja2", "sentencepiece", "numpy", "gguf"]
    program = f"import sys, relax_llm.text; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
