"""What the virtual machine executes beside launches: nothing twice, and no check of what was checked before."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

import relax_llm as rl
from relax_llm.compiler.passes.check_once import CheckOnce
from relax_llm.compiler.passes.share_values import ShareValues
from relax_llm.runtime import vm
from relax_llm.runtime.program import Call, Program

from ..artifact.checkpoints import LLAMA, llama_shapes, tensors_for, write
from .conditional import Conditional


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> rl.Artifact:
    path = tmp_path_factory.mktemp("instructions")
    config = {**LLAMA, "num_hidden_layers": 3, "max_position_embeddings": 256}
    source = write(path / "checkpoint", config, tensors_for(llama_shapes(config)))
    return rl.compile(source, output=path / "artifact")


def _calls(program: Program, name: str) -> list[tuple[str, tuple[Any, ...]]]:
    function = program.function(name)
    body = program.instructions[function.start : function.end]
    return [(program.functions[one.function].name, one.arguments) for one in body if isinstance(one, Call)]


def test_nothing_is_made_twice(artifact: rl.Artifact) -> None:
    program = vm.VirtualMachine(artifact.path / "lib.so").program
    for name in ("prefill", "decode", "logits", "hidden"):
        made = [
            call
            for call in _calls(program, name)
            if call[0].removeprefix("vm.builtin.") in ("make_shape", "make_prim_value", "alloc_tensor")
            or call[0] == "vm.builtin.tuple_getitem"
        ]
        assert made
        assert max(Counter(made).values()) == 1, Counter(made).most_common(3)
        tensors = sum(name == "vm.builtin.alloc_tensor" for name, _ in made)
        assert tensors < len(artifact.manifest.functions[name]) / 2


def test_weights_and_caches_are_not_compared_in_every_call(artifact: rl.Artifact) -> None:
    program = vm.VirtualMachine(artifact.path / "lib.so").program
    called = Counter(name for name, _ in _calls(program, "decode"))
    assert called["vm.builtin.check_tensor_info"] == 1  # token ids
    assert called["vm.builtin.check_tuple_info"] == 0
    assert called["vm.builtin.match_shape"] == 4  # token ids, kv_len, the first cache's tiles, the result


def test_what_is_wrong_is_refused_all_the_same(artifact: rl.Artifact) -> None:
    runner = rl.Runner(artifact)
    state = runner.start()
    runner.prefill(state, [1, 2, 3])
    decode = runner._calls.functions["decode"]
    ids, weights = np.array([[5]], np.int32), runner._calls._weights
    caches = state.reserve(1)
    arguments = [vm.tensor(ids), vm.shape(4), caches, weights]
    assert vm.numpy(decode(*arguments)).shape == (1, 1, runner.vocab_size)
    narrow = [vm.tensor(vm.view(one)[..., :-1].copy()) for one in weights]
    whole = [vm.tensor(ids.astype(np.int64)), vm.tensor(np.array([5], np.int32))]
    for position, wrong in [
        (0, whole[0]),
        (0, whole[1]),
        (2, vm.pack(list(caches)[:-1])),
        (3, vm.pack(narrow)),
    ]:
        with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)):
            decode(*arguments[:position], wrong, *arguments[position + 1 :])


def test_what_a_branch_makes_stays_in_it() -> None:
    module: Any = Conditional
    made = ShareValues()(module)["main"]
    assert made.script().count("alloc_tensor") == 2
    relax.analysis.well_formed(tvm.IRModule({"main": made}))
    assert CheckOnce()(module)["main"].script() == module["main"].script()
