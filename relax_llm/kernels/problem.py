"""What a kernel must solve, as data. Problems travel through the compiler as an attribute of their PrimFunc."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from tvm.tirx import PrimFunc

from relax_llm.errors import KernelError

ATTRIBUTE = "relax_llm.problem"
_SHORT = {"heads": "h", "kv_heads": "kv", "head_dim": "d"}
_OPERATORS: dict[str, type["Problem"]] = {}


@dataclass(frozen=True)
class Problem:
    """One operator with everything about it that is known at compile time; sizes of activations stay symbolic.

    Subclasses are frozen dataclasses of plain values and name their operator. Two sites with equal problems share
    their kernels.
    """

    operator: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _OPERATORS[cls.operator] = cls

    @property
    def name(self) -> str:
        """A symbol for this problem: the operator and every field that is not at its default.

        Numbers keep nine digits, as many as tell f32 values apart; a list is named by a digest.
        """
        parts = [self.operator]
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default or value is None:
                continue
            if isinstance(value, bool):
                parts.append(field.name if value else f"no_{field.name}")
            elif isinstance(value, int | float):
                number = f"{value:.9g}".replace(".", "p").replace("-", "m").replace("+", "")
                parts.append(f"{_SHORT.get(field.name, field.name)}{number}")
            elif isinstance(value, str):
                parts.append(value)
            elif isinstance(value, Problem):
                parts.append(value.name)
            else:
                parts.append(hashlib.blake2b(repr(value).encode(), digest_size=4).hexdigest())
        return "_".join(parts)

    @property
    def flops(self) -> str:
        """Arithmetic of one launch, as a formula in the symbolic sizes."""
        raise NotImplementedError

    @property
    def bytes(self) -> str:
        """Memory that one launch must move at least, as a formula in the symbolic sizes."""
        raise NotImplementedError

    def to_json(self) -> str:
        """This problem as one line of JSON, the operator first."""
        return json.dumps(_plain(self))

    @staticmethod
    def from_json(text: str) -> "Problem":
        """The problem that `to_json` wrote."""
        problem: Problem = _frozen(json.loads(text))
        return problem


def _plain(value: Any) -> Any:
    """A problem, and one in it, as a dictionary."""
    if not isinstance(value, Problem):
        return value
    return {
        "operator": value.operator,
        **{field.name: _plain(getattr(value, field.name)) for field in fields(value)},
    }


def _frozen(value: Any) -> Any:
    """Lists, and lists in them, as tuples; dictionaries as problems."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        given = {key: _frozen(part) for key, part in value.items()}
        return _OPERATORS[given.pop("operator")](**given)
    return value


def require_positive(problem: Problem, *names: str) -> None:
    """Refuse a problem whose fields are not sizes.

    Raises:
        KernelError: A field is below 1.
    """
    for name in names:
        if getattr(problem, name) < 1:
            raise KernelError(
                f"{name} of a {problem.operator} problem must be at least 1, not {getattr(problem, name)}."
            )


def tag(func: PrimFunc, problem: Problem) -> PrimFunc:
    """The function, marked as solving this problem."""
    return func.with_attr(ATTRIBUTE, problem.to_json())


def problem_of(func: PrimFunc) -> Problem | None:
    """The problem that a PrimFunc solves, or None where it is not one of ours."""
    attrs: Mapping[str, Any] = func.attrs or {}
    return Problem.from_json(str(attrs[ATTRIBUTE])) if ATTRIBUTE in attrs else None
