"""A Hugging Face model as a reference: run by `transformers`, its tensors caught at its modules, by name.

A site has its name from the checkpoint, and so have the modules. What a launch gives is found in one of two places:

* at the module's own output, where the launch computes no more than the module: a norm, an embedding, a product with
  its bias. Products that were joined are compared with the outputs of all of them, side by side;
* at the input of the module that reads it, for everything else: what a residual was added to is what the next norm
  reads; the product of gate and up is what `down_proj` reads; what attention gives is what `o_proj` reads. Which launch
  reads it is known from the compiled program, so this takes no knowledge of the architecture.

Keys and values are compared with the model's cache, and the cosines and sines with those of its rotary embedding.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from relax_llm.artifact.manifest import Launch
from relax_llm.errors import InputError
from relax_llm.finding.flow import readers
from relax_llm.finding.walk import Counterpart, Receive
from relax_llm.plan.plan import parts_of
from relax_llm.runtime.runner import Runner

if TYPE_CHECKING:
    from relax_llm.checkpoint import Checkpoint

Array = npt.NDArray[Any]
Tensor = tuple[str, str]
"""Where a tensor is caught ("in", "out", "cos", "sin", "k_cache", "v_cache"), and the name of the module."""


@dataclass
class Transformer:
    """A model of transformers, in float32 and with eager attention.

    Attributes:
        name: Where the checkpoint lies.
        model: The module.
        cache: Its keys and values so far.
        weights: How it stores matrices: as float32, whatever the checkpoint has.
    """

    name: str
    model: Any
    cache: Any
    weights: str = "f32"
    _modules: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._modules = dict(self.model.named_modules())

    @staticmethod
    def open(reference: "str | os.PathLike[str] | Checkpoint", subject: Runner) -> "Transformer":
        """Load a checkpoint: a Hugging Face directory as `transformers` reads it, a GGUF file by way of its tensors.

        Raises:
            CheckpointError: It cannot be read, or `transformers` cannot make it, or is not installed.
            InputError: It is another model than the subject.
        """
        from relax_llm.finding.torch_model import cache, load

        name, model = load(reference)
        vocab, here = int(model.config.vocab_size), subject.vocab_size
        layers, ours = _layers(model.config), len(subject.artifact.manifest.caches)
        if (vocab, layers) != (here, ours):
            raise InputError(
                f"{name} is another model than {subject.artifact.path}: {layers} layers and {vocab} tokens, and not "
                f"{ours} layers and {here} tokens."
            )
        return Transformer(name, model, cache(model))

    def counterparts(self, subject: Runner, function: str) -> list[Counterpart | None]:
        """By the names of the weights, and by which launch reads which."""
        manifest = subject.artifact.manifest
        launches = manifest.functions[function]
        flow = readers(subject.program, function, launches, frozenset(manifest.kernels))
        kernels = [manifest.kernels[launch.kernel] for launch in launches]
        operators = [kernel.operator for kernel in kernels]

        def read_by(at: int) -> Tensor | None:
            for reader, position in flow[at]:
                if operators[reader] in ("norm", "matmul") and position == 0:
                    launch, norm = launches[reader], kernels[reader].problem.get("norm")
                    if norm:  # the product's own, whose vectors come last
                        launch = replace(launch, arguments=launch.arguments[-2 - norm["bias"] :])
                    modules = self._modules_of(launch, "norm" if norm else operators[reader])
                    return ("in", modules[0]) if modules else None
                if operators[reader] == "last_token":
                    return read_by(reader)
            return None

        made_by = {reader: at for at, those in enumerate(flow) for reader, position in those if position == 0}
        found: list[Counterpart | None] = []
        for at, launch in enumerate(launches):
            operator, source = kernels[at].operator, made_by.get(at)
            if operator == "last_token" and source is not None and operators[source] != "append":
                whole = found[source]
                found.append(whole and replace(whole, make=_joined_for(launch)))
                continue
            found.append(self._own(launch, operator, kernels[at].problem))
            if found[-1] is None and operator != "append":
                tensor = read_by(at)
                if tensor is not None:
                    found[-1] = Counterpart(f"the input of {tensor[1]}", (tensor,), _joined_for(launch))
        return found

    def run(self, function: str, token_ids: Sequence[int], receive: Receive) -> Array:
        """Call the model with hooks at its modules."""
        from relax_llm.finding.torch_model import call

        with self._caught(receive):
            logits: Array = call(self.model, self.cache, token_ids)
        return logits

    def _own(self, launch: Launch, operator: str, problem: Any) -> Counterpart | None:
        """The output of the module that computes just what a launch does."""
        if operator == "append":
            module = self._named_like(launch.site)
            if module is None or not hasattr(self._modules[module], "layer_idx"):
                return None
            names = ("k_cache", "v_cache")
            return Counterpart(
                f"the cache of {module}", tuple((kind, module) for kind in names), lambda kept: [None, *kept]
            )
        if operator == "rope_table":
            module = next((name for name in self._modules if name.endswith("rotary_emb")), None)
            if module is None:
                return None
            return Counterpart(f"the output of {module}", (("cos", module), ("sin", module)), _table)
        if operator not in ("embedding", "norm", "matmul"):
            return None
        if operator == "matmul" and any(problem[name] for name in ("activation", "gated", "residual")):
            return None
        modules = self._modules_of(launch, operator)
        if not modules:
            return None
        label = f"the output of {modules[0]}" + "".join(
            f" and {name.rpartition('.')[2]}" for name in modules[1:]
        )
        return Counterpart(label, tuple(("out", name) for name in modules), _joined_for(launch))

    def _modules_of(self, launch: Launch, operator: str) -> list[str]:
        """The modules whose weights a launch reads; none where one of them is not there."""
        weight = next((argument.name for argument in launch.arguments if argument.role == "weight"), None)
        if weight is None:
            return []
        joined = parts_of(weight.rpartition(".")[0])
        names = joined[1:] or joined
        if operator == "matmul":  # an embedding that is the head as well
            head = self.model.get_output_embeddings()
            table = self.model.get_input_embeddings()
            names = [
                next((other for other, module in self._modules.items() if module is head), name)
                if self._modules.get(name) is table
                else name
                for name in names
            ]
        return names if all(name in self._modules for name in names) else []

    def _named_like(self, site: str) -> str | None:
        return next((name for name in self._modules if name == site or name.endswith(f".{site}")), None)

    @contextmanager
    def _caught(self, receive: Receive) -> Iterator[None]:
        """Hand over what goes into and comes out of every module, and what attention leaves in the cache."""

        def before(name: str, module: Any, given: tuple[Any, ...]) -> None:
            if given and hasattr(given[0], "detach"):
                receive(("in", name), given[0].detach().numpy())

        def after(name: str, module: Any, given: tuple[Any, ...], result: Any) -> None:
            values = result if isinstance(result, tuple) else (result,)
            if name.endswith("rotary_emb"):
                for kind, value in zip(("cos", "sin"), values, strict=False):
                    receive((kind, name), value.detach().numpy())
            elif hasattr(values[0], "detach"):
                receive(("out", name), values[0].detach().numpy())
            layer = getattr(module, "layer_idx", None)
            kept = getattr(self.cache, "layers", ())
            if (
                isinstance(layer, int)
                and layer < len(kept)
                and getattr(kept[layer], "keys", None) is not None
            ):
                receive(("k_cache", name), kept[layer].keys.detach().numpy())
                receive(("v_cache", name), kept[layer].values.detach().numpy())

        hooks = []
        try:
            for name, module in self._modules.items():
                if name:
                    hooks.append(module.register_forward_pre_hook(partial(before, name)))
                    hooks.append(module.register_forward_hook(partial(after, name)))
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _joined_for(launch: Launch) -> Callable[[Sequence[Array]], list[Array | None]]:
    """Parts side by side; of the last token alone where the launch has no more."""
    last = launch.arguments[-1].shape[1:2] == ("1",)

    def joined(parts: Sequence[Array]) -> list[Array | None]:
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        return [whole[:, -1:] if last else whole]

    return joined


def _table(parts: Sequence[Array]) -> list[Array | None]:
    """Cosines and sines [batch, seq, dim], each half alike, as [seq, 2, dim / 2]."""
    half = parts[0].shape[-1] // 2
    return [np.stack([part[0, :, :half] for part in parts], axis=1)]


def _layers(config: Any) -> int:
    return int(getattr(config, "num_hidden_layers", 0))
