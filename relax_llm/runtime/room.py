"""Whether a context holds what is to come, before anything is run."""

from typing import TYPE_CHECKING

from relax_llm.errors import ContextLengthError

if TYPE_CHECKING:
    from relax_llm.runtime.runner import Runner


def require_room(runner: "Runner", tokens: int, more: int) -> None:
    """Refuse a prompt and what follows it, where they do not fit.

    Args:
        runner: Whose context it is.
        tokens: Of the prompt.
        more: Tokens decoded behind it.

    Raises:
        ContextLengthError: They are too many.
    """
    if tokens + more > runner.context_length:
        raise ContextLengthError(
            f"{tokens} tokens and {more} more do not fit into a context of {runner.context_length}."
        )
