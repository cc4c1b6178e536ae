"""Channels of like size: the same model in f32, and less is lost where weights are stored in few bits."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tvm.relax.frontend import nn

import relax_llm as rl
from relax_llm import layers
from relax_llm.compiler import equalize
from relax_llm.compiler.bindings import Edit
from relax_llm.compiler.build import construct
from relax_llm.compiler.equalize import Equalized, Part, factors_for
from relax_llm.compiler.export import export
from relax_llm.compiler.parameters import Reader, match
from relax_llm.compiler.storage import Storage
from relax_llm.compiler.wanted import Wanted
from relax_llm.formats import FORMATS
from relax_llm.kernels.machine import machine
from relax_llm.models import gpt2, llama
from relax_llm.progress import Silent

from ..artifact.checkpoints import GPT2, write
from ..machines import PLAINER
from .modules import MODELS, TARGET
from .uneven import WIDE, uneven

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from relax_llm.checkpoint import Checkpoint


def _equalized(checkpoint: Checkpoint, architecture: type[layers.Decoder], weights: str = "q8") -> Equalized:
    decoder = construct(architecture, checkpoint.config)
    tensors = match(checkpoint, decoder)
    storage = Storage.of(Wanted.parse(weights), tensors, decoder.vocab_size)
    mod = export(decoder, machine(TARGET))
    return equalize.equalize(
        mod, tensors, storage, decoder.context_length, Reader(tensors, pytest.fail), Silent()
    )


def _found(model: str) -> dict[str, tuple[str, ...]]:
    """What is written by what, and read by what, in words: "norm [0] w*"."""
    decoder, config = MODELS[model]
    mod = export(decoder(layers.Fields(config)), machine(TARGET))
    line = next(line for line in Edit(mod).lines if line.name == equalize.FUNCTION)

    def words(parts: tuple[Part, ...]) -> tuple[str, ...]:
        return tuple(f"{part.name.partition('.0.')[2]}[{part.axis}]" for part in parts)

    return {
        " ".join(words(channels.writers)): words(channels.readers)
        for channels in equalize.find(line)
        if ".0." in channels.writers[0].name
    }


def test_channels_of_a_llama() -> None:
    assert _found("llama without biases") == {
        "input_layernorm.weight[0]": (
            "self_attn.q_proj.weight[1]",
            "self_attn.k_proj.weight[1]",
            "self_attn.v_proj.weight[1]",
        ),
        "post_attention_layernorm.weight[0]": ("mlp.gate_proj.weight[1]", "mlp.up_proj.weight[1]"),
        "mlp.up_proj.weight[0]": ("mlp.down_proj.weight[1]",),
    }


def test_biases_are_written_too() -> None:
    found = _found("llama")
    assert found["mlp.up_proj.weight[0] mlp.up_proj.bias[0]"] == ("mlp.down_proj.weight[1]",)


def test_channels_of_gpt2_lie_along_the_other_axis() -> None:
    """Nothing goes through GELU; a layer norm has a bias."""
    norms = {
        "ln_1.weight[0] ln_1.bias[0]": ("attn.c_attn.weight[0]",),
        "ln_2.weight[0] ln_2.bias[0]": ("mlp.c_fc.weight[0]",),
    }
    assert _found("gpt2") == norms
    through_relu = {"mlp.c_fc.weight[1] mlp.c_fc.bias[0]": ("mlp.c_proj.weight[0]",)}
    assert _found("relu gpt2") == norms | through_relu


@pytest.mark.parametrize(
    ("architecture", "config"),
    [(llama.Llama, {**WIDE, "tie_word_embeddings": True}), (gpt2.GPT2, GPT2)],
    ids=["llama", "gpt2"],
)
def test_the_same_model(architecture: type[layers.Decoder], config: dict[str, Any], tmp_path: Path) -> None:
    """Logits and hidden states differ by what roundings in f32 do."""
    checkpoint = rl.open_checkpoint(uneven(write(tmp_path / "checkpoint", config)))
    made = _equalized(checkpoint, architecture)
    scaled = [name for name, factors in made.factors.items() if factors.max() > 1.1]
    assert len(scaled) > config.get("num_hidden_layers", 1)
    changed = {made.tensors[name].name: made.tensors[name] for name in made.tensors}
    other = replace(
        checkpoint,
        tensors={**checkpoint.tensors, **changed},
        fingerprint=f"{checkpoint.fingerprint} equalized",
    )
    runners = [rl.Runner(rl.compile(one, target=PLAINER)) for one in (checkpoint, other)]
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], 50)
    logits = [runner.prefill(runner.start(), ids, output="all") for runner in runners]
    _assert_alike(*logits)
    hidden = [runner.prefill(runner.start(), ids, output="hidden") for runner in runners]
    _assert_alike(*hidden)
    for name in scaled:
        before = checkpoint.tensors[made.tensors[name].name].read()
        ratios = made.tensors[name].read() / before
        if architecture is gpt2.GPT2:
            ratios = ratios.T
        by_column = (
            ratios / made.factors[name]
        )  # what is left is one number for each row, which is written, too
        np.testing.assert_allclose(by_column, np.broadcast_to(by_column[:, :1], by_column.shape), rtol=1e-6)


def _assert_alike(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> None:
    assert np.abs(one - other).max() < 1e-5 * np.abs(one).max()


@pytest.mark.parametrize("weights", ["q8", "q4", "q4s"])
@pytest.mark.parametrize("activations", [False, True])
def test_less_is_lost(weights: str, activations: bool) -> None:
    """Of a product whose weights are stored, and whose activations are perhaps rounded, in groups of 32.

    As in trained models, large channels are read with small weights.
    """
    random = np.random.default_rng(0)
    sizes = np.exp2(random.integers(-3, 4, 256))
    x = (random.standard_normal((64, 256)) * sizes).astype(np.float32)
    matrix = (random.standard_normal((48, 256)) / np.sqrt(sizes)).astype(np.float32)
    right = x.astype(np.float64) @ matrix.T

    def lost(factors: npt.NDArray[Any]) -> float:
        form = FORMATS[weights]
        stored = form.decode(form.encode(matrix * factors), 256)
        read = x / factors
        if activations:
            groups = read.reshape(64, -1, 32)
            unit = np.abs(groups).max(axis=2, keepdims=True) / 127
            read = (np.rint(groups / unit) * unit).reshape(read.shape)
        return float(np.sqrt(np.square(read @ stored.T - right).mean()))

    assert lost(factors_for(sizes)) < 0.7 * lost(np.ones(256, np.float32))


def test_factors_are_nearly_half_of_what_channels_differ_by() -> None:
    np.testing.assert_allclose(factors_for(np.array([1.0, 4.0, 16.0])), [4**-0.45, 1, 4**0.45], rtol=1e-6)
    bounded = factors_for(np.array([2.0**40, 1.0, 1.0, 1.0]))
    np.testing.assert_allclose(bounded, [256, *[2**-4.5] * 3], rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_channels_of_no_size_stay(value: float) -> None:
    np.testing.assert_allclose(factors_for(np.array([value, 1.0, 16.0])), [1, 4**-0.45, 4**0.45], rtol=1e-6)
    assert factors_for(np.full(3, value)).tolist() == [1, 1, 1]


def test_formats_without_groups_are_left_alone(tmp_path: Path) -> None:
    checkpoint = rl.open_checkpoint(write(tmp_path / "checkpoint", WIDE))
    for weights in ("f32", "bf16", "f16", "f16,lm_head=q8"):
        assert _equalized(checkpoint, llama.Llama, weights).factors == {}
    some = _equalized(checkpoint, llama.Llama, "bf16,layers.1.mlp.down_proj=q4")
    assert list(some.factors) == ["model.layers.1.mlp.down_proj.weight"]


def test_blocks_of_a_file_stay_as_they_are(tmp_path: Path) -> None:
    """They are carried over bit by bit; only what is stored otherwise is scaled."""
    checkpoint = rl.open_checkpoint(write(tmp_path / "checkpoint", WIDE))
    blocks = {
        name: replace(tensor, dtype="q4_0", read_blocks=lambda: np.zeros(0, np.uint8))
        for name, tensor in checkpoint.tensors.items()
        if name.endswith("up_proj.weight")
    }
    partly = replace(checkpoint, tensors={**checkpoint.tensors, **blocks})
    for weights in ("q8", "q4", "q4s"):
        names = {
            name.rpartition(".layers.0.")[2] for name in _equalized(partly, llama.Llama, weights).factors
        }
        assert "mlp.down_proj.weight" not in names, "its writer cannot be scaled"
        assert "mlp.gate_proj.weight" not in names, "it shares its channels with up_proj"
        assert "self_attn.q_proj.weight" in names
    minimums = {name: replace(tensor, dtype="q4_1") for name, tensor in blocks.items()}
    anew = replace(checkpoint, tensors={**checkpoint.tensors, **minimums})
    assert "model.layers.0.mlp.down_proj.weight" in _equalized(anew, llama.Llama, "q8").factors


def test_an_operator_without_a_definition_is_said(tmp_path: Path) -> None:
    class Odd(llama.Llama):
        def hidden_states(self, token_ids: nn.Tensor, step: layers.Step) -> nn.Tensor:
            return nn.op.cumsum(super().hidden_states(token_ids, step), axis=-1)

    checkpoint = rl.open_checkpoint(write(tmp_path / "checkpoint", WIDE))
    made = _equalized(checkpoint, Odd)
    assert made.factors == {}
    assert made.notes == ("Channels are not equalized: there is no definition of relax.cumsum in NumPy.",)


def test_what_was_not_asked_for(tmp_path: Path) -> None:
    directory = write(tmp_path / "checkpoint", WIDE)
    artifact = rl.compile(directory, weights="q8", target=PLAINER, equalize=False)
    assert artifact.channels == {}
    assert "channels.safetensors" not in json.loads((artifact.path / "manifest.json").read_text())["files"]
