"""Kernels of a user's for other operators than matmul, and the other forms, inside whole models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm.errors import ArtifactError, KernelError, PlanError
from tests.models.configurations import BY_NAME
from tests.models.reference import token_ids, write_checkpoint

from . import attention_kernels as theirs
from .kernels import C_SOURCE, in_script, script
from .test_user_kernels import logits_agree

LLAMA, GPT2 = "head-dim-20-attention-bias", "gpt2-three-heads-inner"
WINDOWED = next(name for name in BY_NAME if "window" in name)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("operators")
    return {name: write_checkpoint(BY_NAME[name], directory / name) for name in (LLAMA, GPT2, WINDOWED)}


def attention(**sizes: Any) -> dict[str, Any]:
    """A kernel of each form for attention."""
    return {
        "in_script": rl.kernel("attention", name="in_script", **sizes)(theirs.script),
        "over_heads": rl.kernel("attention", name="over_heads", **sizes)(theirs.over_heads),
        "in_c": rl.kernel("attention", name="in_c", **sizes)(lambda problem: theirs.C_SOURCE),
        "in_python": rl.kernel("attention", name="in_python", form="python", **sizes)(theirs.in_python),
    }


def served(artifact: rl.Artifact, site: str, **sizes: int) -> str:
    return artifact.plan.at(site, "attention").serving({"batch": 1, **sizes}).kernel


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((LLAMA, form) for form in ("in_script", "over_heads", "in_c", "in_python")),
        *((WINDOWED, form) for form in ("in_script", "over_heads", "in_c")),
        (GPT2, "over_heads"),
    ],
)
def test_attention_in_every_form(checkpoints: dict[str, Path], name: str, form: str) -> None:
    artifact = logits_agree(checkpoints[name], name, [attention()[form]], (1, 20, 70))
    entries = [entry for entry in artifact.plan.entries if entry.operator == "attention"]
    assert entries
    assert all(part.kernel == form for entry in entries for part in entry.ranges)


def test_attention_is_chosen_by_seq_and_kv_len(checkpoints: dict[str, Path]) -> None:
    kernels = [
        attention(seq=1, kv_len=(1, 16))["in_script"],
        attention(seq=1, kv_len=(17, None))["in_c"],
        attention(seq=(2, 19))["over_heads"],
    ]
    artifact = logits_agree(checkpoints[LLAMA], LLAMA, kernels, (1, 2, 19, 20, 70))
    site = artifact.manifest.caches[0].site
    assert served(artifact, site, seq=1, kv_len=16) == "in_script"
    assert served(artifact, site, seq=1, kv_len=17) == "in_c"
    assert served(artifact, site, seq=2, kv_len=17) == "over_heads"
    assert served(artifact, site, seq=20, kv_len=20) == "streaming"
    told = artifact.plan.explain(site, seq=1, kv_len=20)
    assert "seq = 1, kv_len >= 17: in_c" in told
    assert "over_heads (valid for seq = 2..19): serves seq = 2..19; checked at" in told


def test_one_layers_attention(checkpoints: dict[str, Path]) -> None:
    sites = [cache.site for cache in rl.compile(checkpoints[LLAMA]).manifest.caches]
    mine = attention(sites=sites[1])["in_script"]
    artifact = logits_agree(checkpoints[LLAMA], LLAMA, [mine], (5,))
    assert served(artifact, sites[1], seq=1, kv_len=1) == "in_script"
    assert served(artifact, sites[0], seq=1, kv_len=1) == "streaming"


def test_other_operators(checkpoints: dict[str, Path]) -> None:
    """Every operator's plain loops, as a schedule, in place of what ships."""
    for name in (LLAMA, GPT2):
        kernels = [
            rl.kernel(operator, name=f"{operator}_loops")(lambda schedule, problem: None)
            for operator in ("norm", "append", "last_token", "rope_table", "positions")
        ]
        kernels.append(
            rl.kernel("embedding", name="embedding_loops", m=(1, 8))(lambda schedule, problem: None)
        )
        artifact = logits_agree(checkpoints[name], name, kernels, (1, 9, 30))
        used = {part.kernel for entry in artifact.plan.entries for part in entry.ranges}
        assert {"norm_loops", "append_loops", "last_token_loops", "embedding_loops"} <= used


def by_rows(problem: Any, x: Any, weight: Any, out: Any) -> None:
    np.matmul(x, weight.T, out=out)


def test_a_python_kernel_runs_and_is_saved_by_name_only(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    mine = rl.kernel("matmul", form="python", sites="*.down_proj")(by_rows)
    artifact = logits_agree(checkpoints[LLAMA], LLAMA, [mine], (1, 20))
    with pytest.raises(ArtifactError, match=r"written in Python \(by_rows\)"):
        artifact.save(tmp_path / "refused")
    with pytest.raises(ArtifactError, match="written in Python"):
        rl.compile(checkpoints[LLAMA], kernels=[mine], output=tmp_path / "refused")
    saved = artifact.save(tmp_path / "saved", python_kernels=True)
    ids = token_ids(BY_NAME[LLAMA])[0, :12].tolist()
    runner = rl.Runner(artifact)
    np.save(tmp_path / "expected.npy", runner.prefill(runner.start(), ids))
    code = f"""
import numpy as np, pytest, relax_llm as rl
with pytest.raises(rl.RelaxLLMError, match="calls the Python kernel 'by_rows'"):
    rl.Runner(rl.load({str(saved.path)!r}))
calls = []
@rl.kernel("matmul", form="python")
def by_rows(problem, x, weight, out):
    calls.append((problem.n, x.shape))
    assert not weight.flags.writeable
    np.matmul(x, weight.T, out=out)
runner = rl.Runner(rl.load({str(saved.path)!r}, kernels=[by_rows]))
ours = runner.prefill(runner.start(), {ids})
np.testing.assert_array_equal(ours, np.load({str(tmp_path / "expected.npy")!r}))
assert [shape[0] for _, shape in calls] == [{len(ids)}] * (len(calls) - 1) + [1]  # of the last layer one token
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_a_python_kernel_raises_reaches_the_caller(checkpoints: dict[str, Path]) -> None:
    broken = False

    def moody(problem: Any, x: Any, weight: Any, out: Any) -> None:
        if broken:
            raise ZeroDivisionError("in a mood")
        out[...] = x @ weight.T

    mine = rl.kernel("matmul", form="python", sites="layers.0.mlp.down_proj")(moody)
    runner = rl.Runner(rl.compile(checkpoints[LLAMA], kernels=[mine]))
    broken = True
    state = runner.start()
    with pytest.raises(KernelError, match=r"'moody' failed for .*: ZeroDivisionError: in a mood"):
        runner.prefill(state, [1, 2, 3])
    assert state.length == 0
    broken = False
    assert np.isfinite(runner.prefill(state, [1, 2, 3])).all()


def test_files_of_c_and_objects(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source, cpp, header = tmp_path / "mine.c", tmp_path / "mine.cpp", tmp_path / "mine.h"
    source.write_text(C_SOURCE.replace("in_c", "from_c"))
    header.write_text("#pragma once\n#include <cstdint>\n")
    cpp.write_text(
        C_SOURCE.replace("#include <stdint.h>", '#include "mine.h"').replace(
            "void in_c", 'extern "C" void from_cpp'
        )
    )

    def compiled(problem: Any) -> Path:
        text, made = tmp_path / f"{problem.name}.c", tmp_path / f"{problem.name}.o"
        text.write_text(C_SOURCE.replace("in_c", "from_object"))
        command = [
            "cc",
            "-O2",
            "-fPIC",
            f"-DN={problem.n}",
            f"-DK={problem.k}",
            "-c",
            str(text),
            "-o",
            str(made),
        ]
        subprocess.run(command, check=True)
        return made

    problems = ["matmul_n96_k48", "matmul_n48_k96"]
    del problems
    sizes = rl.compile(checkpoints[LLAMA]).plan.at("layers.0.mlp.down_proj").problem.removesuffix("_residual")
    kernels = [
        rl.kernel("matmul", name="from_c", m=(1, 4), sites="*.down_proj", files=(str(source),))(
            lambda p: source
        ),
        rl.kernel("matmul", name="from_cpp", m=(5, 9), sites="*.down_proj", files=(str(cpp), str(header)))(
            lambda p: cpp
        ),
        rl.kernel(
            "matmul",
            name="from_object",
            m=(10, None),
            sites="*.down_proj",
            files=(str(tmp_path / f"{sizes}.o"),),
        )(compiled),
    ]
    (tmp_path / f"{sizes}.o").touch()
    artifact = logits_agree(checkpoints[LLAMA], LLAMA, kernels, (1, 4, 5, 9, 10, 40))
    entry = artifact.plan.at("layers.0.mlp.down_proj")
    assert [part.kernel for part in entry.ranges] == ["from_c", "from_cpp", "from_object"]
    source.write_text("not C at all")
    with pytest.raises(KernelError, match="'from_c' does not compile as C"):
        rl.compile(checkpoints[LLAMA], kernels=kernels)
    hidden = rl.kernel("matmul", name="hidden")(lambda problem: source)
    with pytest.raises(KernelError, match=r"which it does not name; say files="):
        rl.compile(checkpoints[LLAMA], kernels=[hidden])


def test_a_layout_of_ones_own(checkpoints: dict[str, Path]) -> None:
    """The weight transposed, as [K, N], packed once; the plain kernels do not read it."""
    transposed = rl.Layout("transposed", lambda n, k: (k, n), lambda weight: weight.T)

    def columns(problem: Any) -> str:
        return """
        #include <stdint.h>
        void columns(const float *x, const float *w, float *out, int64_t M) {
          for (int64_t i = 0; i < M; i++)
            for (int64_t j = 0; j < N; j++) {
              float sum = 0;
              for (int64_t k = 0; k < K; k++) sum += x[i * K + k] * w[k * N + j];
              out[i * N + j] = sum;
            }
        }
        """

    mine = rl.kernel("matmul", layout=transposed)(columns)
    for name in (LLAMA, GPT2):
        artifact = logits_agree(checkpoints[name], name, [mine], (1, 20))
        packed = [weight for weight in artifact.manifest.weights if weight.recipe.startswith("transposed(")]
        assert len(packed) >= 4
    entry = artifact.plan.entries[0]
    assert entry.layout == "transposed"
    assert any("reads the weight plain, which is stored transposed" in c.reason for c in entry.candidates)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (rl.Layout("wrong", lambda n, k: (n, k + 1), lambda weight: weight), r"says that it is \["),
        (
            rl.Layout("raises", lambda n, k: (n, k), lambda weight: weight[:, 10**9]),
            "Packing .* failed: IndexError",
        ),
        (
            rl.Layout("half", lambda n, k: (n, k), lambda weight: weight.astype(np.float16)),
            "float16, but says",
        ),
    ],
    ids=["shape", "raises", "dtype"],
)
def test_a_layout_that_packs_wrong_is_refused(checkpoints: dict[str, Path], layout: Any, said: str) -> None:
    mine = rl.kernel("matmul", name="mine", layout=layout)(lambda problem: C_SOURCE.replace("in_c", "mine"))
    with pytest.raises(KernelError, match=said):
        rl.compile(checkpoints[LLAMA], kernels=[mine])


def test_layouts_that_leave_sizes_unserved_are_refused(checkpoints: dict[str, Path]) -> None:
    transposed = rl.Layout("transposed", lambda n, k: (k, n), lambda weight: weight.T)
    mine = rl.kernel("matmul", name="mine", layout=transposed, m=(1, 8))(lambda problem: C_SOURCE)
    with pytest.raises(KernelError, match=r"M >= 9"):
        rl.compile(checkpoints[LLAMA], kernels=[mine])


def test_a_cost_lets_a_kernel_compete(checkpoints: dict[str, Path]) -> None:
    def cheap_for_one(problem: Any, sizes: Any) -> float:
        return 1e-12 if sizes["M"] == 1 else 1.0

    from relax_llm.kernels.machine import machine
    from relax_llm.kernels.matmul.tiled import tiled

    mine = rl.kernel(
        "matmul",
        name="mine",
        layout="tiled",
        absorbs=("bias", "activation", "gate", "residual"),
        cost=cheap_for_one,
    )(lambda problem: tiled(problem, machine(), flat=True))
    artifact = logits_agree(checkpoints[LLAMA], LLAMA, [mine], (1, 2, 20))
    entry = artifact.plan.at("layers.0.mlp.down_proj")
    assert entry.serving({"M": 1}).kernel == "mine"
    assert entry.serving({"M": 2}).kernel != "mine"


def test_an_edited_plan_decides(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    kernels = [in_script(m=(1, 8), sites="*.down_proj")]
    first = rl.compile(checkpoints[LLAMA], kernels=kernels).plan
    text = first.to_json()
    assert '"in_script"' in text
    entry = first.at("layers.0.mlp.down_proj")
    edited = tmp_path / "plan.json"
    data = text.replace("\n", " ")
    import json
    import re

    plan = json.loads(data)
    for item in plan["entries"]:
        if "layers.0.mlp.down_proj" in item["sites"]:
            item["ranges"] = [
                {"sizes": {"M": [1, 2]}, "kernel": "plain_rows"},
                {"sizes": {"M": [3, 3]}, "kernel": "in_script"},
                {"sizes": {"M": [4, 6]}, "kernel": "plain_rows"},
                {"sizes": {"M": [7, None]}, "kernel": "plain_panels"},
            ]
    edited.write_text(json.dumps(plan))
    artifact = rl.compile(checkpoints[LLAMA], kernels=kernels, plan=edited)
    runner = rl.Runner(artifact)
    assert np.isfinite(runner.prefill(runner.start(), [1, 2, 3])).all()
    made = artifact.plan.at("layers.0.mlp.down_proj")
    assert [part.kernel for part in made.ranges] == ["plain_rows", "in_script", "plain_rows", "plain_panels"]
    assert entry.ranges != made.ranges
    with pytest.raises(PlanError, match=r"'in_script' .*no kernel has this name"):
        rl.compile(checkpoints[LLAMA], plan=edited)
    plan["entries"] = [
        {**item, "ranges": [{"sizes": {}, "kernel": "in_script"}]}
        if "layers.0.mlp.down_proj" in item["sites"]
        else item
        for item in plan["entries"]
    ]
    edited.write_text(json.dumps(plan))
    with pytest.raises(PlanError, match=re.escape("valid for M = 1..8")):
        rl.compile(checkpoints[LLAMA], kernels=kernels, plan=edited)
    with pytest.raises(PlanError, match="names no problem of this model"):
        rl.compile(checkpoints[GPT2], plan=first)
    with pytest.raises(PlanError, match="cannot be read"):
        rl.compile(checkpoints[LLAMA], plan=tmp_path / "none.json")


@pytest.mark.parametrize("name", [LLAMA, GPT2, WINDOWED])
def test_pinned_results_do_not_depend_on_chunks(checkpoints: dict[str, Path], name: str) -> None:
    artifact = rl.compile(checkpoints[name], selection="pinned")
    assert all(len(entry.ranges) == 1 for entry in artifact.plan.entries)
    runner, ids = rl.Runner(artifact), token_ids(BY_NAME[name])[0, :70]
    whole = runner.prefill(runner.start(), ids, output="all")
    for chunks in ((1,) * 70, (1, 16, 17, 36), (64, 6), (69, 1)):
        state, start, parts = runner.start(), 0, []
        for chunk in chunks:
            parts.append(runner.prefill(state, ids[start : start + chunk], output="all"))
            start += chunk
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    state = runner.start()
    decoded = [runner.decode(state, int(token)) for token in ids]
    np.testing.assert_array_equal(np.stack(decoded), whole)


def test_pinned_leaves_out_kernels_for_some_sizes(checkpoints: dict[str, Path]) -> None:
    artifact = rl.compile(checkpoints[LLAMA], kernels=[in_script(m=(1, 8))], selection="pinned")
    assert "in_script (valid for M = 1..8): selection is pinned" in artifact.plan.explain(
        "layers.0.mlp.down_proj"
    )
    mine = rl.kernel("matmul", name="mine")(script)
    pinned = rl.compile(checkpoints[LLAMA], kernels=[mine], selection="pinned")
    assert {part.kernel for part in pinned.plan.at("layers.0.mlp.down_proj").ranges} == {"mine"}
    with pytest.raises(rl.RelaxLLMError, match="selection 'frozen' is not known"):
        rl.compile(checkpoints[LLAMA], selection="frozen")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("operator", "arguments", "said"),
    [
        ("attention", {"m": 1}, "not chosen by m"),
        ("matmul", {"seq": 1}, "not chosen by seq"),
        ("attention", {"layout": "tiled"}, "attention has neither"),
        ("attention", {"form": "fortran"}, "form must be one of"),
        ("attention", {"seq": "one"}, "no ranges of sizes"),
        ("matmul", {"name": "no name"}, "cannot be a kernel's name"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(operator: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(KernelError, match=said):
        rl.kernel(operator, **arguments)(theirs.script)
