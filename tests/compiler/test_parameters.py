"""Matching tensors to parameters: what is missing, too many or wrong is listed by name."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

import relax_llm as rl
from relax_llm.compiler.parameters import Reader, match
from relax_llm.errors import CheckpointError
from relax_llm.layers import Fields
from relax_llm.models import gpt2, llama

from ..artifact.checkpoints import GPT2, LLAMA, gpt2_shapes, llama_shapes, tensors_for, write
from ..machines import PLAINER

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Tensors = dict[str, Array]

NORM = "model.norm.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def _match(tmp_path: Path, tensors: Tensors, config: dict[str, Any] = LLAMA) -> dict[str, Any]:
    decoder = (gpt2.GPT2 if config["model_type"] == "gpt2" else llama.Llama)(Fields(config))
    return match(rl.open_checkpoint(write(tmp_path / "checkpoint", config, tensors)), decoder)


def _good() -> Tensors:
    return tensors_for(llama_shapes(LLAMA))


def test_a_checkpoint_that_fits(tmp_path: Path) -> None:
    found = _match(tmp_path, _good())
    assert found.keys() == _good().keys()
    assert all(name == tensor.name for name, tensor in found.items())


def _without(*names: str) -> Callable[[Tensors], Any]:
    return lambda tensors: [tensors.pop(name) for name in names]


def _many(tensors: Tensors) -> None:
    tensors.update({f"extra.{i}": np.zeros(1, np.float32) for i in range(12)})


PROBLEMS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "one is missing": (_without(NORM), r"it lacks model\.norm\.weight\."),
    "two are missing": (_without(NORM, DOWN), r"it lacks .*down_proj\.weight"),
    "most are missing": (
        _without(*(name for name in llama_shapes(LLAMA) if name != NORM)),
        r"it lacks .* and \d+ more",
    ),
    "one is unexpected": (
        lambda tensors: tensors.update({"model.layers.0.mlp.extra": np.zeros(3)}),
        r"has no place for model\.layers\.0\.mlp\.extra",
    ),
    "a layer too many": (
        lambda tensors: tensors.update({DOWN.replace("0", "1"): tensors[DOWN]}),
        r"has no place for model\.layers\.1\.mlp\.down_proj\.weight",
    ),
    "many are unexpected": (
        _many,
        r"has no place for model\.extra\.0|has no place for extra\.0.* and 4 more",
    ),
    "transposed": (
        lambda tensors: tensors.update({DOWN: np.ascontiguousarray(tensors[DOWN].T)}),
        r"other shapes: model\.layers\.0\.mlp\.down_proj\.weight \[20, 24\] instead of \[24, 20\]",
    ),
    "another rank": (
        lambda t: t.update({NORM: t[NORM][None]}),
        r"model\.norm\.weight \[1, 24\] instead of \[24\]",
    ),
    "a scalar": (lambda t: t.update({NORM: np.float32(1)}), r"model\.norm\.weight \[\] instead of \[24\]"),
    "everything at once": (
        lambda t: (t.pop(NORM), t.update({"model.x": np.zeros(1), DOWN: np.zeros((1, 1), np.float32)})),
        r"it lacks .*; the architecture has no place for .*; config\.json asks for other shapes",
    ),
}


@pytest.mark.parametrize("case", list(PROBLEMS))
def test_what_does_not_fit(tmp_path: Path, case: str) -> None:
    change, message = PROBLEMS[case]
    tensors = _good()
    change(tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        _match(tmp_path, {name: np.asarray(tensor) for name, tensor in tensors.items()})
    assert str(tmp_path / "checkpoint") in str(caught.value)
    assert "Llama" in str(caught.value)


def test_two_tensors_for_one_parameter(tmp_path: Path) -> None:
    """Some checkpoints leave the prefix out; one with both names says two things of one parameter."""
    tensors = _good()
    tensors["norm.weight"] = tensors[NORM] + 1
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        _match(tmp_path, tensors)


def test_names_without_the_prefix(tmp_path: Path) -> None:
    tensors = {name.removeprefix("model."): tensor for name, tensor in _good().items()}
    found = _match(tmp_path, tensors)
    assert found.keys() == _good().keys()
    assert found[NORM].name == "norm.weight"


def test_tensors_that_are_no_parameters(tmp_path: Path) -> None:
    tensors = _good()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert "lm_head.weight" not in _match(tmp_path, tensors)
    masks = tensors_for(gpt2_shapes(GPT2))
    masks["transformer.h.0.attn.bias"] = np.ones((1, 1, 150, 150), np.float32)
    assert _match(tmp_path / "gpt2", masks, GPT2).keys() == gpt2_shapes(GPT2).keys()


KINDS = {"NaN": np.nan, "infinite values": np.inf}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite_are_named(tmp_path: Path, kind: str, dtype: type) -> None:
    tensors: Tensors = {name: tensor.astype(dtype) for name, tensor in _good().items()}
    tensors[DOWN][3, 4] = KINDS[kind]
    said: list[str] = []
    read = Reader(_match(tmp_path, tensors), said.append)
    for name in tensors:
        value = read(name)
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, tensors[name].astype(np.float32))
    assert said == [f"Tensor {DOWN!r} contains {kind}; whatever passes through it is lost."]


def test_large_values_are_no_reason_to_warn(tmp_path: Path) -> None:
    tensors = _good()
    tensors[DOWN][:] = 3e38
    tensors[NORM][0], tensors[NORM][1] = 3.4e38, -3.4e38
    said: list[str] = []
    read = Reader(_match(tmp_path, tensors), said.append)
    for name in tensors:
        read(name)
    assert said == []


def test_infinities_of_both_signs_are_seen(tmp_path: Path) -> None:
    tensors = _good()
    tensors[NORM][:2] = np.inf, -np.inf
    said: list[str] = []
    Reader(_match(tmp_path, tensors), said.append)(NORM)
    assert len(said) == 1


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint8, bool])
def test_whole_numbers_are_refused(tmp_path: Path, dtype: type) -> None:
    tensors = _good()
    tensors[NORM] = np.ones(24, dtype)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors.*'model\.norm\.weight' holds \w+, not floats"
    ):
        Reader(_match(tmp_path, tensors), lambda _: None)(NORM)


def test_nan_in_weights_warns_once_and_stays_in_the_notes(tmp_path: Path) -> None:
    tensors = _good()
    tensors["model.embed_tokens.weight"][5, 5] = np.nan
    checkpoint = write(tmp_path / "checkpoint", LLAMA, tensors)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        artifact = rl.compile(checkpoint, output=tmp_path / "out", cache=False, target=PLAINER)
    sentence = "Tensor 'model.embed_tokens.weight' contains NaN; whatever passes through it is lost."
    assert [str(warning.message) for warning in caught if warning.category is RuntimeWarning] == [sentence]
    assert caught[0].filename == __file__, "the warning points at the user's line"
    assert sentence in artifact.manifest.notes
    runner = rl.Runner(artifact)
    assert np.isnan(runner.decode(runner.start(), 5)).all()
    clean = runner.decode(runner.start(), 4)
    assert np.isnan(clean[5]), "the head is tied: the logit of the bad row is lost"
    assert np.isfinite(np.delete(clean, 5)).all()
