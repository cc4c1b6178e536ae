"""How the next token is chosen: the options, their defaults and their limits."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

import numpy as np

from relax_llm.errors import InputError


class SamplingOverrides(TypedDict, total=False):
    """What a caller may say about sampling, one keyword each: see `SamplingOptions`."""

    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    logprobs: int | None


LOWEST_TEMPERATURE = 1e-4
"""Below this a division could leave float32's range; 0 is the way to ask for greedy."""

LARGEST = float(np.finfo(np.float32).max)

TRANSFORMERS_TOP_K = 50
"""What transformers takes for top_k where a sampling generation config does not name one."""


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose a token from logits. The defaults are greedy decoding.

    The steps and their order are those of transformers: logit bias, repetition penalty, then (ours) presence
    and frequency penalty, and when sampling temperature, top-k, top-p, min-p.

    Attributes:
        temperature: 0 is greedy: the most likely token. Above 0, the logits are divided by it and a token is
            drawn.
        top_k: Draw from the k most likely tokens (and those as likely as the k-th). 0 is off.
        top_p: Draw from the smallest set of most likely tokens whose probability reaches this. 1 is off.
        min_p: Draw from tokens at least this fraction as likely as the most likely one. 0 is off.
        repetition_penalty: For tokens that the prompt or the answer contains, a positive logit is divided by
            it and a negative one multiplied (Keskar et al., CTRL, 2019). 1 is off.
        presence_penalty: Subtracted from the logit of every token the answer contains (as OpenAI defines it).
        frequency_penalty: Subtracted once for each time the answer contains the token (as OpenAI defines it).
        logit_bias: Token id to a number that is added to its logit; -inf forbids a token.
        seed: Seed of the draws. None draws differently each time.
        logprobs: None computes no log-probabilities. 0 gives that of each chosen token, n adds those of the n
            most likely tokens; always under the model's own distribution, before any of the options above.

    Raises:
        InputError: A value is outside its limits.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            object.__setattr__(self, name, _finite(name, getattr(self, name)))
        object.__setattr__(self, "top_k", _count("top_k", self.top_k))
        if self.seed is not None:
            object.__setattr__(self, "seed", _count("seed", self.seed))
        if self.logprobs is not None:
            object.__setattr__(self, "logprobs", _count("logprobs", self.logprobs))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.temperature != 0 and self.temperature < LOWEST_TEMPERATURE:
            raise InputError(
                f"temperature is {self.temperature:g}; it must be 0 (greedy) or at least "
                f"{LOWEST_TEMPERATURE:g}."
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p:g}; it must be above 0 and at most 1 (1 turns it off).")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p:g}; it must be between 0 (off) and 1.")
        if self.repetition_penalty <= 0:
            raise InputError(
                f"repetition_penalty is {self.repetition_penalty:g}; it must be above 0 (1 turns it off)."
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen, so that nothing is drawn."""
        return self.temperature == 0

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any], **overrides: Any) -> SamplingOptions:
        """The options a checkpoint's generation config asks for, with the caller's own on top.

        As in transformers, the config's temperature, top_k, top_p and min_p count only where `do_sample` is
        true, in the config or said by the caller, and then a top_k that is not named is 50. Where it is not
        true, a temperature above 0, a top_k, a top_p or a min_p from the caller turns sampling on, with the
        caller's values alone. The repetition penalty counts either way.

        Args:
            config: The fields of `generation_config.json`; may be empty.
            **overrides: Fields of `SamplingOptions`, and `do_sample`. None leaves the matter to the config.

        Raises:
            InputError: A value is outside its limits, or a name is not known.
        """
        said = {name: value for name, value in overrides.items() if value is not None}
        _refuse_unknown(said)
        do_sample = _do_sample(said)
        given = {name: config[name] for name in _CONFIG_FIELDS if config.get(name) is not None}
        defaults = {name: given.pop(name) for name in ["repetition_penalty"] if name in given}
        if do_sample or (do_sample is None and config.get("do_sample") is True):
            defaults |= {"temperature": 1.0, "top_k": TRANSFORMERS_TOP_K, **given}
        elif _asks_for_sampling(said):
            defaults |= {"temperature": 1.0}
        defaults = {name: value for name, value in defaults.items() if name not in said}
        try:
            cls(**defaults)
        except InputError as error:
            raise InputError(
                f"The checkpoint's generation config cannot be followed: {error} Pass a value of your own."
            ) from error
        return cls(**{**defaults, **said})


_CONFIG_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def _do_sample(said: dict[str, Any]) -> bool | None:
    """Take `do_sample` out of what the caller said, refusing what contradicts it."""
    do_sample = said.pop("do_sample", None)
    if do_sample is not None and not isinstance(do_sample, bool):
        raise InputError(f"do_sample is {do_sample!r}; it must be true or false.")
    if do_sample is True and said.get("temperature") == 0:
        raise InputError("do_sample is true and temperature is 0, which is greedy: leave one of them out.")
    if do_sample is False and _asks_for_sampling(said):
        raise InputError(
            "do_sample is false, but one of temperature, top_k, top_p and min_p asks for sampling: choose."
        )
    return do_sample


def _asks_for_sampling(said: Mapping[str, Any]) -> bool:
    if "temperature" in said:
        return bool(said["temperature"] != 0)
    off = {"top_k": 0, "top_p": 1, "min_p": 0}
    return any(said.get(name, neutral) != neutral for name, neutral in off.items())


def _refuse_unknown(said: Mapping[str, Any]) -> None:
    known = [option.name for option in fields(SamplingOptions)] + ["do_sample"]
    for name in said:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the options are {', '.join(sorted(known))}."
            raise InputError(f"There is no option {name!r}; {hint}")


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        raise InputError(f"{name} is {value!r}; it must be a number.")
    number = float(value)
    if not abs(number) <= LARGEST:
        raise InputError(f"{name} is {number}; it must be a finite number that float32 can hold.")
    if name == "temperature" and number < 0:
        raise InputError(f"temperature is {number:g}; it must be 0 (greedy) or above.")
    return number


def _count(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0 or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; it must be a whole number, 0 or above.")
    return number


def _biases(logit_bias: object) -> dict[int, float]:
    if not isinstance(logit_bias, Mapping):
        raise InputError(
            f"logit_bias is {logit_bias!r}; it must map token ids to numbers, as in {{42: -1.5}}."
        )
    biases: dict[int, float] = {}
    for token_id, bias in logit_bias.items():
        if isinstance(bias, bool | np.bool_) or not isinstance(bias, int | float | np.number):
            raise InputError(f"logit_bias of token {token_id!r} is {bias!r}; it must be a number.")
        if bias != -math.inf and not abs(bias) <= LARGEST:
            raise InputError(
                f"logit_bias of token {token_id!r} is {bias}; it must be a number that float32 can hold, or "
                "-inf to forbid the token."
            )
        biases[_count("a token id in logit_bias", token_id)] = float(bias)
    return biases
