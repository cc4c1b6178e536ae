# ruff: noqa: B007, N805
# mypy: ignore-errors
# TVMScript has the form of Python, and a meaning of its own.
"""A model made by hand, whose kernels give themselves away: what each adds or multiplies tells which one ran."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from tvm.script import ir as I, relax as R, tirx as T

from relax_llm.artifact import artifact
from relax_llm.artifact.manifest import Argument, Dispatcher, Kernel, Launch, Manifest, Served, Weight
from relax_llm.artifact.weights import write
from relax_llm.plan.plan import Entry, Plan, Range
from relax_llm.plan.sizes import Box
from tests.runtime.libraries import build

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

VOCAB = 4

GATE = "layers.0.mlp.gate_proj+up_proj"
DOWN = "layers.1.mlp.down_proj"
ATTENTION = "layers.1.self_attn"

WEIGHTS = {GATE: 16.0, DOWN: 160.0, ATTENTION: 2.0}
"""Such that a result belongs to one choice of kernels only."""

ADD: Mapping[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "double": (2, {"M": [1, 4]}),
    "triple": (3, {"M": [3, 8]}),
}
"""How often each kernel of the sums adds the weight, and what it is valid for."""

SCALE: Mapping[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "square": (2, {"seq": [1, 1]}),
    "cube": (3, {"kv_len": [5, None]}),
}
"""How often each kernel of the products multiplies by the weight."""

ADD_RANGES: tuple[tuple[dict[str, Any], str], ...] = (({"M": [1, 2]}, "double"), ({"M": [3, None]}, "plain"))
SCALE_RANGES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"seq": [1, 1], "kv_len": [1, 6]}, "square"),
    ({"seq": [1, 1], "kv_len": [7, None]}, "cube"),
    ({"seq": [2, None]}, "single"),
)


@I.ir_module
class Model:
    """prefill: lookup, add, add, scale, copy; decode: lookup, scale, add, copy, add."""

    @T.prim_func(s_tir=True)
    def lookup(ids: T.handle, out: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8})
        batch, seq = T.int64(), T.int64()
        Ids = T.match_buffer(ids, (batch, seq), "int32")
        Out = T.match_buffer(out, (batch, seq, 4), "float32")
        for b, s, j in T.grid(batch, seq, 4):
            Out[b, s, j] = T.Cast("float32", Ids[b, s])

    @T.prim_func(s_tir=True)
    def copy(x: T.handle, out: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8})
        batch, seq = T.int64(), T.int64()
        X = T.match_buffer(x, (batch, seq, 4), "float32")
        Out = T.match_buffer(out, (batch, seq, 4), "float32")
        for b, s, j in T.grid(batch, seq, 4):
            Out[b, s, j] = X[b, s, j]

    @T.prim_func(s_tir=True)
    def add(x: T.handle, w: T.Buffer((4,), "float32"), out: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8})
        batch, seq = T.int64(), T.int64()
        X = T.match_buffer(x, (batch, seq, 4), "float32")
        Out = T.match_buffer(out, (batch, seq, 4), "float32")
        for b, s, j in T.grid(batch, seq, 4):
            if batch * seq <= T.int64(2):
                Out[b, s, j] = X[b, s, j] + w[j] * T.float32(2)
            else:
                Out[b, s, j] = X[b, s, j] + w[j]

    @T.prim_func(s_tir=True)
    def add__open(x: T.handle, w: T.Buffer((4,), "float32"), out: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8})
        batch, seq = T.int64(), T.int64()
        X = T.match_buffer(x, (batch, seq, 4), "float32")
        Out = T.match_buffer(out, (batch, seq, 4), "float32")
        index: T.int32 = T.call_packed("relax_llm.choose", "add", batch * seq)
        for b, s, j in T.grid(batch, seq, 4):
            Out[b, s, j] = X[b, s, j] + w[j] * T.Cast("float32", index + 1)

    @T.prim_func(s_tir=True)
    def scale(x: T.handle, w: T.Buffer((4,), "float32"), kv_len: T.int64, out: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8})
        batch, seq = T.int64(), T.int64()
        X = T.match_buffer(x, (batch, seq, 4), "float32")
        Out = T.match_buffer(out, (batch, seq, 4), "float32")
        for b, s, j in T.grid(batch, seq, 4):
            Out[b, s, j] = X[b, s, j] * w[j]
            if seq == T.int64(1):
                Out[b, s, j] = Out[b, s, j] * w[j]
                if kv_len >= T.int64(7):
                    Out[b, s, j] = Out[b, s, j] * w[j]

    @T.prim_func(s_tir=True)
    def scale__open(x: T.handle, w: T.Buffer((4,), "float32"), kv_len: T.int64, out: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "op_pattern": 8})
        batch, seq = T.int64(), T.int64()
        X = T.match_buffer(x, (batch, seq, 4), "float32")
        Out = T.match_buffer(out, (batch, seq, 4), "float32")
        index: T.int32 = T.call_packed("relax_llm.choose", "scale", batch, seq, kv_len)
        for b, s, j in T.grid(batch, seq, 4):
            Out[b, s, j] = X[b, s, j]
            for i in T.serial(index + 1):
                Out[b, s, j] = Out[b, s, j] * w[j]

    @R.function
    def prefill(
        token_ids: R.Tensor(("batch", "seq"), "int32"),
        length: R.Shape(["kv_len"]),
        caches: R.Tuple(),
        weights: R.Tuple(R.Tensor((4,), "float32"), R.Tensor((4,), "float32"), R.Tensor((4,), "float32")),
    ) -> R.Tensor(("batch", "seq", 4), "float32"):
        batch, seq, kv_len = T.int64(), T.int64(), T.int64()
        cls = Model
        with R.dataflow():
            h = R.call_tir(cls.lookup, (token_ids,), out_ty=R.Tensor((batch, seq, 4), "float32"))
            a = R.call_tir(cls.add, (h, weights[0]), out_ty=R.Tensor((batch, seq, 4), "float32"))
            b = R.call_tir(cls.add, (a, weights[1]), out_ty=R.Tensor((batch, seq, 4), "float32"))
            c = R.call_tir(cls.scale, (b, weights[2], kv_len), out_ty=R.Tensor((batch, seq, 4), "float32"))
            d = R.call_tir(cls.copy, (c,), out_ty=R.Tensor((batch, seq, 4), "float32"))
            R.output(d)
        return d

    @R.function
    def decode(
        token_ids: R.Tensor(("batch", "seq"), "int32"),
        length: R.Shape(["kv_len"]),
        caches: R.Tuple(),
        weights: R.Tuple(R.Tensor((4,), "float32"), R.Tensor((4,), "float32"), R.Tensor((4,), "float32")),
    ) -> R.Tensor(("batch", "seq", 4), "float32"):
        batch, seq, kv_len = T.int64(), T.int64(), T.int64()
        cls = Model
        with R.dataflow():
            h = R.call_tir(cls.lookup, (token_ids,), out_ty=R.Tensor((batch, seq, 4), "float32"))
            a = R.call_tir(cls.scale, (h, weights[2], kv_len), out_ty=R.Tensor((batch, seq, 4), "float32"))
            b = R.call_tir(cls.add, (a, weights[1]), out_ty=R.Tensor((batch, seq, 4), "float32"))
            c = R.call_tir(cls.copy, (b,), out_ty=R.Tensor((batch, seq, 4), "float32"))
            d = R.call_tir(cls.add, (c, weights[0]), out_ty=R.Tensor((batch, seq, 4), "float32"))
            R.output(d)
        return d


_ACTIVATION = ("batch", "seq", "4")


def _launch(site: str, kernel: str, weight: str = "") -> Launch:
    arguments = [Argument("activation", "", _ACTIVATION, "float32")]
    if kernel == "lookup":
        arguments = [Argument("activation", "", ("batch", "seq"), "int32")]
    if weight:
        arguments.append(Argument("weight", weight, ("4",), "float32"))
    if kernel == "scale":
        arguments.append(Argument("size", "kv_len", (), "int64"))
    return Launch(site, kernel, (*arguments, Argument("output", "", _ACTIVATION, "float32")))


_LOOKUP = _launch("embed", "lookup")
_GATE, _DOWN = _launch(GATE, "add", "gate"), _launch(DOWN, "add", "down")
_ATTENTION, _COPY = _launch(ATTENTION, "scale", "scale"), _launch(ATTENTION, "copy")

FUNCTIONS = {
    "prefill": (_LOOKUP, _GATE, _DOWN, _ATTENTION, _COPY),
    "decode": (_LOOKUP, _ATTENTION, _DOWN, _COPY, _GATE),
}

DISPATCHERS = {
    "add": Dispatcher(
        ("M",),
        tuple(Served(name, sizes) for name, (_, sizes) in ADD.items()),
        tuple(Served(name, sizes) for sizes, name in ADD_RANGES),
        "plain",
    ),
    "scale": Dispatcher(
        ("batch", "seq", "kv_len"),
        tuple(Served(name, sizes) for name, (_, sizes) in SCALE.items()),
        tuple(Served(name, sizes) for sizes, name in SCALE_RANGES),
        "single",
    ),
}

OPERATORS = {"lookup": "embedding", "add": "matmul", "scale": "attention", "copy": "append"}

AXES = ("batch", "seq", "kv_len")

PLAN = Plan(
    (
        Entry("embedding_4", "embedding", ("embed",), "", ("M",), (Range(Box(), "lookup_all"),)),
        Entry(
            "add",
            "matmul",
            (GATE, DOWN),
            "plain",
            ("M",),
            tuple(Range(Box.from_json(sizes), name) for sizes, name in ADD_RANGES),
        ),
        Entry(
            "scale",
            "attention",
            (ATTENTION,),
            "",
            AXES,
            tuple(Range(Box.from_json(sizes), name) for sizes, name in SCALE_RANGES),
        ),
    )
)


def make(directory: Path, *, has_clock: bool = True, **changes: Any) -> artifact.Artifact:
    """Compile the model into an artifact.

    Args:
        directory: A new one.
        has_clock: Whether its library has the clock that traces read.
        changes: Other values for fields of the manifest.
    """
    directory.mkdir()
    build(Model, directory / artifact.LIBRARY, has_clock=has_clock)
    names = (("gate", GATE), ("down", DOWN), ("scale", ATTENTION))
    weights = [Weight(name, name, (4,), "float32") for name, _ in names]
    values = {name: np.full(4, WEIGHTS[site], np.float32) for name, site in names}
    with (directory / artifact.WEIGHTS).open("wb") as file:
        write(file, weights, lambda weight: values[weight.name])
    (directory / artifact.PLAN).write_text(PLAN.to_json(), encoding="utf-8")
    fields: dict[str, Any] = {
        "versions": artifact.versions(),
        "target": "x86-64",
        "features": (),
        "architecture": "tests",
        "config": {},
        "generation_config": {},
        "weight_format": "f32",
        "vocab_size": VOCAB,
        "hidden_size": VOCAB,
        "context_length": 256,
        "caches": (),
        "weights": tuple(weights),
        "kernels": {symbol: Kernel(operator, {}, "1", "1") for symbol, operator in OPERATORS.items()},
        "functions": FUNCTIONS,
        "dispatchers": DISPATCHERS,
    }
    artifact.finish(directory, Manifest(**{**fields, **changes}))
    return artifact.load(directory, for_this_machine=False)


def prefill(token: int, gate: str, down: str, attention: str) -> float:
    """The logit of a token after a prefill in which these kernels ran."""
    hidden = token + ADD[gate][0] * WEIGHTS[GATE] + ADD[down][0] * WEIGHTS[DOWN]
    return float(hidden * WEIGHTS[ATTENTION] ** SCALE[attention][0])


def decode(token: int, gate: str, down: str, attention: str) -> float:
    """The logit of a token after a decode in which these kernels ran."""
    hidden = token * WEIGHTS[ATTENTION] ** SCALE[attention][0]
    return float(hidden + ADD[down][0] * WEIGHTS[DOWN] + ADD[gate][0] * WEIGHTS[GATE])
