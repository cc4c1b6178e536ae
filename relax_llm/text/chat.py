"""Chat messages to the text a model was trained on, by the template that comes with the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relax_llm.errors import TokenizerError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    bos_token: str | None = None,
    eos_token: str | None = None,
    **variables: Any,
) -> str:
    """Renders a conversation with a chat template, as ``transformers`` does.

    The template runs in a sandbox with bounded steps, time and sizes: see `relax_llm.text.sandbox`.

    Args:
        template: Jinja source.
        messages: One mapping a message, with ``role`` and ``content``.
        add_generation_prompt: End with the beginning of the assistant's answer.
        bos_token: Text of the token that begins a sequence; None where the model has none.
        eos_token: Text of the token that ends one; None where the model has none.
        **variables: Whatever else the template reads: ``tools``, ``documents``, ``enable_thinking``.

    Raises:
        TokenizerError: The template has a syntax error (with its line), refuses these messages (with its own
            words), fails, or goes beyond the sandbox's bounds; or a message holds more than plain data.
    """
    import jinja2  # chat is one use of many, and Jinja takes longer to import than everything else here

    from relax_llm.text.sandbox import compile_template, limited_rendering, plain_data

    special = {"bos_token": bos_token, "eos_token": eos_token}
    given = {name: token for name, token in special.items() if token is not None} | variables
    given |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
    given.setdefault("tools", None)
    given.setdefault("documents", None)
    values = {name: plain_data(name, value) for name, value in given.items()}
    try:
        with limited_rendering():
            return compile_template(template).render(values)
    except jinja2.TemplateSyntaxError as error:
        where, why = error.lineno, _sentence(error)
        raise TokenizerError(f"The chat template has a syntax error in line {where}: {why}") from error
    except jinja2.exceptions.SecurityError as error:
        raise TokenizerError(f"The chat template does what no template may do: {_sentence(error)}") from error
    except jinja2.UndefinedError as error:
        raise TokenizerError(f"The chat template reads what it was not given: {_sentence(error)}") from error
    except jinja2.TemplateError as error:
        raise TokenizerError(f"The chat template refuses this conversation: {error}") from error
    except RecursionError as error:
        raise TokenizerError(
            "The chat template is nested too deeply, or calls itself without end."
        ) from error
    except Exception as error:  # a template can raise anything: it computes with what it is given
        raise TokenizerError(
            f"The chat template failed with {type(error).__name__}: {_sentence(error)}"
        ) from error


def _sentence(error: Exception) -> str:
    return (getattr(error, "message", None) or str(error)).rstrip(".") + "."
