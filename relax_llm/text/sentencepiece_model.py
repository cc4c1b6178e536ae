"""Reads ``tokenizer.model``, SentencePiece's own file (sentencepiece_model.proto), without its library.

The file is one protocol-buffer message. The fields read here: ModelProto 1 = pieces (1 text, 2 score,
3 type), 2 = trainer (3 model type, 40 unknown id, 41 begin, 42 end, 43 padding), 3 = normalizer (2 charsmap,
3 space prefix, 4 remove extra spaces).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from relax_llm.errors import TokenizerError
from relax_llm.text.sentencepiece import PieceType, SentencePieceVocab

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BPE = 2
_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class SentencePieceFile:
    """A ``tokenizer.model``: its vocabulary and the ids of its special pieces (None where it has none)."""

    vocab: SentencePieceVocab
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise ValueError("a number longer than ten bytes")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The (number, value) pairs of a message; a nested message is its bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if size > len(data) - at:
            raise ValueError("a field that ends after the file")
        yield number, data[at : at + size]
        at += size


def _message(value: int | bytes) -> dict[int, int | bytes]:
    """The fields of a nested message; of a repeated one the last counts, as the format says."""
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return dict(_fields(value))


def _bytes(message: dict[int, int | bytes], number: int, default: bytes) -> bytes:
    value = message.get(number, default)
    if isinstance(value, int):
        raise ValueError("a number where text belongs")
    return value


def _int(message: dict[int, int | bytes], number: int, default: int) -> int:
    value = message.get(number, default)
    if not isinstance(value, int):
        raise ValueError("text where a number belongs")
    return value - (1 << 64) if value >> 63 else value


def read_sentencepiece_model(path: Path) -> SentencePieceFile:
    """Reads a SentencePiece BPE model.

    Args:
        path: A ``tokenizer.model``.

    Raises:
        TokenizerError: The file is not such a model, is cut off, or is not of the BPE kind.
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = _message(value)
                score = struct.unpack("<f", _bytes(piece, 2, bytes(4)))[0]
                pieces.append(
                    (_bytes(piece, 1, b"").decode("utf-8"), score, _int(piece, 3, PieceType.NORMAL))
                )
            elif number == 2:
                trainer = _message(value)
            elif number == 3:
                normalizer = _message(value)
        special = {name: _int(trainer, number, default) for name, number, default in _SPECIAL}
        model_type = _int(trainer, 3, 1)
        charsmap = _bytes(normalizer, 2, b"")
        prefix, squeeze = bool(_int(normalizer, 3, 1)), bool(_int(normalizer, 4, 1))
    except (ValueError, IndexError, struct.error) as error:
        raise TokenizerError(
            f"{path}: not a SentencePiece model, or a damaged one ({error}); download the file again."
        ) from error
    if not pieces:
        raise TokenizerError(
            f"{path}: not a SentencePiece model: it holds no pieces; download the file again."
        )
    if model_type != _BPE:
        kind = _MODEL_TYPES.get(model_type, str(model_type))
        raise TokenizerError(
            f"{path}: a SentencePiece model of the {kind} kind, where only BPE is read here. Make a "
            "tokenizer.json once, with transformers: "
            "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)."
        )
    ids = {name: i if 0 <= i < len(pieces) else None for name, i in special.items()}
    texts, scores, types = zip(*pieces, strict=True)
    vocab = SentencePieceVocab(texts, scores, types, ids["unk"], prefix, squeeze, charsmap)
    return SentencePieceFile(vocab, ids["bos"], ids["eos"], ids["pad"])


_SPECIAL = (("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1))
