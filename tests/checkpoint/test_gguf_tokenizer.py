"""GGUF tokenizers against transformers, SentencePiece and a plain reference, on thousands of strings."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import generate_merges
from transformers.models.cohere.tokenization_cohere import CohereTokenizer
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer
from transformers.models.gpt_neox.tokenization_gpt_neox import GPTNeoXTokenizer
from transformers.models.llama.tokenization_llama import LlamaTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from relax_llm.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from relax_llm.errors import TokenizerError
from relax_llm.text.bytelevel import FAMILIES
from relax_llm.text.sentencepiece_model import read_sentencepiece_model
from tests.checkpoint.tokenizer_families import PLAIN, PUBLISHED
from tests.text.corpus import corpus
from tests.text.models import (
    SP_CONTROL,
    SP_USER_DEFINED,
    SPECIAL,
    USER_DEFINED,
    NaiveBytePairs,
    SentencePieceModel,
    train_byte_level,
    train_sentencepiece,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import relax_llm.text

COUNT = 2200
CONTROL, USER = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED


def read(path: Path) -> dict[str, Any]:
    """A GGUF file's metadata by the gguf package's own reader."""
    return {key: entry.contents() for key, entry in gguf.GGUFReader(path).fields.items()}


def differences(
    ours: Callable[[str], list[int]], theirs: Callable[[str], Sequence[int]], strings: Iterable[str]
) -> list[str]:
    return [text for text in strings if ours(text) != list(theirs(text))]


def write_byte_level(path: Path, name: str | None, model: Mapping[str, Any], **extra: Any) -> Path:
    """A GGUF file of a byte-level model; SPECIAL are control tokens, USER_DEFINED are appended."""
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__) + list(USER_DEFINED)
    kinds = [
        CONTROL if t in SPECIAL else USER if t in USER_DEFINED else gguf.TokenType.NORMAL for t in tokens
    ]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    if name is not None:
        writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for key, value in extra.items():
        getattr(writer, key)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_sentencepiece(path: Path, model: SentencePieceModel, **extra: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(model.pieces)
    writer.add_token_scores(model.scores)
    writer.add_token_types(model.types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for key, value in extra.items():
        getattr(writer, key)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@cache
def byte_level_model(name: str) -> dict[str, Any]:
    """Trained with the pre-tokenizer that the family publishes, so that merges cross no cut."""
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    published = {"version": "1.0", "added_tokens": [], "model": empty, "pre_tokenizer": PUBLISHED[name][1]}
    return train_byte_level(Tokenizer.from_str(json.dumps(published)).pre_tokenizer)


def published_backend(name: str, model: Mapping[str, Any]) -> Tokenizer:
    """The family's own tokenizer.json around a model."""
    normalizer, pre_tokenizer, ignore_merges = PUBLISHED[name]
    added = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    document: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {**model, "ignore_merges": ignore_merges},
    }
    backend = Tokenizer.from_str(json.dumps(document))
    backend.add_special_tokens(added)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in USER_DEFINED])
    return backend


@pytest.mark.parametrize("name", PUBLISHED)
def test_byte_level_agrees_with_the_published_tokenizer(name: str, tmp_path: Path) -> None:
    model = byte_level_model(name)
    path = write_byte_level(tmp_path / "m.gguf", name, model)
    ours = tokenizer_from_gguf(read(path), path)
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=published_backend(name, model))
    strings = corpus(COUNT, seed=1, special=SPECIAL + USER_DEFINED)

    def encode(text: str) -> list[int]:
        return ours.encode(text, add_special_tokens=False)

    assert not differences(encode, lambda text: reference.encode(text, add_special_tokens=False), strings)
    for text in strings[::5]:
        ids = encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(
                ids, skip_special_tokens=skip
            )


@pytest.mark.parametrize("name", PLAIN)
def test_byte_level_agrees_with_a_plain_implementation(name: str, tmp_path: Path) -> None:
    """No code in common: another regular-expression engine and the textbook's merging loop."""
    model = byte_level_model(name)
    path = write_byte_level(tmp_path / "m.gguf", name, model)
    ours = tokenizer_from_gguf(read(path), path)
    cuts, nfc, ignore_merges = PLAIN[name]
    vocab = model["vocab"] | {token: len(model["vocab"]) + i for i, token in enumerate(USER_DEFINED)}
    special = SPECIAL + USER_DEFINED
    plain = NaiveBytePairs(vocab, model["merges"], cuts, special, nfc, ignore_merges)
    # The engines know different versions of Unicode; no character in the corpus is newer than either.
    strings = corpus(COUNT, seed=2, special=special)
    assert not differences(lambda text: ours.encode(text, add_special_tokens=False), plain.encode, strings)


@pytest.mark.parametrize(
    ("name", "kind", "published"),
    [
        ("gpt-2", GPT2Tokenizer, "gpt-2"),
        ("olmo", GPTNeoXTokenizer, "mpt"),
        ("command-r", CohereTokenizer, "command-r"),
        ("qwen2", Qwen2Tokenizer, "qwen2"),
        ("qwen35", Qwen3_5Tokenizer, "qwen2"),
    ],
)
def test_byte_level_agrees_with_the_class_in_transformers(
    name: str, kind: type[Any], published: str, tmp_path: Path
) -> None:
    model = byte_level_model(published)
    path = write_byte_level(tmp_path / "m.gguf", name, model)
    ours = tokenizer_from_gguf(read(path), path)
    reference = kind(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    reference.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    known = set(reference.get_vocab())
    assert set(SPECIAL) <= known
    # The class brings special tokens of its own, which this vocabulary lacks; keep them out of the text.
    extra = known - set(model["vocab"])
    strings = [
        s for s in corpus(COUNT, seed=3, special=SPECIAL) if not any(t in s for t in (*extra, *USER_DEFINED))
    ]
    assert len(strings) > 2000
    assert not differences(
        lambda text: ours.encode(text, add_special_tokens=False),
        lambda text: reference.encode(text, add_special_tokens=False),
        strings,
    )


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "tekken", "gpt-4o", "gpt-2"])
def test_byte_level_agrees_with_transformers_reading_the_same_file(name: str, tmp_path: Path) -> None:
    """What transformers 5 leaves out when it reads a GGUF file is put back, or kept out of the text.

    That is ``ignore_merges``, NFC, and user-defined tokens that are spaces.
    """
    path = write_byte_level(tmp_path / "m.gguf", name, byte_level_model(name))
    ours = tokenizer_from_gguf(read(path), path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    if PUBLISHED[name][2]:
        reference.backend_tokenizer.model.ignore_merges = True
    if PUBLISHED[name][0]:
        reference.backend_tokenizer.normalizer = normalizers.NFC()
    strings = [s for s in corpus(2500, seed=4, special=SPECIAL + USER_DEFINED) if " " * 4 not in s]
    assert len(strings) > 2000
    assert not differences(
        lambda text: ours.encode(text, add_special_tokens=False),
        lambda text: reference.encode(text, add_special_tokens=False),
        strings,
    )


def test_every_family_is_written_and_read_back_by_its_name(tmp_path: Path) -> None:
    model = byte_level_model("gpt-2")
    text = "It's 12345 ½ e\u0301 XMLHttp 你好\n\n  x"
    seen = {}
    for name in FAMILIES:
        path = write_byte_level(tmp_path / "m.gguf", name, model)
        tokenizer = tokenizer_from_gguf(read(path), path)
        seen[name] = tuple(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) in (text, text.replace("e\u0301", "é"))
    assert seen["llama3"] == seen["llama-bpe"] != seen["qwen2"]
    assert seen["starcoder"] == seen["smollm"] != seen["gpt-2"] == seen["default"]


def test_smollm2_agrees_with_its_published_tokenizer(smollm2_path: Path) -> None:
    """transformers ignores that ``pre`` is smollm, so digits run together there; the cut is put back."""
    ours = smollm2(smollm2_path)
    reference = transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    special = [ours.id_to_token(i) or "" for i in sorted(ours.special_ids)]
    strings = corpus(4200, seed=5, special=special)
    no_digits = [text for text in strings if not any(c.isnumeric() for c in text)]
    assert len(no_digits) > 2000
    assert not differences(ours.encode, reference.encode, no_digits)
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert not differences(ours.encode, reference.encode, strings)
    vocab = ours.backend.get_vocab()
    for text in strings[::10]:
        ids = ours.encode(text)
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        if covered(text, vocab):
            assert ours.decode(ids, skip_special_tokens=False) == text


def test_smollm2_agrees_with_a_plain_implementation(smollm2_path: Path) -> None:
    metadata = smollm2_metadata(smollm2_path)
    ours = smollm2(smollm2_path)
    tokens = metadata["tokenizer.ggml.tokens"]
    special = [
        token for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3
    ]
    merges = [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    # Some byte values, control characters among them, are no token there and vanish; the plain loop cannot.
    plain = NaiveBytePairs(vocab, merges, PLAIN["smollm"][0], special)
    strings = [text for text in corpus(COUNT, seed=6, special=special) if covered(text, vocab)]
    assert len(strings) > 2000
    assert not differences(ours.encode, plain.encode, strings)


def covered(text: str, vocab: Mapping[str, int]) -> bool:
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return all(letter in vocab for word, _ in letters for letter in word)


def test_smollm2_special_tokens_and_template(smollm2_path: Path) -> None:
    ours = smollm2(smollm2_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id) == (1, 2, 2, 0)
    assert ours.special_ids == frozenset(range(17))
    assert ours.vocab_size == 49152
    assert 2 in ours.stop_ids
    assert ours.encode("hi") == ours.encode("hi", add_special_tokens=False)
    assert ours.chat_template is not None
    assert "SmolLM" in ours.chat_template


@cache
def smollm2_metadata(path: Path) -> dict[str, Any]:
    return read(path)


@cache
def smollm2(path: Path) -> relax_llm.text.Tokenizer:
    return tokenizer_from_gguf(smollm2_metadata(path), path)


# SentencePiece


def test_sentencepiece_agrees_with_sentencepiece(tmp_path: Path) -> None:
    model = train_sentencepiece()
    path = write_sentencepiece(tmp_path / "m.gguf", model)
    ours = tokenizer_from_gguf(read(path), path)
    special = special_of(model)
    strings = [s for s in corpus(2500, seed=8) if not any(t in s for t in special)]
    assert len(strings) > 2000
    assert not differences(
        lambda text: ours.encode(text, add_special_tokens=False), model.processor.encode, strings
    )
    for text in strings[::3]:
        ids = model.processor.encode(text)
        assert ours.decode(ids) == model.processor.decode(ids)


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({"add_dummy_prefix": False}, {"add_add_space_prefix": False}),
        ({"remove_extra_whitespaces": True}, {"add_remove_extra_whitespaces": True}),
        ({"byte_fallback": False}, {}),
        ({"user_defined_symbols": [*SP_USER_DEFINED, "▁▁▁", "▁▁"], "add_dummy_prefix": False}, None),
    ],
    ids=["no-prefix", "squeeze", "no-bytes", "spaces-defined"],
)
def test_sentencepiece_options_agree_with_sentencepiece(
    options: dict[str, Any], extra: dict[str, Any] | None, tmp_path: Path
) -> None:
    frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    model = train_sentencepiece(**frozen)
    path = tmp_path / "m.gguf"
    if extra is None:  # user-defined runs of spaces are written as real spaces, as Gemma's files have them
        metadata = read(write_sentencepiece(path, model, add_add_space_prefix=False))
        tokens = metadata["tokenizer.ggml.tokens"]
        spaces = [i for i, token in enumerate(tokens) if token in ("▁▁▁", "▁▁")]
        assert len(spaces) == 2
        for i in spaces:
            tokens[i] = " " * len(tokens[i])
            metadata["tokenizer.ggml.token_type"][i] = int(USER)
    else:
        metadata = read(write_sentencepiece(path, model, **extra))
    ours = tokenizer_from_gguf(metadata, path)
    # A literal U+2581 is a space to SentencePiece, which squeezes it and finds it in symbols.
    avoided = (*special_of(model), "▁")
    strings = [s for s in corpus(2400, seed=9) if not any(t in s for t in avoided)]
    assert len(strings) > 2000
    assert not differences(
        lambda text: ours.encode(text, add_special_tokens=False), model.processor.encode, strings
    )


def special_of(model: SentencePieceModel) -> list[str]:
    """Texts that are tokens here wherever they occur; SentencePiece never finds control pieces in text."""
    return [piece for piece, kind in zip(model.pieces, model.types, strict=True) if kind in (2, 3)]


def llama_reference(model: SentencePieceModel) -> LlamaTokenizer:
    """transformers' Llama tokenizer of the same model, its merges made by transformers."""
    vocab = {piece: i for i, piece in enumerate(model.pieces)}
    merges = generate_merges(vocab, dict(zip(model.pieces, model.scores, strict=True)))
    reference = LlamaTokenizer(vocab=vocab, merges=merges)
    special = [
        AddedToken(piece, special=True, normalized=False) for piece in ("<unk>", "<s>", "</s>", *SP_CONTROL)
    ]
    reference.add_tokens(special, special_tokens=True)
    reference.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in SP_USER_DEFINED])
    return reference


def test_sentencepiece_agrees_with_transformers(tmp_path: Path) -> None:
    """Also inside text with special tokens, once the space prefix is as in Llama's own tokenizer.json.

    transformers 5 builds a Metaspace step instead, which puts no prefix before text that begins with a space
    (SentencePiece does) nor after a special token (Llama's tokenizer.json does), so those are compared with
    the published normalizer in its place.
    """
    model = train_sentencepiece()
    path = write_sentencepiece(tmp_path / "m.gguf", model)
    ours = tokenizer_from_gguf(read(path), path)
    reference = llama_reference(model)
    special = [*special_of(model), *SP_USER_DEFINED]
    strings = corpus(3000, seed=10, special=special)
    plain = [s for s in strings if not s.startswith((" ", "▁")) and not any(t in s for t in special)]
    assert len(plain) > 2000

    def encode(text: str) -> list[int]:
        return ours.encode(text, add_special_tokens=False)

    assert not differences(encode, lambda text: reference.encode(text, add_special_tokens=False), plain)
    for text in strings[::10]:
        ids = encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(
                ids, skip_special_tokens=skip
            )
    from_file = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert not differences(encode, lambda text: from_file.encode(text, add_special_tokens=False), plain)
    backend = reference.backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    assert not differences(encode, lambda text: backend.encode(text, add_special_tokens=False).ids, strings)


def test_sentencepiece_defaults(tmp_path: Path) -> None:
    """Without flags and ids, SentencePiece's own hold: <s> in front, nothing behind, ids 1, 2 and 0."""
    metadata = read(write_sentencepiece(tmp_path / "m.gguf", train_sentencepiece()))
    for key in ("bos_token_id", "eos_token_id", "unknown_token_id"):
        del metadata[f"tokenizer.ggml.{key}"]
    ours = tokenizer_from_gguf(metadata, tmp_path / "m.gguf")
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.pad_id) == (1, 2, 0, None)
    assert ours.encode("the")[0] == 1
    assert ours.encode("") == [1]
    assert ours.stop_ids == {2, ours.token_to_id("<|im_end|>")}


# Flags, ids and templates


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe"])
@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("eos", [None, True, False])
def test_tokens_around_text(name: str, bos: bool | None, eos: bool | None, tmp_path: Path) -> None:
    flags = {"add_add_bos_token": bos, "add_add_eos_token": eos}
    extra = {key: value for key, value in flags.items() if value is not None} | {"add_bos_token_id": 1}
    path = write_byte_level(tmp_path / "m.gguf", name, byte_level_model(name), **extra)
    ours = tokenizer_from_gguf(read(path), path)
    inner = ours.encode("the fox", add_special_tokens=False)
    first = [1] if bos or (bos is None and name == "llama-bpe") else []
    assert ours.encode("the fox") == first + inner + ([2] if eos else [])
    if bos is not None:
        reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
        assert ours.encode("the fox") == reference.encode("the fox")


def test_numpy_arrays_and_lists_are_the_same(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path / "m.gguf", train_sentencepiece())
    metadata = read(path)
    arrays = dict(metadata)
    arrays["tokenizer.ggml.scores"] = np.array(metadata["tokenizer.ggml.scores"], np.float32)
    arrays["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], np.int32)
    arrays["tokenizer.ggml.tokens"] = np.array(metadata["tokenizer.ggml.tokens"], object)
    arrays["tokenizer.ggml.bos_token_id"] = np.uint32(1)
    one, other = tokenizer_from_gguf(metadata, path), tokenizer_from_gguf(arrays, path)
    assert one.backend.to_str() == other.backend.to_str()


def test_named_chat_templates_and_turn_ends(tmp_path: Path) -> None:
    path = write_byte_level(
        tmp_path / "m.gguf",
        "gpt-2",
        byte_level_model("gpt-2"),
        add_chat_template=[
            {"name": "default", "template": "{{ 1 }}"},
            {"name": "tool_use", "template": "{{ 2 }}"},
        ],
        add_eot_token_id=1,
    )
    ours = tokenizer_from_gguf(read(path), path)
    assert dict(ours.chat_templates) == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    assert ours.stop_ids == {0, 1, 2}


def test_a_missing_cut_is_known_for_gpt2_models_alone(tmp_path: Path) -> None:
    path = write_byte_level(tmp_path / "m.gguf", None, byte_level_model("gpt-2"))
    metadata = read(path)
    with pytest.raises(TokenizerError, match=r"m\.gguf: tokenizer\.ggml\.pre is missing"):
        tokenizer_from_gguf(metadata, path)
    metadata["general.architecture"] = "gpt2"
    assert tokenizer_from_gguf(metadata, path).encode("12") == tokenizer_from_gguf(
        metadata | {"tokenizer.ggml.pre": "gpt-2"}, path
    ).encode("12")


BYTE_LEVEL_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "kind missing": ({"model": None}, r"model is missing"),
    "kind unknown": ({"model": "bert"}, r"model is 'bert'"),
    "kind not text": ({"model": 3}, r"model must be text, not int"),
    "cut unknown": ({"pre": "no-such-cut"}, r"pre is 'no-such-cut'.*llama-bpe.*qwen2"),
    "cut not text": ({"pre": [1]}, r"pre is \[1\]"),
    "tokens missing": ({"tokens": None}, r"tokens is missing"),
    "tokens empty": ({"tokens": []}, r"tokens is empty"),
    "tokens not an array": ({"tokens": "abc"}, r"tokens must be an array, not str"),
    "tokens not text": ({"tokens": [1, 2]}, r"tokens must hold str values, not 1"),
    "token twice": ({"tokens": ["a", "b", "a"]}, r"tokens holds the token 'a' twice"),
    "types too few": ({"token_type": [1]}, r"token_type holds 1 values for"),
    "types not numbers": ({"token_type": ["x"]}, r"token_type must hold int values, not 'x'"),
    "merges missing": ({"merges": None}, r"merges is missing"),
    "merge of one": ({"merges": ["ab"]}, r"merges holds 'ab' at 0"),
    "merge of nothing": ({"merges": ["a "]}, r"merges holds 'a ' at 0"),
    "merge of strangers": ({"merges": ["zqx jjj"]}, r"merges does not fit the tokens"),
    "id beyond": ({"eos_token_id": 10**6}, r"eos_token_id is 1000000, beyond the"),
    "id negative": ({"eos_token_id": -1}, r"eos_token_id is -1, beyond the"),
    "id not a number": ({"eos_token_id": "2"}, r"eos_token_id must be a token id, not '2'"),
    "flag not a flag": ({"add_bos_token": 1}, r"add_bos_token must be true or false, not 1"),
    "template not text": ({"!tokenizer.chat_template": 5}, r"tokenizer\.chat_template must be text"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("fault", BYTE_LEVEL_FAULTS)
def test_byte_level_faults_are_named(fault: str, tmp_path: Path) -> None:
    path = write_byte_level(tmp_path / "m.gguf", "gpt-2", byte_level_model("gpt-2"))
    check_fault(read(path), *BYTE_LEVEL_FAULTS[fault], path)


SENTENCEPIECE_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "scores missing": ({"scores": None}, r"scores is missing"),
    "scores too few": ({"scores": [0.0]}, r"scores holds 1 values for"),
    "scores not numbers": ({"scores": ["a"]}, r"scores must hold float values, not 'a'"),
    "score nan": ({"scores": [float("nan")] * 900}, r"scores holds a value that is not a number"),
    "flag": ({"add_space_prefix": "yes"}, r"add_space_prefix must be true or false"),
    "charsmap": ({"precompiled_charsmap": ["a"]}, r"precompiled_charsmap must hold bytes"),
    "charsmap garbled": ({"precompiled_charsmap": [255] * 64}, r"precompiled_charsmap .*cannot be used"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("fault", SENTENCEPIECE_FAULTS)
def test_sentencepiece_faults_are_named(fault: str, tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path / "m.gguf", train_sentencepiece())
    check_fault(read(path), *SENTENCEPIECE_FAULTS[fault], path)


def check_fault(metadata: dict[str, Any], changes: dict[str, Any], message: str, path: Path) -> None:
    for key, value in changes.items():
        full = key[1:] if key.startswith("!") else f"tokenizer.ggml.{key}"
        if value is None:
            del metadata[full]
        else:
            metadata[full] = value
    with pytest.raises(TokenizerError, match=message) as caught:
        tokenizer_from_gguf(metadata, path)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_very_long_piece_is_bounded(tmp_path: Path) -> None:
    """A piece is cut in every place; one of a megabyte would take hours, so it is never formed by merging."""
    model = train_sentencepiece()
    metadata = read(write_sentencepiece(tmp_path / "m.gguf", model))
    metadata["tokenizer.ggml.tokens"][-1] = "a" * 1_000_000
    ours = tokenizer_from_gguf(metadata, tmp_path / "m.gguf")
    assert ours.decode(ours.encode("aaa the")) == "aaa the"


def test_normalization_of_a_sentencepiece_model_is_applied(tmp_path: Path) -> None:
    """A model trained with NFKC carries its character map: ligatures and wide letters come out plain."""
    model = train_sentencepiece(normalization_rule_name="nmt_nfkc")
    path = write_sentencepiece(tmp_path / "m.gguf", model)
    charsmap = list(read_sentencepiece_model(model.write(tmp_path)).vocab.charsmap)
    assert charsmap
    ours = tokenizer_from_gguf(read(path) | {"tokenizer.ggml.precompiled_charsmap": charsmap}, path)
    for text in ("ﬁne", "\uff21\uff11\uff12", "①", "the\u00a0fox", "ｶﾅ"):
        assert ours.encode(text, add_special_tokens=False) == model.processor.encode(text)
