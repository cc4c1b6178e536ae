"""What holds of every compiled module: nothing but launches, all of them accounted for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import tvm
from tvm import relax

from relax_llm.artifact.formulas import evaluate
from relax_llm.compiler import launches
from relax_llm.compiler.export import ENTRIES
from relax_llm.compiler.passes.lift_weights import weight_recipes
from relax_llm.kernels.dispatch import OPEN
from relax_llm.kernels.machine import CODE_GENERATION, machine
from relax_llm.kernels.problem import problem_of

from .modules import MODELS, TARGET, called_of, functions_of, kernels_of, lowered, stages

if TYPE_CHECKING:
    from tvm import IRModule

models = pytest.mark.parametrize("model", list(MODELS))
FUNCTIONS = {"prefill", "decode", "logits", "hidden", "greedy"}


def _final(model: str) -> IRModule:
    return stages(model)[-1][1]


@models
def test_the_functions_are_the_entries(model: str) -> None:
    functions = functions_of(_final(model))
    assert functions.keys() == FUNCTIONS == {entry.name for entry in ENTRIES} | {"greedy"}
    for name, function in functions.items():
        params = ["logits"] if name == "greedy" else ["token_ids", "kv_len", "caches", "weights"]
        assert [param.name for param in function.params] == params
    assert int(functions["decode"].params[0].ty.shape[1]) == 1


@models
def test_nothing_is_left_but_launches(model: str) -> None:
    mod = _final(model)
    for name, function in functions_of(mod).items():
        for block in function.body.blocks:
            for binding in block.bindings:
                value = binding.value
                if isinstance(value, relax.TupleGetItem | relax.Var):
                    continue
                assert isinstance(value, relax.Call), f"{name}: {value}"
                assert value.op.name in ("relax.call_tir", "relax.call_tir_inplace"), f"{name}: {value}"
                assert mod[value.args[0]] is not None


@models
def test_every_kernel_is_scheduled_and_launched(model: str) -> None:
    mod = _final(model)
    used = {launch.kernel for calls in launches.functions(mod).values() for launch in calls}
    assert called_of(mod).keys() == used
    for name, func in kernels_of(mod).items():
        if OPEN in func.attrs:
            assert func.attrs[OPEN] in used, f"{name} stands beside nothing"
    for name, func in kernels_of(mod).items():
        assert bool(func.attrs["tirx.is_scheduled"]), f"{name} is left as plain loops"
        assert not name.startswith("loops_")


@models
def test_every_launch_has_a_site_and_all_its_arguments(model: str) -> None:
    mod = _final(model)
    layers = MODELS[model][1].get("num_hidden_layers") or MODELS[model][1]["n_layer"]
    for name, calls in launches.functions(mod).items():
        assert calls, f"{name} launches nothing"
        for launch in calls:
            assert launch.site, f"{name}: a launch of {launch.kernel} has no site"
            assert not launch.site.startswith(("model.", "transformer."))
            assert not launch.site.endswith((".weight", ".bias"))
            assert launch.arguments[-1].role == "output"
            params = list(mod[launch.kernel].params)
            assert len(launch.arguments) == len(params), f"{name}: {launch.kernel}"
        inside = "layers" if "self_attn" in str(sorted(launch.site for launch in calls)) else "h"
        for layer in range(layers):
            # norm, q k v, append, attention, o; norm, gate and up (or fc), down
            inner = sum(launch.site.startswith(f"{inside}.{layer}.") for launch in calls)
            # In a prefill the last token is chosen behind two launches of the layers.
            chosen = (name == "prefill") * ((layer == layers - 1) + (layer == layers - 2))
            assert inner == (0 if name == "greedy" else 8 + chosen), name


@models
def test_weights_are_the_recipes(model: str) -> None:
    """Every function takes all weights in one order, and every parameter of the model is used by some recipe."""
    mod = _final(model)
    recipes = weight_recipes(mod)
    assert len(set(recipes)) == len(recipes)
    for name, function in functions_of(mod).items():
        if name != "greedy":
            assert len(function.params[3].ty.fields) == len(recipes)
    decoder, config = MODELS[model]
    from relax_llm.layers import Fields

    parameters = {name for name, _ in decoder(Fields(config)).named_parameters()}
    assert {source for recipe in recipes for source in recipe.sources()} == parameters


@models
def test_costs_are_formulas(model: str) -> None:
    mod = _final(model)
    sizes = {"batch": 2, "seq": 3, "kv_len": 40, "tiles": 4}
    kernels = launches.kernels(mod, launches.functions(mod))
    assert kernels.keys() == called_of(mod).keys()
    for name, kernel in kernels.items():
        assert evaluate(kernel.flops, sizes) >= 0, name
        assert evaluate(kernel.bytes, sizes) > 0, name


EXPECTED: dict[str, dict[str, str]] = {
    "llama": {
        "layers.0.self_attn.q_proj+k_proj+v_proj": "matmul_n48_k24_bias",
        "layers.0.self_attn.o_proj": "matmul_n24_k24_bias_residual",
        "layers.0.mlp.gate_proj+up_proj": "matmul_n40_k24_bias_silu_gated",
        "layers.0.mlp.down_proj": "matmul_n24_k20_bias_residual",
    },
    "mistral": {
        "layers.0.self_attn.q_proj+k_proj+v_proj": "matmul_n48_k24",
        "layers.0.self_attn.o_proj": "matmul_n24_k24_residual",
        "layers.0.mlp.gate_proj+up_proj": "matmul_n40_k24_silu_gated",
        "layers.0.mlp.down_proj": "matmul_n24_k20_residual",
        "embed_tokens": "matmul_n37_k24",
    },
    "llama without biases": {
        "layers.1.mlp.down_proj": "matmul_n24_k20_residual",
        "lm_head": "matmul_n37_k24",
    },
    "gpt2": {
        "h.0.attn.c_attn": "matmul_n72_k24_bias",
        "h.0.attn.c_proj": "matmul_n24_k24_bias_residual",
        "h.0.mlp.c_fc": "matmul_n96_k24_bias_gelu_tanh",
        "h.0.mlp.c_proj": "matmul_n24_k96_bias_residual",
        "wte": "matmul_n41_k24",
    },
    "relu gpt2": {"h.1.mlp.c_fc": "matmul_n96_k24_bias_relu", "lm_head": "matmul_n41_k24"},
}


@models
def test_what_is_fused_where(model: str) -> None:
    calls = launches.functions(_final(model))["prefill"]
    matmuls = {launch.site: launch.kernel for launch in calls if launch.kernel.startswith("matmul")}
    assert matmuls == {**matmuls, **EXPECTED[model]}


@models
def test_a_tied_table_is_stored_once(model: str) -> None:
    mod = _final(model)
    table = "transformer.wte.weight" if "gpt2" in model else "model.embed_tokens.weight"
    assert [table in recipe.sources() for recipe in weight_recipes(mod)].count(True) == 1
    embeddings = [problem_of(mod[launch.kernel]) for launch in launches.functions(mod)["decode"][:1]]
    tied = MODELS[model][1].get("tie_word_embeddings", True)
    assert (getattr(embeddings[0], "layout", None) is not None) == tied


def test_launches_are_the_calls_of_the_virtual_machine() -> None:
    """The manifest's launches are, in order, what the bytecode calls beside the machine's own built-in functions."""
    for model in ("llama", "gpt2"):
        mod = _final(model)
        with tvm.transform.PassContext(config=CODE_GENERATION):
            sequence = tvm.transform.Sequential([])
            executable = relax.build(lowered(mod), machine(TARGET).target, relax_pipeline=sequence)
        found: dict[str, list[str]] = {}
        for line in str(executable.as_text()).splitlines():
            if heading := re.match(r"@(\w+):", line):
                found[heading[1]] = []
            elif call := re.match(r"\s+call\s+([\w.]+)\s", line):
                found[list(found)[-1]].append(call[1])
        assert found.keys() == FUNCTIONS
        for name, calls in launches.functions(mod).items():
            own = [symbol for symbol in found[name] if not symbol.startswith(("vm.builtin.", "shape_func"))]
            assert own == [launch.kernel for launch in calls], f"{model}: {name}"


def test_a_function_with_a_branch_is_refused() -> None:
    from relax_llm.compiler.bindings import lines
    from relax_llm.errors import CompileError

    builder = relax.BlockBuilder()
    condition = relax.Var("condition", relax.TensorType([], "bool"))
    x = relax.Var("x", relax.TensorType([4], "float32"))
    with builder.function("main", [condition, x]):
        builder.emit_func_output(builder.emit(relax.If(condition, _seq(x, 1.0), _seq(x, 2.0))))
    with pytest.raises(CompileError, match="'main' is not a straight line"):
        lines(builder.get())


def _seq(x: Any, value: float) -> Any:
    builder = relax.BlockBuilder()
    with builder.function("f", [x]):
        builder.emit_func_output(builder.emit(relax.op.add(x, relax.const(value, "float32"))))
    return builder.get()["f"].body
