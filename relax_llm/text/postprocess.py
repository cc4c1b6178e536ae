"""The tokens that go around every encoded sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import processors

from relax_llm.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers


def add_bos_eos(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Lets ``backend`` put these tokens (None: no such token) around every sequence it encodes.

    Args:
        backend: Its post-processor is replaced where there is a token.
        bos: Text of the token in front.
        eos: Text of the token behind.

    Raises:
        TokenizerError: A token is not in the vocabulary.
    """
    around = [token for token in (bos, eos) if token is not None]
    if not around:
        return
    ids = {token: backend.token_to_id(token) for token in around}
    for token, i in ids.items():
        if i is None:
            raise TokenizerError(
                f"The token {token!r} should be put around text, but the vocabulary lacks it."
            )

    def template(part: str, type_id: int) -> list[str]:
        named = [bos, part, eos]
        return [f"{item}:{type_id}" for item in named if item is not None]

    try:
        backend.post_processor = processors.TemplateProcessing(
            single=template("$A", 0),
            pair=template("$A", 0) + template("$B", 1),
            special_tokens=list(ids.items()),
        )
    except ValueError as error:
        raise TokenizerError(f"The tokens {around} cannot be put around text: {error}.") from error
