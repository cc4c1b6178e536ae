"""Recipes: as data, as text, and computed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from relax_llm.compiler.recipes import (
    Concat,
    Decode,
    Encode,
    Estimate,
    Margins,
    Pack,
    Recipe,
    Source,
    Transpose,
    from_json,
    joined_name,
    to_json,
    weight_name,
)
from relax_llm.errors import CompileError
from relax_llm.formats import FORMATS, Blocks
from relax_llm.kernels.layout import TiledGroups

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

A, B, C = (
    np.random.default_rng(i).standard_normal(shape) for i, shape in enumerate([(5, 4), (3, 4), (4, 6)])
)
TENSORS = {"a.weight": A, "b.weight": B, "c.weight": C, "v": A[:, 0], "u": B[:, 0]}

CODED = FORMATS["q8"].encode(C.T + 1)  # other numbers, so that it shows whether blocks are taken

a, b, c = Source("a.weight"), Source("b.weight"), Source("c.weight")


class Stored:
    """Parameters in memory, of which the transpose of one is there in q8."""

    def __call__(self, name: str) -> Array:
        return TENSORS[name]

    def blocks(self, name: str, format: Blocks, *, transposed: bool) -> Array | None:
        return CODED if (name, format.name, transposed) == ("c.weight", "q8", True) else None


def _panels(matrix: Array, cols: int) -> Array:
    """Panels of `cols` rows, reduction-major, padded with zeros: written down once more, another way."""
    n, k = matrix.shape
    padded = np.zeros((-(-n // cols) * cols, k))
    padded[:n] = matrix
    return np.stack([panel.T for panel in np.split(padded, len(padded) // cols)])


CASES: list[tuple[Recipe, Array, str, list[str]]] = [
    (a, A, "a.weight", ["a.weight"]),
    (Transpose(c), C.T, "transpose(c.weight)", ["c.weight"]),
    (Concat((a, b)), np.vstack([A, B]), "concat(a.weight, b.weight)", ["a.weight", "b.weight"]),
    (Concat((Source("v"), Source("u"))), np.hstack([A[:, 0], B[:, 0]]), "concat(v, u)", ["v", "u"]),
    (Pack(a, "tiled16"), _panels(A, 16), "tiled16(a.weight)", ["a.weight"]),
    (
        Pack(Concat((a, b, Transpose(c))), "tiled4"),
        _panels(np.vstack([A, B, C.T]), 4),
        "tiled4(concat(a.weight, b.weight, transpose(c.weight)))",
        ["a.weight", "b.weight", "c.weight"],
    ),
    (
        Pack(Concat((b, b)), "tiled4_gated"),
        np.concatenate([_panels(B, 2), _panels(B, 2)], axis=2),
        "tiled4_gated(concat(b.weight, b.weight))",
        ["b.weight", "b.weight"],
    ),
    (Transpose(Transpose(a)), A, "transpose(transpose(a.weight))", ["a.weight"]),
    (
        Encode(Concat((a, b)), "bf16"),
        FORMATS["bf16"].encode(np.vstack([A, B]).astype(np.float32)),
        "bf16(concat(a.weight, b.weight))",
        ["a.weight", "b.weight"],
    ),
    (
        Pack(Encode(Concat((Transpose(c), a)), "q8"), "tiled16_q8"),
        TiledGroups(16).pack(np.vstack([CODED, FORMATS["q8"].encode(A.astype(np.float32))])),
        "tiled16_q8(q8(concat(transpose(c.weight), a.weight)))",
        ["c.weight", "a.weight"],
    ),
    (
        Decode(Encode(a, "bf16"), "bf16", 4),
        FORMATS["bf16"].decode(FORMATS["bf16"].encode(A.astype(np.float32)), 4),
        "float(bf16(a.weight))",
        ["a.weight"],
    ),
    (
        Pack(Estimate(Decode(Encode(Transpose(c), "q8"), "q8", 4), "q4s"), "tiled16_q4s"),
        TiledGroups(16, format="q4s").pack(FORMATS["q4s"].encode(FORMATS["q8"].decode(CODED, 4))),
        "tiled16_q4s(estimate_q4s(float(q8(transpose(c.weight)))))",
        ["c.weight"],
    ),
]


@pytest.mark.parametrize(("recipe", "expected", "text", "sources"), CASES, ids=[case[2] for case in CASES])
def test_recipe(recipe: Recipe, expected: Array, text: str, sources: list[str]) -> None:
    np.testing.assert_array_equal(recipe.make(Stored()), expected)
    assert str(recipe) == text
    assert recipe.sources() == sources
    assert from_json(to_json(recipe)) == recipe


@pytest.mark.parametrize("format", ["q8", "q4"])
def test_margins_hold_at_the_worst_x(format: str) -> None:
    """Where x is the difference itself, Cauchy and Schwarz have nothing to spare; rounding has the rest."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((5000, 70)).astype(np.float32)
    matrix[7], matrix[4500, 3] = 0, np.inf

    class Large(Stored):
        def __call__(self, name: str) -> Array:
            return matrix

    margins = Margins(a, format).make(Large())
    assert margins.dtype == np.float32
    assert margins.shape == (5000,)
    assert np.isinf(margins[4500])
    assert margins[7] == 0
    finite = np.delete(matrix, 4500, axis=0).astype(np.float64)
    rough = FORMATS[format].decode(FORMATS[format].encode(finite.astype(np.float32)), 70)
    apart = finite - rough
    needed = np.linalg.norm(apart, axis=1)
    assert (np.delete(margins, 4500) >= needed).all()
    assert (np.delete(margins, 4500) <= 1.01 * needed + 1e-3 * np.linalg.norm(finite, axis=1)).all()
    recipe = Margins(Decode(Encode(a, "bf16"), "bf16", 4), format)
    assert str(recipe) == f"margins_{format}(float(bf16(a.weight)))"
    assert from_json(to_json(recipe)) == recipe
    assert recipe.sources() == ["a.weight"]


def test_an_estimate_has_a_name_of_its_own() -> None:
    """It is at a site of its own, so that a plan or a pattern for the matrix is none for it."""
    assert weight_name(Pack(Encode(a, "q8"), "tiled32_q8")) == "a.weight"
    assert weight_name(Pack(Estimate(a, "q6"), "tiled32_q6")) == "a.estimate.weight"
    assert weight_name(Margins(a, "q6")) == "a.weight"


def test_what_a_format_cannot_hold_is_refused() -> None:
    class Large(Stored):
        def __call__(self, name: str) -> Array:
            return np.full((2, 40), 1e9, np.float32)

    for name in ("f16", "q8", "q4", "q4s"):
        with pytest.raises(CompileError, match=rf"a.weight cannot be stored as {name}: .*1e\+09"):
            Encode(a, name).make(Large())


def test_json() -> None:
    recipe = Pack(Concat((a, Transpose(b))), "tiled32")
    expected = [
        "pack",
        "tiled32",
        ["concat", [["source", "a.weight"], ["transpose", ["source", "b.weight"]]]],
    ]
    assert json.loads(to_json(recipe)) == expected


recipes = st.recursive(
    st.builds(Source, st.text()),
    lambda inner: (
        st.builds(Transpose, inner)
        | st.builds(Concat, st.lists(inner, min_size=1, max_size=3).map(tuple))
        | st.builds(Pack, inner, st.sampled_from(["tiled16", "tiled32_gated"]))
    ),
    max_leaves=8,
)


@given(recipes)
def test_any_recipe_survives_json(recipe: Recipe) -> None:
    assert from_json(to_json(recipe)) == recipe
    assert hash(from_json(to_json(recipe))) == hash(recipe)


NAMES = {
    ("a.b.weight",): "a.b.weight",
    ("l.3.mlp.gate.weight", "l.3.mlp.up.weight"): "l.3.mlp.gate+up.weight",
    ("l.3.q.weight", "l.3.k.weight", "l.3.v.weight"): "l.3.q+k+v.weight",
    ("l.3.q.bias", "l.3.k.bias"): "l.3.q+k.bias",
    ("a.weight", "b.c.weight"): "a+b.c.weight",
    ("x", "y"): "x+y",
    ("a.weight", "a.weight"): "a.weight+weight",
    ("a.weight", "a.bias"): "a.weight+bias",
    ("a.x", "b.y"): "a.x+b.y",
}


@pytest.mark.parametrize("names", list(NAMES))
def test_joined_names(names: tuple[str, ...]) -> None:
    assert joined_name(list(names)) == NAMES[names]
