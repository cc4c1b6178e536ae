"""Small decoders without attention, run straight through the pipeline and compared with float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm_ffi import Shape

from relax_llm import cpu, layers
from relax_llm.artifact.memory import aligned
from relax_llm.compiler.export import export
from relax_llm.compiler.passes.lift_weights import weight_recipes
from relax_llm.compiler.pipeline import pipeline, run
from relax_llm.compiler.planner import Planner
from relax_llm.kernels.machine import CODE_GENERATION, machine
from relax_llm.kernels.problem import Problem, problem_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from relax_llm.formats import Blocks

    Array = npt.NDArray[Any]
    Weights = dict[str, Array]

MACHINE = machine("x86-64" if cpu.architecture() == "x86_64" else None)
"""The plainest machine that this one is: its kernels are small and quick to generate."""

ROWS, HIDDEN = 19, 12
IDS = np.random.default_rng(5).integers(0, ROWS, (2, 5)).astype(np.int32)


@dataclass(frozen=True)
class Probe:
    """A decoder to compile.

    Attributes:
        declare: Adds layers to the decoder; all get random weights.
        forward: From the embedded tokens [batch, seq, HIDDEN] to the result.
        reference: The same with NumPy, given the weights by name.
        matmuls: Names of the matmul kernels that are left, without the prefix; None where it does not matter.
    """

    declare: Callable[[Any], None]
    forward: Callable[[Any, nn.Tensor], nn.Tensor]
    reference: Callable[[Weights, Array], Array]
    matmuls: tuple[str, ...] | None = None


def declare(**made: Callable[[], Any]) -> Callable[[Any], None]:
    """What declares layers by name; each is made when the decoder is."""

    def layers_of(decoder: Any) -> None:
        for name, make in made.items():
            setattr(decoder, name, make())

    return layers_of


def decoder_of(probe: Probe) -> layers.Decoder:
    """The decoder that a probe describes."""

    class Probed(layers.Decoder):
        def __init__(self) -> None:
            self.vocab_size, self.context_length = ROWS, 64
            self.embed = layers.Embedding(ROWS, HIDDEN)
            probe.declare(self)

        def hidden_states(self, token_ids: nn.Tensor, step: layers.Step) -> nn.Tensor:
            return probe.forward(self, self.embed(token_ids))

        def logits(self, hidden: nn.Tensor) -> nn.Tensor:
            return hidden

    return Probed()


def lower(decoder: layers.Decoder) -> tvm.IRModule:
    """The decoder's module after the pipeline."""
    return run(export(decoder, MACHINE), pipeline().parts()[0].bind(Planner(MACHINE)))


def kernels(mod: tvm.IRModule, function: str = "hidden") -> list[Problem | str]:
    """What a function launches, in order: problems, or names where there is none."""
    found: list[Problem | str] = []
    for block in mod[function].body.blocks:
        for binding in block.bindings:
            if isinstance(binding.value, relax.Call) and str(binding.value.op.name).startswith(
                "relax.call_tir"
            ):
                kernel = binding.value.args[0]
                found.append(problem_of(mod[kernel]) or str(kernel.name_hint))
    return found


def random_weights(decoder: layers.Decoder) -> Weights:
    """Values for every parameter, so that products stay near 1."""
    random = np.random.default_rng(1)
    weights = {}
    for name, parameter in decoder.named_parameters():
        shape = tuple(int(size) for size in parameter.shape)
        value = random.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) > 1 else 1)
        weights[name] = value.astype(np.float32)
    return weights


@dataclass(frozen=True)
class _InMemory:
    """Reads weights that are no checkpoint's."""

    weights: Weights

    def __call__(self, name: str) -> Array:
        return self.weights[name]

    def blocks(self, name: str, format: Blocks, *, transposed: bool) -> Array | None:
        return None


def execute(mod: tvm.IRModule, weights: Weights, ids: Array, function: str = "hidden") -> Array:
    """Generate code, pack the weights as their recipes say, and run a function without caches."""
    (values,) = execute_all(mod, weights, ids, function)
    return values


def execute_all(mod: tvm.IRModule, weights: Weights, ids: Array, *functions: str) -> list[Array]:
    """The same for several functions."""
    recipes = weight_recipes(mod)
    with tvm.transform.PassContext(config=CODE_GENERATION):
        lowered = run(mod, pipeline().parts()[1].bind(Planner(MACHINE)))
        executable = relax.build(lowered, MACHINE.target, relax_pipeline=tvm.transform.Sequential([]))
    packed = [_tensor(recipe.make(_InMemory(weights))) for recipe in recipes]
    virtual_machine = relax.VirtualMachine(executable, tvm.cpu())
    arguments: tuple[Any, ...] = (_tensor(ids), Shape([ids.shape[1]]), [], packed)
    return [virtual_machine[function](*arguments).numpy() for function in functions]


def _tensor(array: Array) -> Any:
    memory = aligned(array.shape, array.dtype.name)
    memory[...] = array
    return tvm.runtime.from_dlpack(memory)
