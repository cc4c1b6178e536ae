"""The options that several commands share, each declared once, and what is made of them."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relax_llm.errors import InputError

if TYPE_CHECKING:
    from relax_llm.tracing import limits

_MODEL, _SAMPLING, _LENGTH = "Model", "Choosing tokens", "Ending the answer"
_DRAFTS, _RUN, _OUTPUT = "Drafting tokens", "Run", "Output"

Subject = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="An artifact, or a checkpoint, which is compiled by way of the cache; by default SmolLM2.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A compiled artifact, a Hugging Face directory, a GGUF file or a hub id; by default SmolLM2.",
        rich_help_panel=_MODEL,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FORMAT",
        help="How matrices are stored: f32, bf16, f16, q8, q6, q4, q4s, or auto: as in the checkpoint; and otherwise "
        "at some sites: q4,embed_tokens=q4s.",
        rich_help_panel=_MODEL,
    ),
]
KVCache = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        metavar="FORMAT",
        help="How keys and values are stored: f32, bf16, q8, or auto: f32 beside weights in f32, q8 beside those in q4 "
        "or q4s, else bf16.",
        rich_help_panel=_MODEL,
    ),
]
Architecture = Annotated[
    str | None,
    typer.Option(
        "--architecture",
        metavar="FILE",
        help="A Python file with your own architecture, or the name of a built-in one.",
        rich_help_panel=_MODEL,
    ),
]
Kernels = Annotated[
    list[str] | None,
    typer.Option(
        "--kernels",
        metavar="FILE",
        help="A Python file with kernels of yours; may be repeated.",
        rich_help_panel=_MODEL,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="NAME",
        help="Processor to compile for, such as x86-64-v3, or cuda; by default this one.",
        rich_help_panel=_MODEL,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        help="Threads that kernels use; by default all cores.",
        rich_help_panel=_MODEL,
    ),
]

Temperature = Annotated[
    float | None,
    typer.Option("--temperature", "-t", metavar="X", help="0 is greedy.", rich_help_panel=_SAMPLING),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k", metavar="K", help="Draw from the K most likely tokens.", rich_help_panel=_SAMPLING
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        help="Draw from the most likely tokens that reach P.",
        rich_help_panel=_SAMPLING,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        metavar="P",
        help="Leave out tokens less than P times the likeliest.",
        rich_help_panel=_SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        metavar="X",
        help="Divide logits of tokens seen; 1 is off.",
        rich_help_panel=_SAMPLING,
    ),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option(
        "--presence-penalty",
        metavar="X",
        help="Subtract for tokens in the answer.",
        rich_help_panel=_SAMPLING,
    ),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(
        "--frequency-penalty",
        metavar="X",
        help="Subtract for each time in the answer.",
        rich_help_panel=_SAMPLING,
    ),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias",
        metavar="ID=VALUE",
        help="Add to a token's logit; -inf forbids it. Repeatable.",
        rich_help_panel=_SAMPLING,
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Seed of the draws.", rich_help_panel=_SAMPLING)
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        "-n",
        metavar="N",
        help="The most tokens; by default 256.",
        rich_help_panel=_LENGTH,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop", metavar="TEXT", help="Text that ends the answer. Repeatable.", rich_help_panel=_LENGTH
    ),
]
StopToken = Annotated[
    list[int] | None,
    typer.Option(
        "--stop-token",
        metavar="ID",
        help="Token that ends it, in place of the model's own. Repeatable.",
        rich_help_panel=_LENGTH,
    ),
]
PromptLookup = Annotated[
    int | None,
    typer.Option(
        "--prompt-lookup",
        metavar="N",
        help="Draft up to N tokens that followed the last ones before; the answer stays the same.",
        rich_help_panel=_DRAFTS,
    ),
]
PromptLookupNgram = Annotated[
    int | None,
    typer.Option(
        "--prompt-lookup-ngram",
        metavar="N",
        help="Look up the last N tokens, or fewer; by default 3.",
        rich_help_panel=_DRAFTS,
    ),
]
Beside = Annotated[
    list[str] | None,
    typer.Option(
        "--beside",
        metavar="MODEL",
        help="Another artifact or checkpoint, which takes turns with the model; may be repeated.",
        rich_help_panel=_RUN,
    ),
]
ANEW = "anew"
Limits = Annotated[
    str | None,
    typer.Option(
        "--limits",
        metavar="GFLOPS,GBS",
        help=f'What this machine can do, in GFLOP/s and GB/s; "{ANEW}" measures again. By default what was measured '
        "last; bench measures in every round.",
        rich_help_panel=_OUTPUT,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel=_OUTPUT)]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of what goes wrong.", rich_help_panel=_OUTPUT)
]


def limits_given(text: str | None) -> "limits.Limits | None":
    """The limits that `--limits` says; None where they are to be measured, or were.

    Raises:
        InputError: It says something else.
    """
    from relax_llm.tracing.limits import parse

    return None if text is None or text == ANEW else parse(text)


def generation_options(
    *,
    max_new_tokens: int | None,
    stop: Iterable[str] | None,
    stop_token: Iterable[int] | None,
    logit_bias: Iterable[str] | None,
    prompt_lookup: int | None,
    prompt_lookup_ngram: int | None,
    **sampling: Any,
) -> dict[str, Any]:
    """The keywords of `Runner.stream`, checked now: a mistake must not come out after a minute of compiling.

    Raises:
        InputError: A value is outside its limits.
    """
    from relax_llm.runtime.sampling_options import SamplingOptions
    from relax_llm.runtime.stopping import StopStrings

    said = {**sampling, "logit_bias": _biases(logit_bias or ()) or None}
    options: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    SamplingOptions(**options)
    if max_new_tokens is not None:
        if max_new_tokens < 1:
            raise InputError(f"--max-new-tokens is {max_new_tokens}; it must be 1 or above.")
        options["max_new_tokens"] = max_new_tokens
    if prompt_lookup is not None:
        if prompt_lookup < 0:
            raise InputError(f"--prompt-lookup is {prompt_lookup}; it must be 0 (off) or above.")
        options["prompt_lookup"] = prompt_lookup
    if prompt_lookup_ngram is not None:
        if prompt_lookup_ngram < 1:
            raise InputError(f"--prompt-lookup-ngram is {prompt_lookup_ngram}; it must be 1 or above.")
        if not prompt_lookup:
            raise InputError("--prompt-lookup-ngram says how drafts are found; add --prompt-lookup N.")
        options["prompt_lookup_ngram"] = prompt_lookup_ngram
    if stop:
        StopStrings(list(stop))
        options["stop"] = list(stop)
    if stop_token:
        options["stop_tokens"] = list(stop_token)
    return options


def _biases(pairs: Iterable[str]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for pair in pairs:
        token_id, _, value = pair.partition("=")
        try:
            token, bias = int(token_id), float(value)
        except ValueError:
            raise InputError(
                f"--logit-bias {pair!r} must be a token id and a number, such as 42=-1.5."
            ) from None
        if math.isnan(bias):
            raise InputError(f"--logit-bias {pair!r}: the number must not be NaN.")
        if token in biases:
            raise InputError(f"--logit-bias names token {token} twice.")
        biases[token] = bias
    return biases
