"""Small tokenizers trained for the tests, and references that share no code with the library."""

from __future__ import annotations

import io
import json
import unicodedata
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import regex  # type: ignore[import-untyped]
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.text.corpus import corpus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = ("<think>", "</think>", "    ")


def train_byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, vocab_size: int = 900) -> dict[str, Any]:
    """A byte-level BPE model (vocabulary and merges, as tokenizer.json holds them) trained on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus(1200, seed=7), trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


@dataclass
class NaiveBytePairs:
    """Byte-level BPE as the GPT-2 paper describes it, plainly: cut, map bytes, merge the best pair.

    Attributes:
        vocab: Token to id.
        merges: Best first.
        cuts: Patterns applied in turn; matches stand alone, and so does what is between them.
        special: Tokens found in the text beforehand.
        nfc: Compose characters first.
        ignore_merges: Take a word that is a token as it is.
    """

    vocab: Mapping[str, int]
    merges: Sequence[Sequence[str]]
    cuts: Sequence[str]
    special: Sequence[str]
    nfc: bool = False
    ignore_merges: bool = False
    _words: dict[str, list[int]] = field(default_factory=dict)
    _ranks: dict[tuple[str, ...], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ranks = {tuple(pair): rank for rank, pair in enumerate(self.merges)}

    def encode(self, text: str) -> list[int]:
        parts = regex.split(
            "(" + "|".join(map(regex.escape, sorted(self.special, key=len)[::-1])) + ")", text
        )
        ids: list[int] = []
        for part in parts:
            if part in self.special:
                ids.append(self.vocab[part])
                continue
            pieces = [unicodedata.normalize("NFC", part) if self.nfc else part]
            for cut in self.cuts:
                pieces = [p for piece in pieces for p in regex.split(f"({cut})", piece, flags=regex.V0) if p]
            for piece in pieces:
                if piece not in self._words:
                    self._words[piece] = self._word(piece)
                ids += self._words[piece]
        return ids

    def _word(self, word: str) -> list[int]:
        parts = [_letter(byte) for byte in word.encode()]
        if self.ignore_merges and "".join(parts) in self.vocab:
            return [self.vocab["".join(parts)]]
        while len(parts) > 1:
            pairs = [(self._ranks.get(pair, 1 << 30), i) for i, pair in enumerate(pairwise(parts))]
            rank, at = min(pairs)
            if rank == 1 << 30:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.vocab[part] for part in parts]


@cache
def _letter(byte: int) -> str:
    """Bytes whose Latin-1 character can be seen are written as it, the others from U+0100 on."""
    hidden = [b for b in range(256) if not chr(b).isprintable() or chr(b).isspace()]
    return chr(256 + hidden.index(byte)) if byte in hidden else chr(byte)


@dataclass(frozen=True)
class SentencePieceModel:
    """A trained SentencePiece BPE model.

    Attributes:
        proto: The bytes of ``tokenizer.model``.
        processor: SentencePiece itself.
    """

    proto: bytes
    processor: sentencepiece.SentencePieceProcessor

    @property
    def pieces(self) -> list[str]:
        return [self.processor.id_to_piece(i) for i in range(len(self.processor))]

    @property
    def scores(self) -> list[float]:
        return [self.processor.get_score(i) for i in range(len(self.processor))]

    @property
    def types(self) -> list[int]:
        """As GGUF numbers them."""
        p = self.processor
        kinds = [(p.is_unknown, 2), (p.is_control, 3), (p.is_byte, 6), (p.is_unused, 5)]
        own = [next((kind for test, kind in kinds if test(i)), 1) for i in range(len(p))]
        return [4 if piece in SP_USER_DEFINED else kind for piece, kind in zip(self.pieces, own, strict=True)]

    def write(self, directory: Path) -> Path:
        path = directory / "tokenizer.model"
        path.write_bytes(self.proto)
        return path


SP_CONTROL = ("<|im_start|>", "<|im_end|>")
SP_USER_DEFINED = ("<think>",)


@cache
def train_sentencepiece(**options: Any) -> SentencePieceModel:
    """Trains a SentencePiece BPE model with byte fallback on the corpus.

    Args:
        **options: For SentencePiece's trainer, lists as tuples.
    """
    out = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 900,
        "byte_fallback": True,
        "character_coverage": 0.985,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "control_symbols": list(SP_CONTROL),
        "user_defined_symbols": list(SP_USER_DEFINED),
        "minloglevel": 2,
    }
    sentences = [text.replace("\n", " ") for text in corpus(2500, seed=11) if text.strip()]
    settings |= {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=out, **settings)
    return SentencePieceModel(
        out.getvalue(), sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    )
