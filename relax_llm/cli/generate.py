"""`relax-llm generate`: continue a prompt."""

import re
import sys
from typing import Annotated

import typer

from relax_llm.cli import answers, options as o, screen
from relax_llm.cli.models import check_threads, named_or_default, open_artifact, start_runner
from relax_llm.errors import InputError


def generate(
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help="The text to continue; - reads it from standard input.",
            show_default=False,
        ),
    ],
    model: o.Model = None,
    weights: o.Weights = None,
    kv_cache: o.KVCache = None,
    architecture: o.Architecture = None,
    kernels: o.Kernels = None,
    target: o.Target = None,
    threads: o.Threads = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    presence_penalty: o.PresencePenalty = None,
    frequency_penalty: o.FrequencyPenalty = None,
    logit_bias: o.LogitBias = None,
    seed: o.Seed = None,
    max_new_tokens: o.MaxNewTokens = None,
    stop: o.Stop = None,
    stop_token: o.StopToken = None,
    prompt_lookup: o.PromptLookup = None,
    prompt_lookup_ngram: o.PromptLookupNgram = None,
    ids: Annotated[bool, typer.Option("--ids", help="PROMPT is token ids, such as '1, 2, 3'.")] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            "--logprobs",
            metavar="N",
            help="Log-probabilities of each token and of the N likeliest in its place.",
            rich_help_panel="Output",
        ),
    ] = None,
    timings: Annotated[
        bool | None,
        typer.Option(
            "--timings/--no-timings",
            help="Print what it cost, on standard error; by default on a terminal.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Continue a prompt, printing text as it comes.

    A checkpoint is compiled when it is first used; later runs take it from the cache.
    """
    model, prompt = _model_and_prompt(texts, model)
    check_threads(threads)
    options = o.generation_options(
        max_new_tokens=max_new_tokens,
        stop=stop,
        stop_token=stop_token,
        logit_bias=logit_bias,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        prompt_lookup=prompt_lookup,
        prompt_lookup_ngram=prompt_lookup_ngram,
        logprobs=logprobs,
    )
    if prompt == "-":
        prompt = _standard_input()
    if not prompt:
        raise InputError("The prompt is empty; give some text.")
    given = answers.parse_ids(prompt) if ids else prompt
    model = named_or_default(model)
    artifact = open_artifact(
        model, weights=weights, kv_cache=kv_cache, architecture=architecture, kernels=kernels, target=target
    )
    if artifact.tokenizer is None and not ids:
        raise InputError(
            f"{model} has no tokenizer, so there is no text to continue; give token ids with --ids."
        )
    runner = start_runner(artifact, threads)
    progress = answers.PromptProgress()
    try:
        pieces = runner.stream(given, progress=progress, **options)
        received = list(pieces) if json else answers.show(pieces, as_ids=artifact.tokenizer is None)
    finally:
        progress.close()

    from relax_llm.runtime.answer import Generation

    generation = Generation.of(received)
    if json:
        screen.json_document(
            {"model": model, "prompt": given, **answers.as_data(generation, artifact.tokenizer)}
        )
    elif logprobs is not None:
        answers.show_logprobs(generation, artifact.tokenizer)
    if answers.timings_wanted(timings):
        answers.show_timings(generation.timings, generation.finish_reason)


def _model_and_prompt(texts: list[str], model: str | None) -> tuple[str | None, str]:
    if len(texts) == 1:
        return model, texts[0]
    if len(texts) == 2 and model is None:
        return texts[0], texts[1]
    if len(texts) == 2:
        raise InputError(f"The model is named twice, as {texts[0]} and with --model; name it once.")
    raise InputError(f"There are {len(texts)} texts; put the prompt in quotes, so that it is one.")


def _standard_input() -> str:
    """All of standard input, without the line break that `echo` puts at its end.

    Raises:
        InputError: It is not UTF-8.
    """
    if sys.stdin is None:
        raise InputError("The prompt was to be read from standard input, which is closed.")
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"Standard input is not UTF-8 text: byte {error.start} cannot be decoded.") from None
    return re.sub(r"\r?\n\Z", "", text)
