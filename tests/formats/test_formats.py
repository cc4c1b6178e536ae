"""Formats: what they keep, bit for bit as GGUF has it, and how well they are fitted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from relax_llm.formats import FORMATS, Blocks, Floats, fit

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Array = npt.NDArray[Any]

BLOCKS = {form.name: form for form in FORMATS.values() if isinstance(form, Blocks)}
KINDS = {
    name: gguf.GGMLQuantizationType[form.stored_as.upper()] for name, form in BLOCKS.items() if form.stored_as
}
blocks = pytest.mark.parametrize("name", BLOCKS)
blocks_of_files = pytest.mark.parametrize("name", KINDS)
SHAPES = [(1, 1), (3, 31), (3, 32), (5, 33), (2, 100)]


def _normal(n: int, k: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, n, k]).standard_normal((n, k), np.float32)


def _bits(values: Array) -> Array:
    return values.view(np.uint32)


def _error(found: Array, matrix: Array) -> float:
    return float(np.square(found.astype(np.float64) - matrix).sum())


def test_names_and_bits() -> None:
    assert {name: form.bits for name, form in FORMATS.items()} == {
        "f32": 32, "bf16": 16, "f16": 16, "q8": 8.5, "q6": 6.5, "q4": 5, "q4s": 4.5,
    }  # fmt: skip
    assert all(name == form.name for name, form in FORMATS.items())


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(form: Floats | Blocks, shape: tuple[int, int]) -> None:
    n, k = shape
    stored = form.encode(_normal(n, k))
    assert stored.shape == form.shape(n, k)
    assert stored.dtype.name == form.dtype
    assert stored.nbytes == form.nbytes(n, k)
    decoded = form.decode(stored, k)
    assert decoded.shape == shape
    assert decoded.dtype == np.float32


@pytest.mark.parametrize(("name", "kind"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_floats_are_rounded_to_nearest(name: str, kind: Any) -> None:
    matrix = _normal(7, 33) * np.float32(0.02)
    form = FORMATS[name]
    np.testing.assert_array_equal(
        form.decode(form.encode(matrix), 33), matrix.astype(kind).astype(np.float32)
    )
    matrix[0, 0] = np.nan
    matrix[1, 1] = np.inf
    decoded = form.decode(form.encode(matrix), 33)
    assert np.isnan(decoded[0, 0])
    assert decoded[1, 1] == np.inf


def test_f32_is_the_matrix_itself() -> None:
    matrix = _normal(3, 5)
    assert FORMATS["f32"].encode(matrix) is matrix or np.shares_memory(FORMATS["f32"].encode(matrix), matrix)


@blocks_of_files
def test_blocks_are_those_of_gguf(name: str) -> None:
    """Any codes, any finite scales: decoded to the same bits."""
    form = BLOCKS[name]
    random = np.random.default_rng(3)
    stored = random.integers(0, 256, form.shape(50, 320), np.uint8)
    assert form.block_bytes == gguf.GGML_QUANT_SIZES[KINDS[name]][1]
    parts = form.split(stored)
    scales = random.standard_normal(parts.scales.shape).astype(np.float16)
    scales[0, :3] = np.float16(6e-8), np.float16(0), np.float16(-65504)
    stored = form.join(type(parts)(parts.codes, scales, None if parts.minimums is None else -scales))
    theirs = gguf.quants.dequantize(stored, KINDS[name])
    np.testing.assert_array_equal(_bits(form.decode(stored, 320)), _bits(theirs))


@blocks
def test_join_undoes_split(name: str) -> None:
    form = BLOCKS[name]
    stored = np.random.default_rng(1).integers(0, 256, form.shape(9, 70), np.uint8)
    parts = form.split(stored)
    assert parts.codes.shape == (9, 3, 32)
    assert parts.codes.max() == 2**form.code_bits - 1
    np.testing.assert_array_equal(form.join(parts), stored)


@blocks
def test_the_rest_of_the_last_group_is_zero(name: str) -> None:
    form = BLOCKS[name]
    stored = form.encode(_normal(4, 37) + 3)
    parts = form.split(stored)
    assert (parts.codes[:, 1, 5:] == form.zero).all()
    whole = form.encode(np.hstack([_normal(4, 37) + 3]))
    np.testing.assert_array_equal(stored, whole)
    alone = form.encode(np.ascontiguousarray((_normal(4, 37) + 3)[:, 32:]))
    np.testing.assert_array_equal(parts.scales[:, 1:], form.split(alone).scales)


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator], Array]] = {
    "normal": lambda random: random.standard_normal((64, 512)),
    "heavy tails": lambda random: random.standard_t(3, (64, 512)),
    "uniform, off centre": lambda random: random.uniform(-1, 3, (64, 512)),
    "sparse": lambda random: random.standard_normal((64, 512)) * (random.random((64, 512)) < 0.2),
    "one large": lambda random: random.standard_normal((64, 512)) + 20 * (random.random((64, 512)) < 1 / 32),
}


@blocks_of_files
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_fit_beats_plain_rounding(name: str, distribution: str) -> None:
    """By the weighted error that it minimises; that of plain rounding is GGUF's own, at equal bits."""
    form = BLOCKS[name]
    matrix = DISTRIBUTIONS[distribution](np.random.default_rng(0)).astype(np.float32) * np.float32(0.02)
    groups = matrix.reshape(-1, 32)
    weight = (groups**2 + (groups**2).mean(axis=1, keepdims=True)).reshape(matrix.shape)
    weight = np.sqrt(weight) if name == "q4" else weight
    theirs = gguf.quants.dequantize(gguf.quants.quantize(matrix, KINDS[name]), KINDS[name])
    ours = form.decode(form.encode(matrix), 512)
    root = np.sqrt(weight)
    bound = {"q8": 1.0, "q4": 0.95, "q4s": 1.0}[name]
    assert _error(root * ours, root * matrix) < bound * _error(root * theirs, root * matrix)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_six_bits_lose_a_quarter_of_what_four_do(distribution: str) -> None:
    matrix = DISTRIBUTIONS[distribution](np.random.default_rng(0)).astype(np.float32)
    lost = {name: _error(BLOCKS[name].decode(BLOCKS[name].encode(matrix), 512), matrix) for name in BLOCKS}
    assert 9 * lost["q8"] < lost["q6"] < lost["q4s"] / 9  # squares; a step is 4 times as large


@blocks
def test_numbers_on_a_grid_are_found(name: str) -> None:
    """A format's own numbers are encoded without loss, where a group uses its whole range."""
    form = BLOCKS[name]
    random = np.random.default_rng(2)
    parts = form.split(form.encode(_normal(40, 320)))
    least = 1 if name == "q8" else 0  # -127: what rounding to 8 bits uses
    codes = random.integers(least, 2**form.code_bits, parts.codes.shape, np.uint8)
    codes[..., 0], codes[..., 1] = least, 2**form.code_bits - 1
    matrix = form.decode(form.join(type(parts)(codes, parts.scales, parts.minimums)), 320)
    again = form.decode(form.encode(matrix), 320)
    step = np.abs(parts.scales.astype(np.float32)).max()
    assert np.abs(again - matrix).max() < 0.06 * step


@blocks
def test_special_groups(name: str) -> None:
    form = BLOCKS[name]
    matrix = np.zeros((6, 32), np.float32)
    matrix[1] = 0.25  # the same everywhere
    matrix[2, 7] = -3.0  # one alone
    matrix[3] = 1e-9  # below what f16 holds
    matrix[4] = np.linspace(-1, 1, 32)
    matrix[4, 3] = np.nan
    matrix[5] = np.linspace(-1, 1, 32)
    matrix[5, 9] = np.inf
    decoded = form.decode(form.encode(matrix), 32)
    assert (decoded[0] == 0).all()
    np.testing.assert_allclose(decoded[1:3], matrix[1:3], rtol=5e-3, atol=2e-3)
    assert np.abs(decoded[3]).max() < 1e-6
    assert np.isnan(decoded[4:]).all()
    assert np.isfinite(decoded[:4]).all()


@pytest.mark.parametrize("name", ["f16", *BLOCKS])
def test_what_f16_cannot_hold_is_refused(name: str) -> None:
    matrix = _normal(3, 40)
    matrix[2, 39] = -70_000
    with pytest.raises(OverflowError, match=r"up to 7e\+04.*65,504; use bf16"):
        FORMATS[name].encode(matrix)
    matrix[2, 39] = 65_504
    assert np.isfinite(FORMATS[name].decode(FORMATS[name].encode(matrix), 40)).all()


def test_each_row_is_encoded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that parts of a joined matrix may be encoded before they are joined; and in parts of any size."""
    matrix = _normal(41, 70)
    for form in BLOCKS.values():
        whole = form.encode(matrix)
        np.testing.assert_array_equal(whole[5:9], form.encode(matrix[5:9]))
        with monkeypatch.context() as patch:
            patch.setattr(fit, "_AT_ONCE", 200)
            np.testing.assert_array_equal(whole, form.encode(matrix))


CONVERSIONS = {("q4s", "q4"), ("q4s", "q6"), ("q4s", "q8"), ("q6", "q8"), *((name, name) for name in BLOCKS)}


@blocks
@pytest.mark.parametrize("to", BLOCKS)
def test_conversions_lose_nothing(name: str, to: str) -> None:
    form, other = BLOCKS[name], BLOCKS[to]
    stored = form.encode(_normal(6, 70))
    found = form.converted(stored, other)
    assert (found is not None) == ((name, to) in CONVERSIONS)
    if found is not None:
        np.testing.assert_array_equal(other.decode(found, 70), form.decode(stored, 70))


def test_a_conversion_that_would_overflow_is_none() -> None:
    form = BLOCKS["q4s"]
    parts = form.split(form.encode(_normal(1, 32)))
    stored = form.join(type(parts)(parts.codes, np.full((1, 1), 9000, np.float16)))
    assert form.converted(stored, BLOCKS["q4"]) is None
    assert form.converted(stored, BLOCKS["q8"]) is not None
