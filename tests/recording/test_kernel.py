"""A kernel on its own: right, whatever the arrays are like; and refused, whatever is wrong with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from relax_llm.errors import InputError
from tests.recording.conftest import DOWN

if TYPE_CHECKING:
    from collections.abc import Callable

    import relax_llm as rl
    from relax_llm.runtime.kernel import CompiledKernel


@pytest.fixture(scope="module")
def down(artifact: rl.Artifact) -> CompiledKernel:
    """One of the kernels in C."""
    return artifact.kernel("few_rows")


def test_it_computes_what_it_is_for(down: CompiledKernel) -> None:
    assert [one.name for one in down.arguments] == ["x", "weight", "bias", "residual", "out"]
    for rows in (1, 2, 8):
        x, weight, bias, residual, out = down.random(seed=rows, M=rows)
        assert down(x, weight, bias, residual, out) is out
        np.testing.assert_allclose(out, x @ weight.T + bias + residual, rtol=1e-5, atol=1e-5)
        assert out.any()


def test_the_weight_of_a_site_is_the_model_s(artifact: rl.Artifact, down: CompiledKernel) -> None:
    names = [weight.name for weight in artifact.manifest.weights]
    stored = artifact.weights()[names.index("model.layers.0.mlp.down_proj.weight")]
    assert np.array_equal(down.weight(DOWN), stored)
    assert [weight.shape for weight in down.weights(DOWN)] == [(24, 20), (24,)]


def test_every_kernel_can_be_called_and_timed(artifact: rl.Artifact) -> None:
    names = [
        (served.kernel, symbol)
        for symbol, dispatcher in artifact.manifest.dispatchers.items()
        for served in dispatcher.kernels
    ]
    assert len(names) > 8
    sites = {launch.kernel: launch.site for f in artifact.manifest.functions.values() for launch in f}
    found = [artifact.kernel(name, site=sites[symbol], operator="matmul") for name, symbol in names]
    found += [artifact.kernel(symbol) for symbol in artifact.manifest.kernels]
    for kernel in found:
        sizes = {"M": max(1, kernel.sizes["M"][0])} if kernel.operator == "matmul" else {"seq": 3}
        arguments = kernel.random(**sizes)
        before = [value.copy() if isinstance(value, np.ndarray) else value for value in arguments]
        assert kernel.time(*arguments, repeat=1) > 0
        for value, kept in zip(arguments, before, strict=True):
            assert np.array_equal(value, kept)
        out = kernel(*arguments)
        assert np.isfinite(out).all()
        assert out.any()


def test_kernels_of_one_problem_agree(artifact: rl.Artifact) -> None:
    site = "layers.0.self_attn.o_proj"
    arguments = artifact.kernel("tiled", site=site).random(M=17)
    one, other = (artifact.kernel(name, site=site)(*arguments[:-1]) for name in ("tiled", "blocked"))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    whole = artifact.kernel(site=site)
    assert np.array_equal(whole(*arguments[:-1]), artifact.kernel(site=site, M=17)(*arguments[:-1]))


def test_arrays_that_lie_badly_are_copied(down: CompiledKernel) -> None:
    x, weight, bias, residual, _ = down.random(M=5)
    expected = down(x, weight, bias, residual).copy()
    off = np.zeros(x.nbytes + 4, np.uint8)[4:].view(np.float32).reshape(x.shape)
    off[...] = x
    assert off.ctypes.data % 64
    wide = np.full((1, 5, 48), 7, np.float32)
    frozen = weight.copy()
    frozen.flags.writeable = False
    down(off, frozen, bias, residual, wide[:, :, ::2])
    assert np.array_equal(wide[:, :, ::2], expected)
    assert (wide[:, :, 1::2] == 7).all()
    flat = np.zeros((5, 24), np.float32)
    assert down(x[0], weight, bias, residual[0], flat) is flat
    assert np.array_equal(flat, expected[0])
    assert down(x[0], weight, bias, residual[0]).shape == (5, 24)


def test_caches_grow_in_place_and_are_put_back_by_timing(artifact: rl.Artifact) -> None:
    append = artifact.kernel("by_position", operator="append")
    qkv, rope, k_cache, v_cache, kv_len, q = append.random(seq=3, kv_len=20)
    before = k_cache.copy()
    append.time(qkv, rope, k_cache, v_cache, kv_len, q)
    assert np.array_equal(k_cache, before)
    append(qkv, rope, k_cache, v_cache, kv_len, q)
    assert 0 < (k_cache != before).sum() <= 3 * 2 * 6


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "too few": (lambda k, x, w, b, r, o: k(x, w), "takes 5 arguments"),
    "another type": (lambda k, x, w, b, r, o: k(x, w, b, r.astype(np.float64)), "not float64"),
    "another shape": (lambda k, x, w, b, r, o: k(x, w.T, b, r), "takes weight"),
    "other rows": (lambda k, x, w, b, r, o: k(x, w, b, r[:, :3]), "seq is 5 in one and 3"),
    "a list": (lambda k, x, w, b, r, o: k(x.tolist(), w, b, r), "as a NumPy array, not list"),
    "shared memory": (lambda k, x, w, b, r, o: k(x, w, b, o, o), "share memory"),
    "more rows than it serves": (lambda k, *_: k(*k.random(M=9)), "serves M = 1..8, not M = 9"),
    "an unknown size": (lambda k, *_: k.random(Q=1), "no size 'Q'"),
    "no rows": (lambda k, *_: k.random(M=0), "positive whole number"),
    "no repeats": (lambda k, *given: k.time(*given, repeat=0), "repeat must be positive|positive whole"),
    "another site": (lambda k, *_: k.weight("norm"), "does not serve 'norm'"),
}


@pytest.mark.parametrize(("call", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_refused(down: CompiledKernel, call: Callable[..., Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        call(down, *down.random(M=5))


def test_a_read_only_output_is_refused(down: CompiledKernel) -> None:
    *inputs, out = down.random(M=2)
    out.flags.writeable = False
    with pytest.raises(InputError, match="read-only"):
        down(*inputs, out)


def test_values_that_would_lead_out_of_an_array_are_refused(artifact: rl.Artifact) -> None:
    embedding = artifact.kernel(site="embed_tokens", operator="embedding")
    ids, table, _ = embedding.random(M=4)
    for bad in (-1, 37):
        ids[0, 2] = bad
        with pytest.raises(InputError, match="from 0 to 36"):
            embedding(ids, table)
    attention = artifact.kernel("streaming")
    q, k_cache, v_cache, _, _ = attention.random(seq=3, kv_len=20)
    for kv_len, said in ((65, "room for 64 tokens"), (2, "at least seq"), (0, "positive")):
        with pytest.raises(InputError, match=said):
            attention(q, k_cache, v_cache, kv_len)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"name": "tiled"}, "is not one kernel; .* tiled of matmul_"),
        ({"name": "fastest"}, "no kernel 'fastest'"),
        ({"name": "tiled", "site": DOWN}, "few_rows .M = 1..8., any_rows"),
        ({"name": "few_rows", "site": "layers.7.mlp.down_proj"}, "named like layers.0.mlp.down_proj"),
        ({"site": "layers.0.self_attn"}, "say an operator"),
        ({"name": "few_rows", "M": 9}, "does not serve M = 9"),
    ],
)
def test_a_kernel_that_is_not_one_is_refused(artifact: rl.Artifact, how: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        artifact.kernel(**how)
