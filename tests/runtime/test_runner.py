"""The runner: what it refuses, what it leaves alone, how it shares memory, threads and files."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm.errors import ContextLengthError, InputError

from ..artifact.checkpoints import GPT2, LLAMA, write

if TYPE_CHECKING:
    from collections.abc import Callable

VOCAB = LLAMA["vocab_size"]
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> rl.Artifact:
    """A tiny llama."""
    return rl.compile(write(tmp_path_factory.mktemp("llama") / "checkpoint", LLAMA))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> rl.Artifact:
    """A tiny GPT-2."""
    return rl.compile(write(tmp_path_factory.mktemp("gpt2") / "checkpoint", GPT2))


@pytest.fixture(scope="module")
def runner(artifact: rl.Artifact) -> rl.Runner:
    """Of the llama."""
    return rl.Runner(artifact)


PREFILL: dict[str, tuple[Any, str]] = {
    "nothing": ([], "no tokens"),
    "nothing in two dimensions": ([[]], "no tokens"),
    "nothing of a batch": (np.zeros((0, 3), np.int64), "no tokens"),
    "None": (None, r"\[seq\] or \[batch, seq\]"),
    "a number": (3, r"\[seq\] or \[batch, seq\], not an array of shape \(\)"),
    "text": ("hello", r"\[seq\] or \[batch, seq\]"),
    "words": (["hello"], "whole numbers"),
    "an id too large": ([1, VOCAB], rf"Token id {VOCAB} is outside the vocabulary of {VOCAB}"),
    "a negative id": ([1, -1], r"Token id -1 is outside"),
    "an id beyond int32": ([2**31], rf"Token id {2**31} is outside"),
    "an id that wraps to 1 in int32": ([2**32 + 1], rf"Token id {2**32 + 1} is outside"),
    "an id beyond int64": ([2**70], "whole numbers"),
    "an unsigned id beyond int64": (np.array([2**63], np.uint64), "is outside the vocabulary"),
    "fractions": ([1.0, 2.0], "whole numbers, not float64"),
    "truth values": ([True, False], "whole numbers, not bool"),
    "complex numbers": ([1j], "whole numbers, not complex"),
    "None among them": ([1, None], "whole numbers, not object"),
    "sequences of different length": ([[1, 2], [3]], "differ in length"),
    "three dimensions": ([[[1]]], r"not an array of shape \(1, 1, 1\)"),
    "two sequences for a state of one": (
        [[1, 2], [3, 4]],
        "The state has 1 sequences, but the token ids have 2",
    ),
    "an object": (object(), r"\[seq\] or \[batch, seq\]"),
}

DECODE: dict[str, tuple[Any, str]] = {
    "nothing": ([], "no tokens"),
    "an id too large": (VOCAB, rf"Token id {VOCAB} is outside"),
    "a negative id": (-1, "Token id -1 is outside"),
    "a fraction": (1.0, "whole numbers, not float64"),
    "truth": (True, "whole numbers, not bool"),
    "None": (None, "whole numbers, not object"),
    "text": ("1", "whole numbers"),
    "two for a state of one": ([1, 2], "The state has 1 sequences, but the token ids have 2"),
    "two dimensions": ([[1]], r"not an array of shape \(1, 1\)"),
    "different lengths": ([[1], [1, 2]], "differ in length"),
}


@pytest.mark.parametrize("case", list(PREFILL))
def test_prefill_refuses(runner: rl.Runner, case: str) -> None:
    ids, message = PREFILL[case]
    state = runner.start()
    runner.prefill(state, IDS)
    with pytest.raises(InputError, match=message):
        runner.prefill(state, ids)
    assert state.tokens == IDS
    fresh = runner.start()
    expected = runner.prefill(fresh, [*IDS, 7])
    np.testing.assert_allclose(runner.decode(state, 7), expected, atol=1e-4)


@pytest.mark.parametrize("case", list(DECODE))
def test_decode_refuses(runner: rl.Runner, case: str) -> None:
    ids, message = DECODE[case]
    state = runner.start()
    runner.prefill(state, IDS)
    with pytest.raises(InputError, match=message):
        runner.decode(state, ids)
    assert state.tokens == IDS


@pytest.mark.parametrize("output", ["logits", "", None, ["last"], 1, "LAST"])
def test_outputs_that_are_not_known(runner: rl.Runner, output: Any) -> None:
    state = runner.start()
    with pytest.raises(InputError, match='"last", "all" or "hidden"'):
        runner.prefill(state, IDS, output=output)
    assert state.length == 0


@pytest.mark.parametrize("batch", [0, -1, 1.0, 2.5, "2", None, True, [1]])
def test_batches_that_are_none(runner: rl.Runner, batch: Any) -> None:
    with pytest.raises(InputError, match="batch must be a positive whole number"):
        runner.start(batch)


def test_batches_of_numpys_numbers(runner: rl.Runner) -> None:
    state = runner.start(np.int64(2))
    assert state.batch == 2
    assert runner.prefill(state, [[1, 2], [3, 4]]).shape == (2, VOCAB)


@pytest.mark.parametrize("ids", [[1], [1, 2], 3], ids=str)
def test_a_batch_wants_ids_for_all(runner: rl.Runner, ids: Any) -> None:
    state = runner.start(batch=3)
    runner.prefill(state, np.ones((3, 2), int))
    with pytest.raises(InputError, match="The state has 3 sequences"):
        runner.decode(state, ids)
    assert state.length == 2


def test_the_context_is_the_end(runner: rl.Runner) -> None:
    context = runner.context_length
    state = runner.start()
    runner.prefill(state, np.arange(context - 1) % VOCAB)
    with pytest.raises(
        ContextLengthError, match=rf"{context - 1} tokens are in the cache and 2 more .* {context}"
    ):
        runner.prefill(state, [1, 2])
    assert np.isfinite(runner.decode(state, 1)).all()
    with pytest.raises(ContextLengthError, match=r"truncate"):
        runner.decode(state, 1)
    assert state.length == context
    with pytest.raises(ContextLengthError):
        runner.prefill(runner.start(), np.zeros(context + 1, int))


def test_a_state_of_another_model(runner: rl.Runner, other: rl.Artifact) -> None:
    """Refused, not run on caches of another shape; both go on as before."""
    gpt2 = rl.Runner(other)
    mine, theirs = runner.start(), gpt2.start()
    expected = gpt2.prefill(gpt2.start(), IDS)
    for wrong, state in ((runner, theirs), (gpt2, mine)):
        with pytest.raises(InputError, match="belongs to another model"):
            wrong.prefill(state, IDS)
        assert (state.length, state.capacity) == (0, 0)
    np.testing.assert_array_equal(gpt2.prefill(theirs, IDS), expected)
    runner.prefill(mine, IDS)


KINDS: dict[str, Callable[[], Any]] = {
    "a tuple": lambda: tuple(IDS),
    "a range": lambda: range(5),
    "int8": lambda: np.array(IDS, np.int8),
    "uint64": lambda: np.array(IDS, np.uint64),
    "big endian": lambda: np.array(IDS, ">i4"),
    "read-only int32": lambda: _read_only(np.array(IDS, np.int32)),
    "read-only in two dimensions": lambda: _read_only(np.array([IDS], np.int32)),
    "a part of an array, not aligned": lambda: np.array([0, *IDS], np.int32)[1:],
    "every second": lambda: np.repeat(np.array(IDS, np.int32), 2)[::2],
    "backwards": lambda: np.array(IDS[::-1], np.int32)[::-1],
    "a column": lambda: np.array([[i, 0] for i in IDS], np.int32)[:, 0],
    "NumPy's numbers in a list": lambda: [np.int64(i) for i in IDS],
}


def _read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("kind", list(KINDS))
def test_ids_of_every_kind(runner: rl.Runner, kind: str) -> None:
    ids = KINDS[kind]()
    plain = np.asarray(ids).astype(np.int64)
    expected = runner.prefill(runner.start(), plain)
    np.testing.assert_array_equal(runner.prefill(runner.start(), ids), expected)


def test_ids_in_memory_of_others_are_neither_kept_nor_changed(runner: rl.Runner) -> None:
    ids = np.array(IDS, np.int32)
    state = runner.start()
    runner.prefill(state, ids)
    ids[:] = 0
    assert state.tokens == IDS


class _Interrupting:
    """Ids whose conversion is interrupted, as by Ctrl-C."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["before", "during"])
def test_an_interrupted_call_leaves_the_state_as_it_was(
    runner: rl.Runner, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    state = runner.start()
    runner.prefill(state, IDS)
    if when == "before":
        with pytest.raises(KeyboardInterrupt):
            runner.decode(state, _Interrupting())  # type: ignore[arg-type]
    else:
        decode = runner._calls.functions["decode"]

        def interrupted(*arguments: Any) -> Any:
            decode(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setitem(runner._calls.functions, "decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                runner.decode(state, 9)
    assert state.tokens == IDS
    fresh = runner.start()
    runner.prefill(fresh, IDS)
    np.testing.assert_array_equal(runner.decode(state, 7), runner.decode(fresh, 7))


def test_results_stay_as_they_are(runner: rl.Runner) -> None:
    """Each result has memory of its own, whatever runs later, and even if the user writes into it."""
    state = runner.start(batch=2)
    results = [runner.prefill(state, [IDS, IDS[::-1]], output="all"), runner.decode(state, [1, 2])]
    copies = [result.copy() for result in results]
    gc.collect()
    for token in range(20):
        results.append(runner.decode(state, [token, token]))
        copies.append(results[-1].copy())
        runner.prefill(runner.start(), IDS, output="hidden")
    for result, copy in zip(results, copies, strict=True):
        np.testing.assert_array_equal(result, copy)
    expected = runner.decode(state.fork(), [3, 3])
    results[-1][:] = np.nan
    np.testing.assert_array_equal(runner.decode(state, [3, 3]), expected)


def test_a_result_outlives_its_runner(artifact: rl.Artifact) -> None:
    mine = rl.Runner(artifact)
    result = mine.prefill(mine.start(), IDS)
    copy = result.copy()
    del mine
    gc.collect()
    fresh = rl.Runner(artifact)
    fresh.prefill(fresh.start(), IDS[::-1])
    np.testing.assert_array_equal(result, copy)


def test_torch_shares_the_memory_of_a_result(runner: rl.Runner) -> None:
    import torch

    result = runner.prefill(runner.start(), IDS, output="all")
    for tensor in (torch.from_dlpack(result), torch.from_numpy(result)):
        assert tensor.data_ptr() == result.ctypes.data
        assert tuple(tensor.shape) == result.shape
        tensor[0, 0] = 42.0
        assert result[0, 0] == 42.0
        result[0, 0] = 1.0
        assert tensor[0, 0] == 1.0


def test_torch_tensors_are_ids(runner: rl.Runner) -> None:
    import torch

    expected = runner.prefill(runner.start(), IDS)
    np.testing.assert_array_equal(runner.prefill(runner.start(), torch.tensor(IDS)), expected)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
def test_memory_does_not_grow(runner: rl.Runner) -> None:
    """A thousand decodes, forks and prompts later the process is as large as before."""
    state = runner.start()
    runner.prefill(state, IDS)

    def work(times: int) -> None:
        for _ in range(times):
            runner.decode(state, 1)
            fork = state.fork()
            runner.prefill(fork, IDS, output="all")
            state.truncate(len(IDS))

    work(200)
    gc.collect()
    before = _resident()
    work(1000)
    gc.collect()
    assert _resident() - before < 2_000_000


def test_a_long_context_costs_nothing_until_it_is_used(tmp_path: Path) -> None:
    config = {**LLAMA, "max_position_embeddings": 131_072}
    long = rl.Runner(rl.compile(write(tmp_path / "long", config), output=tmp_path / "out", cache=False))
    assert long.context_length == 131_072
    state = long.start()
    assert state.nbytes == 0
    long.prefill(state, IDS)
    assert state.capacity == 64
    assert state.nbytes == 2 * 4 * 2 * 6 * 64
    with pytest.raises(ContextLengthError, match="131072"):
        long.prefill(state, np.zeros(131_072, int))
    assert state.capacity == 64
    result = long.prefill(state, np.zeros(3000, int))
    assert np.isfinite(result).all()
    assert state.capacity == 3072


def test_forks_and_cuts_go_on_as_if_nothing_had_been(runner: rl.Runner) -> None:
    shared = np.arange(70) % VOCAB
    state = runner.start()
    runner.prefill(state, shared)
    fork = state.fork()
    runner.prefill(fork, IDS)
    fork.truncate(70)
    state.truncate(70)
    expected = runner.prefill(runner.start(), [*shared, 5])
    for candidate in (state, fork, fork.fork()):
        np.testing.assert_allclose(runner.decode(candidate, 5), expected, atol=1e-4)
        assert candidate.tokens == [*shared, 5]
    state.truncate(0)
    np.testing.assert_array_equal(runner.prefill(state, IDS), runner.prefill(runner.start(), IDS))


def test_two_runners_at_once(artifact: rl.Artifact, other: rl.Artifact) -> None:
    """Of one artifact and of different ones, in turns."""
    runners = [rl.Runner(artifact), rl.Runner(other), rl.Runner(artifact)]
    expected = [[r.decode(s, t) for t in IDS] for r in runners for s in [r.start()]]
    opened = [r.start() for r in runners]
    for step, token in enumerate(IDS):
        for index, (each, state) in enumerate(zip(runners, opened, strict=True)):
            np.testing.assert_array_equal(each.decode(state, token), expected[index][step])
    np.testing.assert_array_equal(expected[0], expected[2])


def test_states_of_one_model_are_good_for_all_its_runners(artifact: rl.Artifact) -> None:
    first, second = rl.Runner(artifact), rl.Runner(artifact)
    state = first.start()
    first.prefill(state, IDS)
    expected = first.decode(state.fork(), 7)
    np.testing.assert_array_equal(second.decode(state, 7), expected)


def test_threads_take_turns(runner: rl.Runner) -> None:
    """Several threads with states of their own in one runner."""
    prompts = [np.random.default_rng(i).integers(0, VOCAB, 60) for i in range(4)]

    def run(index: int) -> np.ndarray[Any, Any]:
        state = runner.start()
        rows = [runner.prefill(state, prompts[index][:20])]
        rows += [runner.decode(state, int(token)) for token in prompts[index][20:]]
        return np.stack(rows)

    expected = [run(index) for index in range(4)]
    found: dict[int, np.ndarray[Any, Any]] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: run(i)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        np.testing.assert_array_equal(found[index], expected[index])


def test_a_runner_outlives_the_files_of_its_artifact(artifact: rl.Artifact, tmp_path: Path) -> None:
    copy = artifact.save(tmp_path / "copy")
    mine = rl.Runner(copy)
    shutil.rmtree(copy.path)
    expected = rl.Runner(artifact)
    for output in ("last", "all", "hidden"):
        ours = mine.prefill(mine.start(), IDS, output=output)
        theirs = expected.prefill(expected.start(), IDS, output=output)
        np.testing.assert_array_equal(ours, theirs)


def test_an_artifact_that_takes_the_place_of_another(
    artifact: rl.Artifact, other: rl.Artifact, tmp_path: Path
) -> None:
    """A library stays loaded under its path: a new one in its place must be loaded all the same."""
    expected = [(r.vocab_size, r.prefill(r.start(), IDS)) for r in (rl.Runner(artifact), rl.Runner(other))]
    place, kept = tmp_path / "place", []
    for turn in range(4):
        which = (artifact, other)[turn % 2]
        runner = rl.Runner(which.save(place))
        kept.append((runner, turn % 2))
        for each, index in kept:
            assert each.vocab_size == expected[index][0]
            np.testing.assert_array_equal(each.prefill(each.start(), IDS), expected[index][1])
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


THREADS = """
import json, os, sys, warnings
import relax_llm as rl

artifact, numbers, ids = rl.load(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
said = []
for number in numbers:
    try:
        before = len(os.listdir("/proc/self/task"))
        runner = rl.Runner(artifact, **({} if number is None else {"threads": number}))
        logits = runner.prefill(runner.start(), ids)
        said.append([len(os.listdir("/proc/self/task")) - before, logits.tobytes().hex()])
    except rl.RelaxLLMError as error:
        said.append([type(error).__name__, str(error)])
print(json.dumps(said))
"""


def _threads(artifact: rl.Artifact, *numbers: Any, **environment: str) -> list[list[Any]]:
    """What runners with these numbers of threads come to in a process of their own: new threads and logits."""
    ids = json.dumps([i % VOCAB for i in range(100)])
    command = [sys.executable, "-W", "error", "-c", THREADS, str(artifact.path), json.dumps(numbers), ids]
    variables = {key: value for key, value in os.environ.items() if not key.startswith("TVM_")}
    done = subprocess.run(
        command, env={**variables, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said: list[list[Any]] = json.loads(done.stdout)
    return said


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux lists them")
def test_threads(artifact: rl.Artifact) -> None:
    cores = len(os.sched_getaffinity(0))
    one, again, more, cores_again = _threads(artifact, 1, 1, cores + 1, None)
    assert one[0] == 0, "the thread that calls is the one"
    assert again == cores_again == one
    assert more[0] == "InputError"
    assert f"{cores + 1} threads are more than the {cores} cores" in more[1]
    every, changed = _threads(artifact, None, 1)
    assert every == [cores - 1, one[1]], "the result does not depend on the number of threads"
    if cores > 1:
        assert changed[0] == "InputError"
        assert f"already uses {cores} threads" in changed[1]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux lists them")
def test_threads_from_the_environment(artifact: rl.Artifact) -> None:
    cores = len(os.sched_getaffinity(0))
    assert _threads(artifact, None, TVM_NUM_THREADS="1")[0][0] == 0
    assert _threads(artifact, cores, TVM_NUM_THREADS="1")[0][0] == cores - 1


@pytest.mark.parametrize("number", [0, -1, 1.5, "2", True, [2]])
def test_numbers_of_threads_that_are_none(artifact: rl.Artifact, number: Any) -> None:
    with pytest.raises(InputError, match="must be a positive whole number"):
        rl.Runner(artifact, threads=number)
