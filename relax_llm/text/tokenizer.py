"""The tokenizer of a checkpoint or artifact: text to ids and back, special tokens, chat templates."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from tokenizers import AddedToken

from relax_llm.errors import InputError, TokenizerError
from relax_llm.text.directory import (
    CONFIG_FILE,
    TEMPLATE_DIRECTORY,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    read_directory,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    import tokenizers

_NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A ``tokenizers.Tokenizer`` with what a model needs besides: special and stop tokens, chat templates.

    Attributes:
        backend: Encodes and decodes; it also adds the beginning and end tokens, where the model wants them.
        special_tokens: Role to token text, as chat templates name them: ``bos_token``, ``eos_token``,
            ``unk_token``, ``pad_token``; a role that the model does not have is absent.
        chat_templates: Name to Jinja template; ``default`` is the one for plain chat.
        stop_ids: Tokens that end an answer: ``eos_token``, and the end of a turn where that is another one.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    special_tokens: Mapping[str, str] = field(default_factory=lambda: _NONE)
    chat_templates: Mapping[str, str] = field(default_factory=lambda: _NONE, repr=False)
    stop_ids: frozenset[int] = frozenset()

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Reads the tokenizer of a Hugging Face directory, or one that `save` wrote.

        Args:
            directory: Holds ``tokenizer.json``, or ``vocab.json`` with ``merges.txt``, or
                ``tokenizer.model``; with ``tokenizer_config.json``, ``special_tokens_map.json`` and chat
                template files where present.

        Raises:
            TokenizerError: A file is missing, malformed or not supported; the message names it and the field.
        """
        found = read_directory(Path(directory))
        return cls.build(found.backend, found.special_tokens, found.chat_templates, found.stop_tokens)

    @classmethod
    def build(
        cls,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str],
        stop_tokens: Iterable[str] = (),
    ) -> Tokenizer:
        """Puts a tokenizer together; the named tokens become special ones of ``backend``, which is changed.

        Args:
            backend: A tokenizer with its vocabulary, normalizer, pre-tokenizer, decoder and post-processor.
            special_tokens: Role to token text.
            chat_templates: Name to Jinja template.
            stop_tokens: Texts of further tokens that end an answer; ``eos_token`` always does.
        """
        backend.no_truncation()
        backend.no_padding()
        known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        backend.add_special_tokens(
            [
                AddedToken(text, special=True, normalized=False)
                for text in dict.fromkeys(special_tokens.values())
                if text not in known
            ]
        )
        ends = [*stop_tokens, *(text for role, text in special_tokens.items() if role == "eos_token")]
        stop = {backend.token_to_id(text) for text in ends}
        return cls(
            backend,
            MappingProxyType(dict(special_tokens)),
            MappingProxyType(dict(chat_templates)),
            frozenset(i for i in stop if i is not None),
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes what `load` needs and nothing else; ``transformers`` reads the directory as well.

        Args:
            directory: Made if it is not there. Files of an earlier tokenizer in it are replaced.

        Raises:
            TokenizerError: A chat template's name cannot be a file's name.
        """
        folder = Path(directory)
        templates: dict[Path, str | None] = {folder / TEMPLATE_FILE: self.chat_templates.get("default")}
        for name, text in self.chat_templates.items():
            if name != "default":
                if not re.fullmatch(r"\w[\w.-]{0,100}", name):
                    raise TokenizerError(
                        f"The chat template's name {name!r} cannot be a file's name; rename it."
                    )
                templates[folder / TEMPLATE_DIRECTORY / f"{name}.jinja"] = text
        folder.mkdir(parents=True, exist_ok=True)
        stop = sorted(self.id_to_token(i) or "" for i in self.stop_ids)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens, "stop_tokens": stop}
        (folder / TOKENIZER_FILE).write_text(self.backend.to_str(), encoding="utf-8")
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
        for old in (folder / TEMPLATE_DIRECTORY).glob("*.jinja"):
            old.unlink()
        for file, template in templates.items():
            file.unlink(missing_ok=True)
            if template is not None:
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(template.encode("utf-8"))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids.

        Special tokens written out in the text become those tokens, as in ``transformers``.

        Args:
            text: Any text.
            add_special_tokens: Put the beginning and end tokens where the model wants them.

        Raises:
            InputError: The text holds half of a surrogate pair, which no encoding can express.
        """
        try:
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except (UnicodeEncodeError, TypeError) as error:
            if not isinstance(text, str):
                raise InputError(f"encode takes text (str), not {type(text).__name__}.") from error
            at = next(i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff")
            raise InputError(
                f"The text holds half a surrogate pair (U+{ord(text[at]):04X}) at position {at}; remove it, "
                "or decode the text again with the right encoding."
            ) from error

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Token ids to text, exactly as ``tokenizers`` joins them (no clean-up of spaces afterwards).

        Args:
            ids: Token ids; one that the vocabulary does not use (a model's padding rows) gives no text.
            skip_special_tokens: Leave special tokens out of the text.

        Raises:
            InputError: An id is negative or does not fit 32 bits.
        """
        numbers = [int(i) for i in ids]
        try:
            return str(self.backend.decode(numbers, skip_special_tokens=skip_special_tokens))
        except OverflowError as error:
            wrong = next(i for i in numbers if not 0 <= i < 1 << 32)
            raise InputError(
                f"{wrong} is not a token id; ids are from 0 to {self.vocab_size - 1}."
            ) from error

    def id_to_token(self, i: int) -> str | None:
        """The token with this id as the vocabulary writes it, or None where the id is not used."""
        return self.backend.id_to_token(int(i)) if 0 <= i < 1 << 32 else None

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it, or None."""
        return self.backend.token_to_id(token)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the greatest id in use; a model's own table may be longer, padded."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def decoding_steps(self) -> Sequence[Mapping[str, Any]]:
        """The decoder's steps as ``tokenizer.json`` has them, sequences flattened; none where it has no decoder."""
        decoder = self.backend.decoder
        return [] if decoder is None else _flattened(json.loads(decoder.__getstate__()))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that ``skip_special_tokens`` leaves out."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def _role_id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self.token_to_id(text)

    @cached_property
    def bos_id(self) -> int | None:
        """The token that begins a sequence, or None."""
        return self._role_id("bos_token")

    @cached_property
    def eos_id(self) -> int | None:
        """The token that ends a sequence, or None."""
        return self._role_id("eos_token")

    @cached_property
    def pad_id(self) -> int | None:
        """The token that fills a batch, or None."""
        return self._role_id("pad_token")

    @cached_property
    def unk_id(self) -> int | None:
        """The token for what the vocabulary does not cover, or None."""
        return self._role_id("unk_token")

    @property
    def chat_template(self) -> str | None:
        """The template for plain chat, or None where the model has none."""
        return self.chat_templates.get("default")


def _flattened(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step["decoders"] for inner in _flattened(part)]
