"""How often a problem is launched at each size: what the expected time of a plan is an expectation over."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from relax_llm.errors import InputError

LARGEST = 4096
"""Sizes up to here are each considered; beyond, only what a histogram names and one size for all the rest."""

_FURTHEST = 2**24
_EVERYWHERE = 0.01
"""The part of every histogram that is spread over all sizes, so that none is served badly for not being in it."""

Vector = npt.NDArray[np.float64]
Given = str | os.PathLike[str] | Mapping[int, float] | None


@dataclass(frozen=True)
class Distribution:
    """Sizes and their weights.

    Attributes:
        weights: By M; they sum to 1.
        of: What they are shares of: the number of launches, or the time spent in them.
        text: How a person would say it.
    """

    weights: Mapping[int, float]
    of: Literal["launches", "time"]
    text: str

    def sizes(self) -> npt.NDArray[np.int64]:
        """The sizes to choose kernels for, ascending: each up to `LARGEST`, named ones above, and one beyond all."""
        above = {size for size in self.weights if size > LARGEST}
        beyond = 2 * max([LARGEST, *above])
        return np.array([*range(1, LARGEST + 1), *sorted(above), beyond], np.int64)

    def over(self, sizes: npt.NDArray[np.int64], best: Vector) -> Vector:
        """Weights such that their product with seconds, summed over sizes, is proportional to the expected time.

        Args:
            sizes: What `sizes` gave, [S].
            best: Seconds of the fastest kernel at each, [S]; what turns shares of time into numbers of launches.

        Returns:
            [S]; with `best`, they sum to 1.
        """
        given = np.array([self.weights.get(int(size), 0.0) for size in sizes])
        launches = given if self.of == "launches" else given / best
        spread = np.diff(np.log(np.append(sizes, 2 * sizes[-1]))) / best
        total = (1 - _EVERYWHERE) * launches / (launches @ best)
        return np.asarray(total + _EVERYWHERE * spread / (spread @ best))


def default() -> Distribution:
    """Half of the time in launches of one row, as in decoding; the other half spread over the logarithm of M."""
    steps = {size: math.log((size + 1) / size) for size in range(2, LARGEST + 1)}
    total = sum(steps.values())
    text = f"half of the time at M=1, half log-uniform over M=2..{LARGEST}"
    return Distribution({1: 0.5, **{size: 0.5 * step / total for size, step in steps.items()}}, "time", text)


def distribution(given: Given) -> Distribution:
    """What a user says about sizes.

    Args:
        given: None for the default; numbers of launches by M, as a mapping, as text such as "1:0.9,64:0.1", or as the
            path of a JSON file with an object such as {"1": 900, "64": 100}. Only their proportions count.

    Raises:
        InputError: It is not a histogram; the message says what is wrong.
    """
    if given is None:
        return default()
    if isinstance(given, Mapping):
        return _counted(given.items(), "The histogram")
    text = os.fspath(given)
    if isinstance(given, str) and ":" in text and not Path(text).is_file():
        return _counted((_split(part, text) for part in text.split(",")), f"The histogram {text!r}")
    try:
        data = json.loads(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"The histogram {text} cannot be read: {error.strerror}; give a JSON file, or numbers such as "
            "1:0.9,64:0.1."
        ) from error
    except ValueError as error:
        raise InputError(f"The histogram {text} is not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise InputError(f'The histogram {text} must be a JSON object such as {{"1": 900, "64": 100}}.')
    return _counted(data.items(), f"The histogram {text}")


def _split(part: str, text: str) -> tuple[str, str]:
    size, colon, weight = part.partition(":")
    if not colon:
        raise InputError(f"The histogram {text!r} has {part!r}, which is not M:WEIGHT, such as 64:0.1.")
    return size, weight


def _counted(items: Any, origin: str) -> Distribution:
    weights: dict[int, float] = {}
    for key, value in items:
        size, weight = _size(key, origin), _weight(key, value, origin)
        if size in weights:
            raise InputError(f"{origin} has M={size} twice.")
        weights[size] = weight
    total = sum(weights.values())
    if not total > 0:
        raise InputError(f"{origin} has no weight above 0.")
    shares = {size: weight / total for size, weight in sorted(weights.items()) if weight > 0}
    shown = [f"{share:.3g} at M={size}" for size, share in shares.items()]
    more = f", and {len(shown) - 6} more sizes" if len(shown) > 6 else ""
    return Distribution(shares, "launches", f"of the launches {', '.join(shown[:6])}{more}")


def _size(key: Any, origin: str) -> int:
    text = str(key).strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and 1 <= int(text) <= _FURTHEST):
        raise InputError(
            f"{origin} has the size {text!r}; sizes are whole numbers of rows, from 1 to {_FURTHEST}."
        )
    return int(text)


def _weight(key: Any, value: Any, origin: str) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if isinstance(value, bool) or not (0 <= weight < math.inf):
        raise InputError(f"{origin} gives M={key} the weight {value!r}; weights are numbers, 0 or above.")
    return weight
