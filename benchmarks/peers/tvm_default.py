"""TVM as it comes: a Llama of `relax.frontend.nn` with TVM's own paged KV cache, through its default pipeline."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models import Forms
from benchmarks.peers.engine import Answer, Stamps

NAME = "TVM"
PACKAGE = "apache-tvm"
VARIANTS = {"f32": ("default pipeline",), "bf16": (), "q8": (), "q4": ()}

CONTEXT, CHUNK, PAGE = 2048, 1024, 16


def prepare(forms: Forms, variant: str) -> Path:
    """Compile; the weights stay where they are."""
    source = forms.huggingface("float32")

    def build(path: Path) -> None:
        from tvm import relax
        from tvm.target import Target, codegen

        path.mkdir()
        target = Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu(), "num-cores": os.cpu_count()})
        module, names = _export(json.loads((source / "config.json").read_text()), target)
        with target:
            executable = relax.build(module, target, relax_pipeline=relax.get_default_pipeline(target))
        executable.export_library(str(path / "library.so"))
        (path / "weights.json").write_text(json.dumps({"directory": str(source), "names": names}))

    return forms.made("tvm-default", build)


def _export(config: dict[str, Any], target: Any) -> tuple[Any, list[str]]:
    """The model as a Relax module, and the names of its parameters."""
    from tvm import relax, tirx
    from tvm.relax.frontend import nn
    from tvm.relax.frontend.nn import op
    from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode, TIRPagedKVCache

    hidden, heads, kv_heads = (
        config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    head_dim, intermediate, vocab = config["head_dim"], config["intermediate_size"], config["vocab_size"]

    class Attention(nn.Module):
        def __init__(self) -> None:
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
                nn.Linear(inputs, outputs, bias=False)
                for inputs, outputs in (
                    (hidden, heads * head_dim),
                    (hidden, kv_heads * head_dim),
                    (hidden, kv_heads * head_dim),
                    (heads * head_dim, hidden),
                )
            )

        def forward(self, x: nn.Tensor, cache: PagedKVCache, layer: int) -> nn.Tensor:
            batch, seq, _ = x.shape
            qkv = op.concat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
            qkv = op.reshape(qkv, (batch, seq, heads + 2 * kv_heads, head_dim))
            mixed = cache.attention_with_fused_qkv(layer, qkv, heads, head_dim**-0.5)
            return self.o_proj(op.reshape(mixed, (batch, seq, heads * head_dim)))

    class MLP(nn.Module):
        def __init__(self) -> None:
            self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
            self.up_proj = nn.Linear(hidden, intermediate, bias=False)
            self.down_proj = nn.Linear(intermediate, hidden, bias=False)

        def forward(self, x: nn.Tensor) -> nn.Tensor:
            return self.down_proj(op.silu(self.gate_proj(x)) * self.up_proj(x))

    class Block(nn.Module):
        def __init__(self) -> None:
            self.input_layernorm, self.post_attention_layernorm = (
                nn.RMSNorm(hidden, -1, config["rms_norm_eps"], bias=False) for _ in range(2)
            )
            self.self_attn, self.mlp = Attention(), MLP()

        def forward(self, x: nn.Tensor, cache: PagedKVCache, layer: int) -> nn.Tensor:
            x = x + self.self_attn(self.input_layernorm(x), cache, layer)
            return x + self.mlp(self.post_attention_layernorm(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            self.embed_tokens = nn.Embedding(vocab, hidden)
            self.layers = nn.ModuleList([Block() for _ in range(config["num_hidden_layers"])])
            self.norm = nn.RMSNorm(hidden, -1, config["rms_norm_eps"], bias=False)

    class Llama(nn.Module):
        def __init__(self) -> None:
            self.model = Model()
            self.lm_head = None if config["tie_word_embeddings"] else nn.Linear(hidden, vocab, bias=False)

        def forward(self, ids: nn.Tensor, cache: PagedKVCache) -> tuple[nn.Tensor, PagedKVCache]:
            model: Any = self.model
            x = model.embed_tokens(ids)
            for layer, block in enumerate(model.layers):
                x = block(x, cache, layer)
            x = model.norm(x)

            def last(x: Any) -> Any:
                from tvm import te

                return te.compute((1, 1, hidden), lambda i, _, k: x[i, x.shape[1] - 1, k], name="last")

            x = op.tensor_expr_op(last, "last", [x])
            if self.lm_head is not None:
                return self.lm_head(x), cache
            return op.matmul(x, op.permute_dims(model.embed_tokens.weight)), cache

        def start(self) -> PagedKVCache:
            def size(value: int) -> Any:
                return tirx.IntImm("int64", value)

            return TIRPagedKVCache(
                attn_kind="mha",
                max_batch_size=size(1),
                max_total_seq_len=size(CONTEXT),
                prefill_chunk_size=size(CONTEXT),
                page_size=size(PAGE),
                support_sliding_window=size(0),
                layer_partition=relax.ShapeExpr([0, config["num_hidden_layers"]]),
                num_hidden_layers=config["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                qk_head_dim=head_dim,
                v_head_dim=head_dim,
                mla_original_qk_head_dim=0,
                mla_original_v_head_dim=0,
                rope_mode=RopeMode.NORMAL,
                rope_scale=1,
                rope_theta=int(config["rope_theta"]),
                rope_scaling={},
                rope_ext_factors=relax.prim_value(0),
                rotary_dim=head_dim,
                enable_disaggregation=False,
                dtype="float32",
                target=target,
            )

    mode = {"param_mode": "packed", "effect_mode": "none"}
    cache = nn.spec.Object(object_type=PagedKVCache)
    module, parameters = Llama().export_tvm(
        spec={
            "forward": {"ids": nn.spec.Tensor([1, "seq"], "int32"), "cache": cache, "$": mode},
            "start": {"$": {"param_mode": "none", "effect_mode": "none"}},
        }
    )
    return module, [name for name, _ in parameters]


def load(path: Path, variant: str, threads: int) -> Answer:
    """Load the library and the weights."""
    os.environ["TVM_NUM_THREADS"] = str(threads)
    os.environ["TVM_BIND_THREADS"] = "0"
    import tvm
    from safetensors.numpy import load_file
    from tvm import relax
    from tvm_ffi import Shape

    weights = json.loads((path / "weights.json").read_text())
    tensors = load_file(Path(weights["directory"]) / "model.safetensors")
    device = tvm.cpu()
    parameters = [tvm.runtime.tensor(tensors[name], device) for name in weights["names"]]
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(path / "library.so")), device)
    start, forward = machine["start"], machine["forward"]
    begin, add, end = (
        tvm.get_global_func(f"vm.builtin.kv_state_{name}")
        for name in ("begin_forward", "add_sequence", "end_forward")
    )

    def answer(token_ids: Sequence[int], count: int) -> Stamps:
        cache = start()
        add(cache, 0)
        stamps: Stamps = []
        ids = list(token_ids)
        while len(stamps) < count:
            begin(cache, Shape([0]), Shape([len(ids)]))
            logits, _ = forward(tvm.runtime.tensor(np.array([ids], np.int32), device), cache, parameters)
            end(cache)
            stamps.append((int(logits.numpy()[0, -1].argmax()), time.perf_counter()))
            ids = [stamps[-1][0]]
        return stamps

    return answer
