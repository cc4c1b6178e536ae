"""What is right, by the float64 reference of each operator, with the bounds that kernels must keep at the door."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from relax_llm.artifact.manifest import Manifest, Weight
from relax_llm.numerics.bounds import UNIT
from relax_llm.runtime.launch import Launch, Operand
from relax_llm.runtime.results import decoded
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
        cached = {name: said for name, said in found.items() if name.endswith(("_cache", "_scale"))}
        outputs = [
            Expected(*(part.reshape(output.shape) for part in (said.right, said.bound)))
            for output, said in zip(
                launch.outputs, (said for name, said in found.items() if name not in cached), strict=True
            )
        ]
        return outputs + (_expected_tokens(cached, problem, launch.sizes["kv_len"]) if cached else [])


def _expected_tokens(cached: Mapping[str, Any], problem: Any, kv_len: int) -> list[Expected]:
    """The keys and the values that a cache should hold, and how far they may be off.

    Of bits of bf16 that may be off by some, the steps between two such.
    """

    def tokens(of: Callable[[Any], Array]) -> list[Array]:
        kinds = {"f32": np.float32, "bf16": np.uint16, "q8": np.float64}
        arrays = {name: of(said).astype(kinds[problem.cache]) for name, said in cached.items()}
        return list(decoded(problem.cache, arrays, problem.head_dim, kv_len).values())

    right = tokens(lambda said: said.right)
    if problem.cache == "f32":
        bound = tokens(lambda said: said.bound)
    elif problem.cache == "bf16":
        far = tokens(lambda said: np.minimum(said.right + said.bound, 0xFFFF))
        bound = [np.abs(one - other) for one, other in zip(far, right, strict=True)]
    else:
        far = tokens(lambda said: np.abs(said.right) + said.bound)
        # What is shown of a code and its scale is their product in f32.
        bound = [one - np.abs(other) * (1 - UNIT) for one, other in zip(far, right, strict=True)]
    return [Expected(*both) for both in zip(right, bound, strict=True)]


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
