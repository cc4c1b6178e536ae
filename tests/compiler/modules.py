"""The traced modules of tiny models of both families, and the text of their functions."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from tvm import relax

from relax_llm.compiler.export import export
from relax_llm.compiler.pipeline import pipeline, run
from relax_llm.compiler.planner import Planner
from relax_llm.kernels.dispatch import OPEN
from relax_llm.kernels.inner import ENTRY, INTERNAL
from relax_llm.kernels.machine import machine
from relax_llm.layers import Fields
from relax_llm.models import gpt2, llama

from ..artifact.checkpoints import GPT2, LLAMA

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.tirx import PrimFunc

    from relax_llm.layers import Decoder

MODELS: dict[str, tuple[type[Decoder], dict[str, Any]]] = {
    "llama": (llama.Llama, LLAMA),
    "gpt2": (gpt2.GPT2, GPT2),
    "llama without biases": (
        llama.Llama,
        {
            **LLAMA,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "num_hidden_layers": 2,
        },
    ),
    "mistral": (
        llama.Llama,
        {**LLAMA, "model_type": "mistral", "attention_bias": False, "mlp_bias": False, "sliding_window": 7},
    ),
    "relu gpt2": (
        gpt2.GPT2,
        {**GPT2, "activation_function": "relu", "tie_word_embeddings": False, "n_layer": 2},
    ),
}
TARGET = "x86-64-v3"


@cache
def stages(model: str) -> list[tuple[str, IRModule]]:
    """The module as traced, and after each pass, with the pass's name."""
    decoder, config = MODELS[model]
    on = machine(TARGET)
    found = [("Export", export(decoder(Fields(config)), on))]
    to_launches, _ = pipeline().parts()
    run(found[0][1], to_launches.bind(Planner(on)), lambda name, mod: found.append((name, mod)))
    return found


def lowered(mod: IRModule) -> IRModule:
    """A module of launches as the virtual machine's instructions."""
    return run(mod, pipeline().parts()[1].bind(Planner(machine(TARGET))))


def after(model: str, name: str) -> IRModule:
    """The module after a pass."""
    return dict(stages(model))[name]


def before(model: str, name: str) -> IRModule:
    """The module that a pass was given."""
    names = [stage for stage, _ in stages(model)]
    return stages(model)[names.index(name) - 1][1]


def text_of(function: Any) -> str:
    """A function as TVMScript without what is the same everywhere: imports, and types that the right side tells."""
    script = str(function.script())
    lines = [
        line for line in script.splitlines() if line and not line.startswith("#") and "TypeVar(" not in line
    ]
    return "\n".join(re.sub(r"^(        \w+): R\.\w+\(.*?\) = ", r"\1 = ", line) for line in lines) + "\n"


def kernels_of(mod: IRModule) -> dict[str, PrimFunc]:
    """The functions of a module that are not Relax."""
    return {
        var.name_hint: func for var, func in mod.functions_items() if not isinstance(func, relax.Function)
    }


def called_of(mod: IRModule) -> dict[str, PrimFunc]:
    """Those that a Relax function may launch: no kernel that a dispatcher calls, no dispatcher that asks the host."""
    return {
        name: func
        for name, func in kernels_of(mod).items()
        if not any(mark in (func.attrs or {}) for mark in (INTERNAL, ENTRY, OPEN))
    }


def functions_of(mod: IRModule) -> dict[str, relax.Function]:
    """The Relax functions of a module."""
    return {var.name_hint: func for var, func in mod.functions_items() if isinstance(func, relax.Function)}
