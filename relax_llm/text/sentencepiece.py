"""SentencePiece BPE as a ``tokenizers`` backend: merges from scores, byte fallback, the space prefix.

SentencePiece stores no merges. It merges, again and again, the two neighbours whose concatenation is the
piece with the best score; so every way to cut a piece in two pieces is a merge, ranked by the whole's score.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from relax_llm.errors import TokenizerError

if TYPE_CHECKING:
    from collections.abc import Sequence

SPACE = "\u2581"  # how SentencePiece writes a space
MAX_PIECE_CHARACTERS = 256  # far more than trainers make; a piece is cut in every place


class PieceType(IntEnum):
    """What a piece is for, as sentencepiece_model.proto and GGUF's token_type number it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class SentencePieceVocab:
    """The contents of a SentencePiece BPE model.

    Attributes:
        pieces: Text of each piece; its place is its id.
        scores: One score a piece, greater merges first.
        types: One type a piece.
        unknown_id: The piece for what no other piece covers, or None.
        add_space_prefix: Text gets one space in front.
        remove_extra_spaces: Runs of spaces become one, and those at either end go.
        charsmap: SentencePiece's compiled character normalization; empty for none.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unknown_id: int | None
    add_space_prefix: bool = True
    remove_extra_spaces: bool = False
    charsmap: bytes = b""


def merges_from_scores(vocab: SentencePieceVocab) -> list[tuple[str, str]]:
    """Every cut of a normal piece into two pieces, the one with the best score first.

    Only normal pieces are formed by merging: SentencePiece finds user-defined ones in the text beforehand,
    and never forms control, unknown, byte and unused pieces from text. Pieces of
    more than MAX_PIECE_CHARACTERS are not formed either: cutting them would take a hostile file's time.
    """
    normal = {
        piece
        for piece, kind in zip(vocab.pieces, vocab.types, strict=True)
        if kind == PieceType.NORMAL and len(piece) <= MAX_PIECE_CHARACTERS
    }
    ranked = sorted(
        ((score, piece) for piece, score in zip(vocab.pieces, vocab.scores, strict=True) if piece in normal),
        key=lambda scored: -scored[0],
    )
    return [
        (piece[:cut], piece[cut:])
        for _, piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]


def _normalizer(vocab: SentencePieceVocab, source: str) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if vocab.charsmap:
        try:
            steps.append(normalizers.Precompiled(vocab.charsmap))
        except Exception as error:
            raise TokenizerError(f"{source}: the precompiled_charsmap cannot be used: {error}.") from error
    if vocab.remove_extra_spaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if vocab.add_space_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def sentencepiece_backend(vocab: SentencePieceVocab, source: str) -> Tokenizer:
    """A tokenizer that cuts text as SentencePiece does, with its control and user-defined pieces added.

    The space prefix goes before every stretch of text between special tokens, as in Llama's and Mistral's
    first ``tokenizer.json``; on text without special tokens this is SentencePiece itself, also where the text
    begins with spaces of its own.

    Args:
        vocab: The model's contents.
        source: The file, for error messages.

    Raises:
        TokenizerError: Two pieces have the same text, or the character map is damaged.
    """
    ids = {piece: i for i, piece in enumerate(vocab.pieces)}
    if len(ids) != len(vocab.pieces):
        first = next(piece for i, piece in enumerate(vocab.pieces) if ids[piece] != i)
        raise TokenizerError(
            f"{source}: the vocabulary holds the token {first!r} twice; each must be there once."
        )
    unknown = None if vocab.unknown_id is None else vocab.pieces[vocab.unknown_id]
    backend = Tokenizer(
        models.BPE(ids, merges_from_scores(vocab), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = _normalizer(vocab, source)
    undo: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocab.add_space_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(undo)
    add_typed_tokens(backend, vocab.pieces, vocab.types)
    return backend


def add_typed_tokens(backend: Tokenizer, pieces: Sequence[str], types: Sequence[int]) -> None:
    """Makes control and unknown pieces special tokens, and user-defined ones tokens found whole in text."""
    typed = list(zip(pieces, types, strict=True))
    special = [piece for piece, kind in typed if kind in (PieceType.CONTROL, PieceType.UNKNOWN)]
    whole = [piece for piece, kind in typed if kind == PieceType.USER_DEFINED]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    backend.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in whole])
