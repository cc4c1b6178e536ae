"""A traced function in NumPy gives what the compiled one gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tvm import relax

import relax_llm as rl
from relax_llm.compiler.architectures import find
from relax_llm.compiler.bindings import Edit
from relax_llm.compiler.build import construct
from relax_llm.compiler.evaluate import UnknownOperatorError, evaluate
from relax_llm.compiler.export import CACHES, export
from relax_llm.compiler.parameters import Reader, match
from relax_llm.kernels.machine import machine

from ..artifact.checkpoints import GPT2, LLAMA, gpt2_shapes, llama_shapes, tensors_for, write
from ..machines import PLAINER

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    Array = npt.NDArray[Any]

CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": {
        **LLAMA,
        "model_type": "mistral",
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": 7,
        "hidden_act": "gelu_pytorch_tanh",
        "num_hidden_layers": 2,
    },
    "gpt2 with gelu": {**GPT2, "activation_function": "gelu"},
}


def _values(checkpoint: rl.Checkpoint, ids: Array, function: str, kv_cache: str) -> list[Array]:
    """All values of a function, in order."""
    decoder = construct(find(checkpoint.config, None), checkpoint.config)
    edit = Edit(export(decoder, machine(PLAINER), kv_cache))
    line = next(line for line in edit.lines if line.name == function)
    found: list[Array] = []
    read = Reader(match(checkpoint, decoder), pytest.fail)
    evaluate(line, edit.problems(), ids, int(line.attrs[CACHES]), read, lambda _, value: found.append(value))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_what_compiled_code_gives(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    shapes = (gpt2_shapes if "gpt2" in name else llama_shapes)(config)
    checkpoint = rl.open_checkpoint(write(tmp_path / "checkpoint", config, tensors_for(shapes)))
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (1, 33)).astype(np.int32)
    runner = rl.Runner(rl.compile(checkpoint, target=PLAINER))
    for function, output in (("hidden", "hidden"), ("logits", "all")):
        expected = runner.prefill(runner.start(), ids, output=output)  # type: ignore[arg-type]
        *_, found = _values(checkpoint, ids, function, "f32")
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("kv_cache", ["bf16", "q8"])
def test_caches_that_round(kv_cache: str, tmp_path: Path) -> None:
    checkpoint = rl.open_checkpoint(write(tmp_path / "checkpoint", LLAMA))
    ids = np.random.default_rng(0).integers(0, LLAMA["vocab_size"], (1, 33)).astype(np.int32)
    *_, exact = _values(checkpoint, ids, "hidden", "f32")
    *_, found = _values(checkpoint, ids, "hidden", kv_cache)
    assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def test_one_token_and_no_more_than_is_needed(tmp_path: Path) -> None:
    checkpoint = rl.open_checkpoint(write(tmp_path / "checkpoint", LLAMA))
    values = _values(checkpoint, np.zeros((1, 1), np.int32), "hidden", "f32")
    assert values[-1].shape == (1, 1, LLAMA["hidden_size"])
    assert all(value.dtype in (np.float32, np.int32) for value in values)


def test_what_has_no_definition(tmp_path: Path) -> None:
    """A function of TIR without a problem, and an operator that is not in the table."""
    checkpoint = rl.open_checkpoint(write(tmp_path / "checkpoint", LLAMA))
    decoder = construct(find(checkpoint.config, None), checkpoint.config)
    edit = Edit(export(decoder, machine(PLAINER)))
    line = next(line for line in edit.lines if line.name == "hidden")
    read, caches = Reader(match(checkpoint, decoder), pytest.fail), int(line.attrs[CACHES])

    def run(problems: Any) -> None:
        evaluate(line, problems, np.zeros((1, 3), np.int32), caches, read, lambda *_: None)

    with pytest.raises(UnknownOperatorError, match="function of TIR"):
        run(dict.fromkeys(edit.problems()))
    first = next(iter(line))[0]
    line.rebind(first, relax.op.cumsum(first, axis=-1))
    with pytest.raises(UnknownOperatorError, match=r"relax\.cumsum"):
        run(edit.problems())
    line.rebind(first, relax.op.concat([line.params[0]], axis=7))
    with pytest.raises(UnknownOperatorError, match=r"relax\.concat as it is used here"):
        run(edit.problems())
