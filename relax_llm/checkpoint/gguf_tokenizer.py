"""The tokenizer inside a GGUF file, rebuilt from its metadata.

Keys and their meaning: the GGUF specification, section "Tokenizer". Two kinds hold nearly every model:
``gpt2`` (byte-level BPE; ``tokenizer.ggml.pre`` names how text is cut first) and ``llama`` (SentencePiece BPE
with scores).
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from relax_llm.errors import TokenizerError
from relax_llm.text.bytelevel import FAMILIES, byte_level_backend
from relax_llm.text.postprocess import add_bos_eos
from relax_llm.text.sentencepiece import (
    PieceType,
    SentencePieceVocab,
    add_typed_tokens,
    sentencepiece_backend,
)
from relax_llm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_PREFIX = "tokenizer.ggml."
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the specification
    "mask_token": "mask_token_id",
}
# Ids that a file of the llama kind may leave out, because SentencePiece's own are meant.
_SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
# Control tokens by which chat models end their turn; many files name only the end of the text.
_TURN_ENDS = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
)


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: Path) -> Tokenizer:
    """Rebuilds the tokenizer that a GGUF file describes.

    Args:
        metadata: GGUF key to Python value; arrays as lists or NumPy arrays.
        source: The file, for error messages.

    Raises:
        TokenizerError: A field is missing, malformed or contradictory, or the kind of tokenizer or its way of
            cutting text is not known. The message names the file and the key.
    """
    return _Reader(metadata, source).tokenizer()


class _Reader:
    """Typed access to the tokenizer's keys; every refusal names the file and the key."""

    def __init__(self, metadata: Mapping[str, Any], source: Path) -> None:
        self._metadata, self._source = metadata, source
        self._tokens = self._token_list()
        self._types = self._token_types()

    def tokenizer(self) -> Tokenizer:
        kind = self._text("model")
        if kind == "gpt2":
            backend, add_bos, defaults = *self._byte_level(), {}
        elif kind == "llama":
            backend, add_bos, defaults = *self._sentencepiece(), _SENTENCEPIECE_IDS
        else:
            raise self._error(
                "model", f"is {kind!r}, where only 'gpt2' and 'llama' are known; convert the model again"
            )
        roles = {}
        for role, key in _ROLES.items():
            i = self._id(key, defaults.get(role))
            if i is not None:
                roles[role] = self._tokens[i]
        bos = roles.get("bos_token") if self._flag("add_bos_token", add_bos) else None
        eos = roles.get("eos_token") if self._flag("add_eos_token", False) else None
        add_bos_eos(backend, bos, eos)
        ends = [self._id(key) for key in ("eot_token_id", "eom_token_id")]
        stop = {self._tokens[i] for i in ends if i is not None}
        stop |= {
            token
            for token, kind in zip(self._tokens, self._types, strict=True)
            if token in _TURN_ENDS and kind == PieceType.CONTROL
        }
        return Tokenizer.build(backend, roles, self._chat_templates(), sorted(stop))

    def _byte_level(self) -> tuple[Any, bool]:
        name = self._metadata.get(_PREFIX + "pre")
        if name is None and self._metadata.get("general.architecture") == "gpt2":
            name = "gpt-2"
        if name is None:
            raise self._error(
                "pre", "is missing, so how to cut text before merging is unknown; convert the model again"
            )
        family = FAMILIES.get(name) if isinstance(name, str) else None
        if family is None:
            raise self._error(
                "pre", f"is {name!r}, which is not one of the known ways to cut text: {sorted(FAMILIES)}"
            )
        merges = []
        for i, merge in enumerate(self._list("merges", str)):
            cut = merge.find(" ", 1)
            left, right = merge[:cut], merge[cut + 1 :]
            if cut < 0 or not right:
                raise self._error(
                    "merges", f"holds {merge!r} at {i}, which is not two tokens with a space between"
                )
            merges.append((left, right))
        ids = {token: i for i, token in enumerate(self._tokens)}
        try:
            backend = byte_level_backend(ids, merges, family)
        except Exception as error:
            raise self._error("merges", f"does not fit the tokens: {error}") from error
        add_typed_tokens(backend, self._tokens, self._types)
        return backend, family.add_bos

    def _sentencepiece(self) -> tuple[Any, bool]:
        scores = self._list("scores", float)
        self._same_length("scores", scores)
        if any(map(math.isnan, scores)):
            raise self._error("scores", "holds a value that is not a number")
        charsmap = self._metadata.get(_PREFIX + "precompiled_charsmap")
        vocab = SentencePieceVocab(
            pieces=self._tokens,
            scores=scores,
            types=self._types,
            unknown_id=self._id("unknown_token_id", 0),
            add_space_prefix=self._flag("add_space_prefix", True),
            remove_extra_spaces=self._flag("remove_extra_whitespaces", False),
            charsmap=b"" if charsmap is None else self._bytes("precompiled_charsmap", charsmap),
        )
        return sentencepiece_backend(vocab, str(self._source)), True

    def _token_list(self) -> list[str]:
        tokens = self._list("tokens", str)
        if not tokens:
            raise self._error("tokens", "is empty")
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # as llama.cpp names them
        if len(set(tokens)) != len(tokens):
            twice = next(token for token, count in Counter(tokens).items() if count > 1)
            raise self._error("tokens", f"holds the token {twice!r} twice")
        return tokens

    def _token_types(self) -> list[int]:
        if _PREFIX + "token_type" not in self._metadata:
            return [PieceType.NORMAL] * len(self._tokens)
        types = self._list("token_type", int)
        self._same_length("token_type", types)
        return types

    def _chat_templates(self) -> dict[str, str]:
        templates = {}
        for key, value in self._metadata.items():
            if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template."):
                if not isinstance(value, str):
                    raise TokenizerError(f"{self._source}: {key} must be text, not {type(value).__name__}.")
                templates[key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default"] = value
        return templates

    def _error(self, key: str, what: str) -> TokenizerError:
        return TokenizerError(f"{self._source}: {_PREFIX}{key} {what}.")

    def _same_length(self, key: str, values: Sequence[object]) -> None:
        if len(values) != len(self._tokens):
            raise self._error(key, f"holds {len(values)} values for {len(self._tokens)} tokens")

    def _text(self, key: str) -> str:
        value = self._metadata.get(_PREFIX + key)
        if not isinstance(value, str):
            raise self._error(
                key, "is missing" if value is None else f"must be text, not {type(value).__name__}"
            )
        return value

    def _list(self, key: str, kind: type) -> list[Any]:
        """An array as a list of str, int or float."""
        value = self._metadata.get(_PREFIX + key)
        if value is None:
            raise self._error(key, "is missing")
        if isinstance(value, np.ndarray) and value.ndim == 1:
            value = value.tolist()
        if not isinstance(value, (list, tuple)):
            raise self._error(key, f"must be an array, not {type(value).__name__}")
        values = list(value)
        allowed = (int, float) if kind is float else kind
        wrong = next((v for v in values if not isinstance(v, allowed) or isinstance(v, bool)), None)
        if wrong is not None:
            raise self._error(key, f"must hold {kind.__name__} values, not {wrong!r}")
        return values

    def _bytes(self, key: str, value: Any) -> bytes:
        try:
            return bytes(np.asarray(value, dtype=np.int64).astype(np.uint8))
        except (TypeError, ValueError, OverflowError) as error:
            raise self._error(key, "must hold bytes") from error

    def _flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(_PREFIX + key, default)
        if not isinstance(value, (bool, np.bool_)):
            raise self._error(key, f"must be true or false, not {value!r}")
        return bool(value)

    def _id(self, key: str, default: int | None = None) -> int | None:
        """A token id; a default that lies beyond the vocabulary is none."""
        value = self._metadata.get(_PREFIX + key)
        if value is None:
            return default if default is not None and default < len(self._tokens) else None
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise self._error(key, f"must be a token id, not {value!r}")
        if not 0 <= value < len(self._tokens):
            raise self._error(key, f"is {value}, beyond the {len(self._tokens)} tokens")
        return int(value)
