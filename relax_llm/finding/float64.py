"""What is right, by the float64 reference of each operator, with the bounds that kernels must keep at the door."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from relax_llm.artifact.manifest import Manifest, Weight
from relax_llm.runtime.launch import Launch, Operand
from relax_llm.runtime.results import tokens_of
from relax_llm.runtime.shadow import Expected

if TYPE_CHECKING:
    from relax_llm.kernels.matmul import Matmul

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Float64:
    """The operators' own references. A weight in a layout of a user's cannot be read back, so nothing is said there."""

    name: str = "float64"

    def expected(self, launch: Launch, artifact: Manifest) -> Sequence[Expected] | None:
        """See `relax_llm.runtime.shadow.Standard`."""
        from relax_llm.kernels.operators import OPERATORS
        from relax_llm.kernels.problem import Problem

        record = OPERATORS.get(launch.operator)
        if record is None:
            return None
        kernel = artifact.kernels[launch.symbol]
        problem = Problem.from_json(json.dumps({"operator": launch.operator, **kernel.problem}))
        names = [operand.name for operand in record.operands(problem, None) if operand.is_tensor]
        values = _values(launch, problem, names, artifact.weights)
        if values is None:
            return None
        sizes = dict(launch.sizes)
        cache = values.get("k_cache")
        if cache is not None:
            sizes["tiles"] = cache.shape[2]
        found = record.expected(problem, sizes, values, False)
        outputs = [
            Expected(*(part.reshape(output.shape) for part in (said.right, said.bound)))
            for output, said in zip(
                launch.outputs,
                (said for name, said in found.items() if not name.endswith("_cache")),
                strict=True,
            )
        ]
        kv_len = launch.sizes["kv_len"]
        return outputs + [
            _expected_tokens(name, said.right, said.bound, problem, kv_len)
            for name, said in found.items()
            if name.endswith("_cache")
        ]


def _expected_tokens(name: str, right: Array, bound: Array, problem: Any, kv_len: int) -> Expected:
    """What a cache should hold; of bits of bf16 that may be off by some, the steps between two such."""
    if problem.cache == "f32":
        return Expected(
            *(tokens_of(name, part.astype(np.float32), problem.head_dim, kv_len) for part in (right, bound))
        )
    tokens = tokens_of(name, right.astype(np.uint16), problem.head_dim, kv_len)
    far = right + bound
    steps = tokens_of(name, np.minimum(far, 0xFFFF).astype(np.uint16), problem.head_dim, kv_len) - tokens
    return Expected(tokens, np.abs(steps))


float64 = Float64()
"""For `runner.shadow(site, rl.float64)`."""


def _values(
    launch: Launch, problem: Any, names: Sequence[str], weights: Sequence[Weight]
) -> dict[str, Array] | None:
    """The inputs by the names that the operator's record has for them, the weight as in the checkpoint.

    None where the weight cannot be read.
    """
    tensors = iter([operand for operand in launch.arguments if operand.role != "size"])
    values: dict[str, Array] = {}
    for name, operand in zip(names, tensors, strict=True):
        if operand.role == "output":
            continue
        value: Array | None = operand.value
        if name == "weight" and launch.operator == "matmul":
            value = _encoded(operand, problem, weights)
        if value is None:
            return None
        values[name] = value
    return values


def _encoded(operand: Operand, problem: "Matmul", weights: Sequence[Weight]) -> Array | None:
    """The matrix [N, K] that a packed weight holds, as its format has it."""
    from relax_llm.formats import FORMATS
    from relax_llm.kernels.layout import Packed, Plain, parse

    stored = operand.value
    recipe = next((w.recipe for w in weights if w.name == operand.name and w.shape == stored.shape), "")
    name, parenthesis, _ = recipe.partition("(")
    layout: Plain | Packed = Plain(problem.weight_format)
    if parenthesis and name not in (
        "transpose",
        "concat",
        *FORMATS,
    ):  # else how a matrix was made that lies plainly
        try:
            layout = parse(name)
        except (ValueError, KeyError):  # a user's
            return None
    if layout.shape(problem.n, problem.k) != stored.shape:
        return None
    return stored if isinstance(layout, Plain) else layout.unpack(stored, problem.n, problem.k)
