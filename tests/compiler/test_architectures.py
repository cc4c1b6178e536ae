"""Which architecture serves a checkpoint: a built-in one, a class, a file; and what is said where none does."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm.compiler.architectures import builtin, find
from relax_llm.errors import ArchitectureError
from relax_llm.models.gpt2 import GPT2 as GPT2_DECODER
from relax_llm.models.llama import Llama

from ..artifact.checkpoints import LLAMA, write
from ..machines import PLAINER

if TYPE_CHECKING:
    from pathlib import Path

MINE = '''
"""A model of one linear layer: the smallest that is one."""

from typing import ClassVar

from tvm.relax.frontend import nn

from relax_llm import layers


class Bigram(layers.Decoder):
    model_types: ClassVar[tuple[str, ...]] = ("bigram",)

    def __init__(self, config: layers.Fields) -> None:
        self.vocab_size = config.integer("vocab_size")
        self.context_length = config.integer("max_position_embeddings", 64)
        self.embed = layers.Embedding(self.vocab_size, config.integer("hidden_size"))
        self.head = layers.Linear(config.integer("hidden_size"), self.vocab_size)

    def hidden_states(self, token_ids: nn.Tensor, step: layers.Step) -> nn.Tensor:
        return self.embed(token_ids)

    def logits(self, hidden: nn.Tensor) -> nn.Tensor:
        return self.head(hidden)
'''
CONFIG: dict[str, Any] = {"model_type": "bigram", "vocab_size": 11, "hidden_size": 6}
SHAPES = {"embed.weight": (11, 6), "head.weight": (11, 6)}


def _tensors() -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def test_the_folder_is_the_registry() -> None:
    found = builtin()
    assert found["llama"] is found["mistral"] is Llama
    assert found["gpt2"] is GPT2_DECODER
    for model_type, decoder in found.items():
        assert find({"model_type": model_type}) is decoder
        assert find({"model_type": "whatever"}, model_type) is decoder


@pytest.mark.parametrize("config", [{}, {"model_type": "mamba9"}, {"model_type": None}, {"model_type": 7}])
def test_unknown_model_types_list_the_known_ones(config: dict[str, Any]) -> None:
    with pytest.raises(
        ArchitectureError, match=r"known: gpt2, llama, mistral.*architecture=MyModel"
    ) as caught:
        find(config)
    assert repr(config.get("model_type")) in str(caught.value)


def test_a_model_type_that_is_no_name() -> None:
    with pytest.raises(ArchitectureError, match="No architecture is known"):
        find({"model_type": ["llama"]})


@pytest.mark.parametrize("choice", [int, Exception])
def test_a_class_that_is_no_decoder(choice: Any) -> None:
    with pytest.raises(
        ArchitectureError, match=f"{choice.__name__} is not a subclass of relax_llm.layers.Decoder"
    ):
        find({}, choice)


def test_an_unknown_name() -> None:
    with pytest.raises(ArchitectureError, match=r"'lama'; known: gpt2, llama"):
        find({"model_type": "llama"}, "lama")


FILES: dict[str, tuple[str | bytes, str]] = {
    "no decoder": ("x = 1\n", "found: none"),
    "only an imported decoder": ("from relax_llm.models.llama import Llama\n", "found: none"),
    "two that fit": (MINE + MINE.replace("class Bigram", "class Other"), "found: Bigram, Other"),
    "an exception": ("raise KeyError('oops')\n", "fails: KeyError: 'oops'"),
    "a syntax error": ("def f(:\n", "fails: SyntaxError"),
    "an import that fails": ("import no_such_module_anywhere\n", "fails: ModuleNotFoundError"),
    "a system exit": ("import sys\nsys.exit(3)\n", "fails: SystemExit"),
    "no Python": (b"\x00\x01\xff", "fails: "),
    "an empty file": ("", "found: none"),
}


@pytest.mark.parametrize("case", list(FILES))
def test_files_that_cannot_be_used(tmp_path: Path, case: str) -> None:
    text, message = FILES[case]
    path = tmp_path / "mine.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = set(sys.modules)
    with pytest.raises(ArchitectureError, match=message) as caught:
        find({"model_type": "bigram"}, path)
    assert str(path) in str(caught.value)
    if message.startswith("fails"):
        assert not [name for name in set(sys.modules) - before if "mine" in name], (
            "half a module is importable"
        )


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match=r"nowhere\.py does not exist"):
        find({}, tmp_path / "nowhere.py")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(ArchitectureError, match=r"folder\.py does not exist"):
        find({}, str(tmp_path / "folder.py"))


def test_of_several_the_one_for_the_model_type_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE + MINE.replace("class Bigram", "class Other").replace('"bigram"', '"other"'))
    assert find({"model_type": "bigram"}, path).__name__ == "Bigram"
    assert find({"model_type": "other"}, path).__name__ == "Other"


def test_one_is_taken_whatever_its_model_type(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    assert find({"model_type": "llama"}, str(path)).__name__ == "Bigram"


@pytest.mark.parametrize("way", ["a file", "a class"])
def test_a_model_of_ones_own_runs(tmp_path: Path, way: str) -> None:
    path = tmp_path / "my model.py"
    path.write_text(MINE)
    tensors = _tensors()
    checkpoint = write(tmp_path / "checkpoint", CONFIG, tensors)
    choice: Any = path if way == "a file" else find(CONFIG, path)
    artifact = rl.compile(
        checkpoint, architecture=choice, output=tmp_path / "out", cache=False, target=PLAINER
    )
    assert artifact.manifest.architecture.endswith(".Bigram")
    assert artifact.manifest.caches == ()
    runner = rl.Runner(artifact)
    state = runner.start(batch=2)
    ids = np.array([[1, 2, 3], [10, 0, 10]])
    expected = tensors["embed.weight"][ids] @ tensors["head.weight"].T
    np.testing.assert_allclose(runner.prefill(state, ids, output="all"), expected, atol=1e-5)
    expected = tensors["embed.weight"][[4, 5]] @ tensors["head.weight"].T
    np.testing.assert_allclose(runner.decode(state, [4, 5]), expected, atol=1e-5)
    fork = state.fork()
    fork.truncate(1)
    assert (state.length, fork.length) == (4, 1)
    runner.decode(fork, [0, 0])


BROKEN: dict[str, tuple[tuple[str, str], str]] = {
    "shapes that do not fit": (
        ("return self.head(hidden)", "return self.head(self.head(hidden))"),
        "Bigram cannot be traced",
    ),
    "no hidden states": (("def hidden_states", "def other"), "Bigram"),
    "an exception in the forward pass": (
        ("return self.embed(token_ids)", "raise RuntimeError('oops')"),
        r"Bigram cannot be traced.*oops",
    ),
    "a name that is not there": (
        ("return self.embed(", "return self.embedding("),
        "Bigram cannot be traced.*embedding",
    ),
    "a result that is no tensor": (
        ("return self.embed(token_ids)", "return None"),
        "Bigram cannot be traced",
    ),
    "an exception in the constructor": (
        ("self.vocab_size = config", "raise ZeroDivisionError('oops')\n        self.vocab_size = config"),
        "Bigram.*oops",
    ),
    "no vocabulary": (("self.vocab_size = config.integer", "config.integer"), "Bigram.*vocab_size"),
    "no context": (("self.context_length = config.integer", "config.integer"), "Bigram.*context_length"),
    "a field that is missing": (
        ('config.integer("hidden_size")', 'config.integer("depth")'),
        "'depth' is missing",
    ),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_architectures_that_are_broken(tmp_path: Path, case: str) -> None:
    """A mistake in a user's model is answered with a sentence that names the model."""
    (old, new), message = BROKEN[case]
    text = MINE.replace(old, new)
    if case == "no vocabulary":
        text = text.replace("self.vocab_size)", 'config.integer("vocab_size"))').replace(
            "Embedding(self.vocab_size,", 'Embedding(config.integer("vocab_size"),'
        )
    path = tmp_path / "mine.py"
    path.write_text(text)
    checkpoint = write(tmp_path / "checkpoint", CONFIG, _tensors())
    with pytest.raises(ArchitectureError, match=message):
        rl.compile(checkpoint, architecture=path, output=tmp_path / "out", cache=False)
    assert not (tmp_path / "out").exists()


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden_size is missing": ({"hidden_size": None}, "'hidden_size' is missing"),
    "hidden_size is text": ({"hidden_size": "24"}, "'hidden_size'"),
    "vocab_size is zero": ({"vocab_size": 0}, "'vocab_size'"),
    "vocab_size is true": ({"vocab_size": True}, "'vocab_size'"),
    "layers are negative": ({"num_hidden_layers": -1}, "'num_hidden_layers'"),
    "heads that cannot share": ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
    "an odd head_dim": ({"head_dim": 5}, "head_dim is 5, but rotary embeddings need an even one"),
    "an unknown activation": ({"hidden_act": "swoosh"}, "'swoosh', which is not supported; known: .*silu"),
    "an unknown rope": ({"rope_scaling": {"rope_type": "helix"}}, "rope_type 'helix' is not supported"),
    "a rope without its factor": ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
    "a rope that is a list": ({"rope_scaling": [1]}, "'rope_scaling'"),
    "an infinite eps": ({"rms_norm_eps": float("inf")}, "'rms_norm_eps'"),
    "a partial rotation": ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is not supported"),
    "dynamic scaling of one pair": (
        {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "head_dim is 2, but dynamic",
    ),
    "linear scaling by nothing": (
        {"rope_scaling": {"type": "linear", "factor": 0.0}},
        "'factor' must be positive",
    ),
    "a theta of zero": ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "'rope_theta'"),
}


@pytest.mark.parametrize("case", list(CONFIGS))
def test_configs_that_are_refused(tmp_path: Path, case: str) -> None:
    change, message = CONFIGS[case]
    checkpoint = write(tmp_path / "checkpoint", {**LLAMA, **change}, _tensors())
    with pytest.raises(rl.RelaxLLMError, match=message) as caught:
        rl.compile(checkpoint, output=tmp_path / "out", cache=False)
    assert "config.json" in str(caught.value)
    assert not (tmp_path / "out").exists()
