"""Questions about the sizes of a launch, as people write them: "M = 17", "seq = 1, kv_len > 300", "M = 1..8"."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from relax_llm.errors import InputError

SIZES = ("batch", "seq", "kv_len", "M")
"""The sizes that can be asked for."""

_COMPARISONS: Mapping[str, Callable[[int, int], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_TERM = re.compile(r"\s*(\w+)\s*(==|!=|<=|>=|=|<|>)\s*(\d{1,18})(?:\s*\.\.\s*(\d{1,18}))?\s*")


@dataclass(frozen=True)
class SizeCondition:
    """What sizes must be.

    Attributes:
        text: As it was written.
        terms: Name, comparison and number of each part; all must hold.
    """

    text: str
    terms: tuple[tuple[str, str, int], ...]

    @staticmethod
    def parse(text: str) -> "SizeCondition":
        """Read what a person wrote: comparisons, with commas or "and" between.

        Raises:
            InputError: It is none, or asks for a size that launches do not have.
        """
        terms: list[tuple[str, str, int]] = []
        for part in re.split(r",|\band\b", text):
            found = _TERM.fullmatch(part)
            if found is None or (found[4] and found[2] not in ("=", "==")):
                raise InputError(
                    f"{text!r} is no condition on sizes; write M=17, kv_len>300, M=1..8, or several with commas."
                )
            name, comparison, number, last = found.groups()
            if name not in SIZES:
                raise InputError(
                    f"A launch has no size {name!r} to ask for in {text!r}; there are: {', '.join(SIZES)}."
                )
            if last is None:
                terms.append((name, comparison, int(number)))
            else:
                terms += [(name, ">=", int(number)), (name, "<=", int(last))]
        return SizeCondition(text, tuple(terms))

    @property
    def names(self) -> frozenset[str]:
        """The sizes it asks for."""
        return frozenset(name for name, _, _ in self.terms)

    def __call__(self, sizes: Mapping[str, int]) -> bool:
        """Whether these sizes are so; a size that is not among them is not."""
        return all(
            name in sizes and _COMPARISONS[comparison](sizes[name], number)
            for name, comparison, number in self.terms
        )
