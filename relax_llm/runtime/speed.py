"""How fast a model is: prompts of some lengths, and tokens decoded behind them, beside what the machine can do."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from relax_llm.errors import InputError
from relax_llm.progress import Progress, Silent
from relax_llm.runtime.room import require_room
from relax_llm.table import Table, html
from relax_llm.tracing.least import least_seconds
from relax_llm.tracing.limits import Limits

if TYPE_CHECKING:
    from relax_llm.runtime.runner import Runner

LENGTHS = (16, 64, 256, 1024)
DECODES = 16
_MOVED = 1.4  # times as long as a loop took before: cores are further apart

Times = tuple[list[float], list[float]]
"""Seconds of prompts, and of a token behind them, in each round."""


@dataclass(frozen=True)
class Speed:
    """What was measured at one length of the prompt.

    Attributes:
        length: Tokens of the prompt.
        prefill: Seconds from the prompt to the first token, in each round.
        decode: Seconds of a token behind it, in each round; empty where none was decoded.
        least_prefill: Seconds that the machine would take for the prompt at best.
        least_decode: Likewise for a token behind it.
    """

    length: int
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    least_prefill: float
    least_decode: float

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt in a second, the median."""
        return self.length / median(self.prefill)

    @property
    def decode_rate(self) -> float:
        """Tokens decoded in a second, the median."""
        return 1 / median(self.decode)


class Speeds(tuple[Speed, ...]):
    """Speeds by length, which show themselves as a table.

    Attributes:
        limits: What the machine can do, the median of the rounds.
        rounds: What it could do as each round began; empty where limits were given.
    """

    limits: Limits
    rounds: tuple[Limits, ...]

    @staticmethod
    def of(found: Sequence[Speed], limits: Limits, rounds: Sequence[Limits] = ()) -> "Speeds":
        """Some speeds, and the limits that they are compared with."""
        made = Speeds(found)
        made.limits, made.rounds = limits, tuple(rounds)
        return made

    @property
    def places(self) -> list[tuple[int, ...]]:
        """Rounds by where the cores were: one group, or two where a loop took clearly longer in some than in others."""
        order = sorted(range(len(self.rounds)), key=lambda number: self.rounds[number].loop)
        steps = [
            (self.rounds[there].loop / self.rounds[here].loop, cut)
            for cut, (here, there) in enumerate(pairwise(order), 1)
            if self.rounds[here].loop
        ]
        ratio, cut = max(steps, default=(1.0, 0))
        groups = [order[:cut], order[cut:]] if ratio > _MOVED else [order]
        return [tuple(sorted(group)) for group in groups]

    @property
    def headline(self) -> str:
        """How often it was measured, and what the machine can do."""
        rounds = len(self[0].prefill)
        times = "Measured once" if rounds == 1 else f"Medians of {rounds} rounds"
        return f"{times}, in tokens a second. This machine can do {self.limits}."

    def table(self) -> Table:
        """One row for each length."""
        rows = [
            (
                str(speed.length),
                f"{median(speed.prefill) * 1e3:.2f}",
                f"{speed.prefill_rate:.0f}",
                f"{speed.least_prefill / median(speed.prefill):.0%}",
                *(
                    (
                        f"{median(speed.decode) * 1e3:.2f}",
                        f"{speed.decode_rate:.1f}",
                        f"{speed.least_decode / median(speed.decode):.0%}",
                    )
                    if speed.decode
                    else ("", "", "")
                ),
            )
            for speed in self
        ]
        header = ("prompt", "ms", "tokens/s", "of limit", "decode ms", "tokens/s", "of limit")
        return Table(header, rows, frozenset(range(len(header))))

    def beside(self, first: "Speeds", rounds: Collection[int] | None = None) -> Table:
        """How many times as fast this is as a model that it took turns with: medians of the ratios within rounds.

        Args:
            first: The other model.
            rounds: Those that count, by default all: see `places`.
        """

        def times(those: Sequence[float], these: Sequence[float]) -> str:
            ratios = [
                one / other
                for number, (one, other) in enumerate(zip(those, these, strict=True))
                if rounds is None or number in rounds
            ]
            return f"{median(ratios):.3f}x" if ratios else ""

        rows = [
            (str(speed.length), times(other.prefill, speed.prefill), times(other.decode, speed.decode))
            for other, speed in zip(first, self, strict=True)
        ]
        return Table(("prompt", "prefill", "decode"), rows, frozenset(range(3)))

    def __str__(self) -> str:
        return f"{self.headline}\n\n{self.table()}"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html(self.headline, [self.table()])


def measure(
    runner: "Runner",
    lengths: Sequence[int] = LENGTHS,
    *,
    decodes: int = DECODES,
    rounds: int = 5,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> Speeds:
    """Run prompts of random tokens, decode the likeliest ones behind each, and take the times, as `stream` gives them.

    Every length has its turn in each round, so that what else the machine does meets all of them. A round before the
    first, which warms up, does not count.

    Args:
        runner: Of the model.
        lengths: Tokens of the prompts.
        decodes: Tokens decoded behind each; their mean is what counts.
        rounds: How often.
        limits: What the machine can do; by default that is measured in every round.
        progress: Where to report to.

    Raises:
        InputError: A number is below 1 (`decodes`: below 0), or there is no length.
        ContextLengthError: A length and the tokens behind it do not fit into the context.
    """
    (found,) = in_turns([runner], lengths, decodes=decodes, rounds=rounds, limits=limits, progress=progress)
    return found


def turns(count: int, number: int) -> list[int]:
    """Who comes after whom in a round: all move up by one from round to round."""
    return [(turn + number) % count for turn in range(count)]


def in_turns(
    runners: Sequence["Runner"],
    lengths: Sequence[int] = LENGTHS,
    *,
    decodes: int = DECODES,
    rounds: int = 5,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> list[Speeds]:
    """As `measure`, for several models, all of which answer a prompt before the next one, in another order each round.

    Args and errors are those of `measure`.

    Returns:
        The speeds of each model. What `Speeds.beside` makes of two of them is to be trusted, where a ratio of medians
        that were measured one after the other is mostly that of the machine's moods.
    """
    if not lengths or min(lengths) < 1 or rounds < 1 or decodes < 0:
        raise InputError(
            "Lengths and rounds must be 1 or above, and the tokens decoded behind them 0 or above."
        )
    for runner in runners:
        require_room(runner, max(lengths), decodes)
    measured: list[Limits] = []
    random, vocabulary = np.random.default_rng(0), min(runner.vocab_size for runner in runners)
    taken: list[dict[int, Times]] = [{length: ([], []) for length in lengths} for _ in runners]
    with (progress or Silent()).task("Measuring", (rounds + 1) * len(lengths) * len(runners)) as advance:
        for number in range(rounds + 1):
            if number and limits is None:
                measured.append(runners[0].limits(anew=True))
            for length in taken[0]:
                ids = random.integers(0, vocabulary, length).tolist()
                for who in turns(len(runners), number):
                    first, rest = _answer(runners[who], ids, decodes)
                    if number:
                        prefill, decode = taken[who][length]
                        prefill.append(first)
                        decode += [rest / decodes] if decodes else []
                    advance(1)
    middle = limits or Limits.middle(measured)
    return [
        Speeds.of(_speeds(runner, times, decodes, middle), middle, measured)
        for runner, times in zip(runners, taken, strict=True)
    ]


def _speeds(runner: "Runner", taken: Mapping[int, Times], decodes: int, limits: Limits) -> list[Speed]:
    """What was measured of a model, beside the least that it could take."""
    manifest = runner.artifact.manifest
    found = []
    for length, (prefill, decode) in taken.items():
        prompt = {"batch": 1, "seq": length, "kv_len": length}
        token = {"batch": 1, "seq": 1, "kv_len": length + (decodes + 1) // 2}
        found.append(
            Speed(
                length,
                tuple(prefill),
                tuple(decode),
                least_seconds(manifest, manifest.greedy_function(length), prompt, limits),
                least_seconds(manifest, manifest.greedy_function(1), token, limits),
            )
        )
    return found


def _answer(runner: "Runner", token_ids: list[int], decodes: int) -> tuple[float, float]:
    """Seconds to the first token, and of those behind it together."""
    begun = time.perf_counter()
    stamps = [
        time.perf_counter()
        for _ in runner.stream(token_ids, max_new_tokens=1 + decodes, temperature=0, stop_tokens=[])
    ]
    return stamps[0] - begun, stamps[-1] - stamps[0]
