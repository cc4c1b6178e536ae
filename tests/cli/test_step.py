"""`relax-llm step` by lines of text: every command, every mistake, in pipes and on a terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm.debugger import describe
from relax_llm.debugger.commands import COMMANDS, Quit, execute
from relax_llm.debugger.lines import follow
from relax_llm.debugger.session import Session
from relax_llm.debugger.statistics import histogram, statistics
from relax_llm.errors import ContextLengthError, InputError, RelaxLLMError

from .conftest import COMMAND, edit_manifest
from .terminal import CTRL_C, CTRL_D, Terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PROMPT = "step by step"


@pytest.fixture
def runner(artifact: Path) -> rl.Runner:
    """Of the tiny model, new."""
    return rl.Runner(rl.load(artifact))


@pytest.fixture
def session(runner: rl.Runner) -> Iterator[Session]:
    """Before the first launch of a prompt."""
    tokenizer = runner.tokenizer
    assert tokenizer is not None
    begun = Session(runner, tokenizer.encode(PROMPT))
    yield begun
    begun.close()


def _greedy(runner: rl.Runner, count: int) -> list[int]:
    assert runner.tokenizer is not None
    return list(
        runner.generate(
            runner.tokenizer.encode(PROMPT), max_new_tokens=count, temperature=0, stop_tokens=[]
        ).token_ids
    )


def _at(session: Session) -> tuple[int, str]:
    return session.launch.index, session.launch.done


def test_going_on(session: Session) -> None:
    assert execute(session, "") == execute(session, "  # a remark") == ""
    assert _at(session) == (0, "")
    assert execute(session, "step") == f"{session.launch}, about to be made"
    assert _at(session) == (1, "")
    execute(session, "step 3")
    assert _at(session) == (4, "")
    execute(session, "until operator=attention")
    assert session.launch.operator == "attention"
    at = session.launch.index
    assert re.fullmatch(
        r"prefill\[\d+\] \S+: \w+, run in [\d.]+ us: [\d.e+-]+ GFLOP/s, [\d.e+-]+ GB/s",
        execute(session, "make"),
    )
    assert _at(session) == (at, "run")
    execute(session, "make")
    assert _at(session) == (at, "run")
    answer = execute(session, "run")
    assert answer.splitlines()[0] == f"prefill has ended after {len(session.steps)} launches."
    assert answer.splitlines()[1].startswith("expected next: ")


@pytest.mark.parametrize("command", ["end", "detach", "run", "step 10000"])
def test_to_the_end_and_on(session: Session, runner: rl.Runner, command: str) -> None:
    expected = _greedy(runner, 3)
    prompt = list(session.tokens)
    for made in range(3):
        execute(session, "until operator=attention")
        execute(session, command)
        assert session.steps.ended
        for refused in ("step", "run", "end", "detach", "until nan", "info", "skip", "time", "print 0"):
            with pytest.raises(InputError, match=r"All launches of this \w+ have been made; `next` begins"):
                execute(session, refused)
        assert session.tokens == prompt + expected[:made]
        assert execute(session, "next").splitlines()[0] == repr(session.text)
    assert session.tokens == prompt + expected
    execute(session, "next 2")
    assert session.tokens == prompt + _greedy(runner, 5)


def test_breakpoints(session: Session) -> None:
    assert execute(session, "breaks") == "no breakpoints"
    assert execute(session, "break layers.1.* operator=matmul M>2, seq<100") == (
        "breakpoint 1: site layers.1.*, operator matmul, M>2, seq<100"
    )
    execute(session, "b nan")
    assert execute(session, "run").startswith("breakpoint 1, before prefill[")
    assert session.launch.site.startswith("layers.1.")
    execute(session, "break")
    assert execute(session, "breaks").splitlines() == [
        "1  site layers.1.*, operator matmul, M>2, seq<100  (1 hit)",
        "2  a NaN or an infinity in an output  (0 hits)",
        f"3  site {session.launch.site}, operator matmul  (0 hits)",
    ]
    assert execute(session, "delete 1").splitlines()[0].startswith("2")
    assert execute(session, "set 0 0,0,3 nan") == "1 number is nan now"
    assert execute(session, "run").startswith("breakpoint 2, behind prefill[")
    assert execute(session, "delete all") == "no breakpoints"
    assert re.search(r"\d+ of \d+ logits are no finite numbers", execute(session, "end"))
    with pytest.raises(InputError, match="no token is the likeliest; `break nan`"):
        execute(session, "next")
    assert session.steps.ended


def test_watching(session: Session) -> None:
    execute(session, "watch layers.1.self_attn.k_cache 0,0")
    assert "layers.1.self_attn.k_cache changed in" in execute(session, "run")
    assert session.launch.operator == "append"
    execute(session, "delete all")
    execute(session, "watch norm")
    assert "the output of norm (norm, launch" in execute(session, "run")


def test_skipping_and_replacing(session: Session) -> None:
    execute(session, "until layers.1.mlp.down_proj")
    launch = session.launch
    execute(session, f"set {len(launch.arguments) - 1} 0")  # what a skipped launch leaves is what was there
    assert execute(session, "skip").startswith(f"{launch} was skipped; its outputs keep what they hold")
    assert launch.done == "skipped"
    assert session.launch.index == launch.index + 1
    execute(session, "until kernel=tiled")
    assert execute(session, f"replace {session.launch.kernel}").split(", ")[1].startswith("replaced in")
    with pytest.raises(InputError, match="was replaced already; `make` makes it again"):
        execute(session, "skip")
    with pytest.raises(InputError, match="was replaced already"):
        execute(session, "replace tiled")
    execute(session, "next")
    execute(session, "replace tiled layers.*.mlp.*")
    with pytest.raises(InputError, match=r"has no kernel 'zip' at 'layers\.\*'"):
        execute(session, "replace zip layers.*")
    for function in ("decode", "decode"):
        assert session.steps.function == function
        execute(session, "end")
        assert [
            row.done for row in session.steps.launches if ".mlp." in row.site and row.operator == "matmul"
        ] == ["replaced"] * 4
        execute(session, "next")


def test_looking(session: Session) -> None:
    lines = execute(session, "info").splitlines()
    assert lines[0] == f"launch  0 of {len(session.steps)} in prefill: embed_tokens"
    assert lines[1].startswith("kernel  by_row, for embedding: it is the only kernel here")
    assert lines[3] == "state   about to be made"
    assert lines[-1].split() == [
        "2",
        "output",
        f"1x{len(session.tokens)}x64",
        "float32",
        "not",
        "computed",
        "yet",
    ]
    assert execute(session, "print").splitlines() == lines[4:]
    execute(session, "make")
    output = session.launch.outputs[0]
    output[0, 0, 0] = 40
    shown = execute(session, "print 2")
    assert f"min {output.min():.6g}, max 40, mean" in shown
    assert f"0 infinite of {output.size:,}" in shown
    assert shown.count("#") > 40
    assert execute(session, "print 2 0,0,0").endswith("\n40.")
    assert execute(session, "print 2 -1,...,:2").endswith(describe._text(output[-1, ..., :2]))
    assert execute(session, "set 2 0,0,:8 1.5") == "8 numbers are 1.5 now"
    assert (output[0, 0, :8] == 1.5).all()
    execute(session, "set 2 0")
    assert not output.any()
    assert execute(session, "print 2").splitlines()[2] == "all are 0"
    every = execute(session, "list").splitlines()
    assert len(every) == len(session.steps)
    assert every[0].startswith(">   0")
    some = execute(session, "list layers.1.mlp.up_proj").splitlines()
    assert [line.split()[1] for line in some] == ["layers.1.mlp.gate_proj+up_proj"]
    assert all(len(line) <= 80 for line in [*lines, *every, *execute(session, "help").splitlines()])
    assert execute(session, "text") == f"{PROMPT!r} ({len(session.tokens)} tokens)"


@pytest.mark.parametrize("form", describe.LISTINGS)
def test_reading_code(session: Session, form: str) -> None:
    execute(session, "until operator=matmul")
    assert execute(session, form)


def test_timing(session: Session) -> None:
    execute(session, "until layers.1.mlp.down_proj")
    before = [array.copy() for array in session.launch.outputs]
    lines = execute(session, "time 2").splitlines()
    assert [line.split()[0] for line in lines] == list(session.launch.kernels)
    (chosen,) = (line for line in lines if line.endswith("chosen"))
    assert re.fullmatch(r"\w+ +[\d.]+ us +[\d.]+ GFLOP/s +[\d.]+ GB/s  chosen", chosen)
    assert len(execute(session, "time cold 1 tiled").splitlines()) == 1
    with pytest.raises(InputError, match="'zip' does not serve"):
        execute(session, "time zip")
    for array, was in zip(session.launch.outputs, before, strict=True):
        np.testing.assert_array_equal(array, was)
    assert session.launch.done == ""


REFUSED = {
    "stepp 3": "There is no command 'stepp'; `help` lists them. Is 'step' meant?",
    "xyz": "There is no command 'xyz'; `help` lists them.",
    "de 1": "'de' may be detach or delete; write more of it.",
    "step x": "'x' is not a number of times.",
    "step 0": "step takes a number of 1 or above.",
    "step 1 2": "step takes one number.",
    "run 3": "run takes nothing more, but '3' follows it.",
    "until": "until takes what `break` takes",
    "break layers.9.*": "The model launches nothing at 'layers.9.*'",
    "break kernel=zip": "The model has no kernel 'zip'",
    "break a b": "There are two of site: a and b; a breakpoint has one.",
    "break rows=3": "A launch has no size 'rows'",
    "watch": "watch takes a weight, a cache or a site",
    "watch nothing": "Nothing is named 'nothing'",
    "delete": "delete takes a breakpoint's number, or all.",
    "delete x": "'x' is not a breakpoint's number, or all.",
    "delete 9": "There is no breakpoint 9; there are none.",
    "replace": "replace takes one of the kernels by_row, and perhaps sites.",
    "replace zip": "The kernel 'zip' does not serve embed_tokens",
    "time 0": "time takes a number of 1 or above.",
    "print x": "'x' is not the number of a tensor.",
    "print 9": "has no tensor 9; there are: 0, 1, 2.",
    "print 0 9": "A tensor of shape [1, 12] has no such part",
    "print 0 a": "'a' is no part of a tensor; write indices as in 0,:,3:8",
    "print 0 1:2:3:4": "is no part of a tensor",
    "print 0 ::0": "'::0' has a step of 0.",
    "print 0 ...,...": "has more than one `...`.",
    "print 0 0 0": "print takes the number of a tensor and a part of it",
    "set 0": "set takes a tensor, a part of it and a number",
    "set 0 x": "'x' is no number.",
    "list zip": "prefill launches nothing at 'zip'; `list` shows all sites.",
    "list a b": "list takes a pattern of sites.",
    "help zip": "There is no command 'zip'",
    "help a b": "help takes a command.",
}


@pytest.mark.parametrize("line", list(REFUSED))
def test_mistakes_are_told_and_change_nothing(session: Session, line: str) -> None:
    with pytest.raises(RelaxLLMError) as refusal:
        execute(session, line)
    assert REFUSED[line] in str(refusal.value)
    assert _at(session) == (0, "")
    assert not list(session.runner.breakpoints)


def test_every_command_has_help(session: Session) -> None:
    text = execute(session, "help")
    for name, command in COMMANDS.items():
        assert any(line.startswith(name) and line.endswith(command.says) for line in text.splitlines())
        assert execute(session, f"h {name}") == f"{name} {command.usage}".rstrip() + f"\n  {command.says}"
    with pytest.raises(Quit):
        execute(session, "q")


def test_interrupting(session: Session, runner: rl.Runner) -> None:
    """Between two launches: of the call that runs, and of the commands that make many."""
    made = []

    def interrupts(launch: Any) -> bool:
        made.append(launch.index)
        if launch.index == 3:
            session.interrupt()
        return False

    runner.breakpoints.add(where=interrupts)
    assert "interrupted" in execute(session, "run")
    assert _at(session) == (3, "")
    execute(session, "step 2")
    assert _at(session) == (5, "")
    runner.breakpoints.clear()
    session.steps.replace("norm", lambda *inputs: session.interrupt() or inputs[0])  # type: ignore[func-returns-value]
    assert "interrupted" in execute(session, "next 5")
    assert session.steps.function == "prefill"
    assert len(session.tokens) == len(PROMPT)


def test_the_context_may_be_full(endless: Path, copy_of_artifact: Path) -> None:
    path = edit_manifest(copy_of_artifact, lambda manifest: manifest.update(context_length=4))
    session = Session(rl.Runner(rl.load(path)), [1, 2, 3, 4])
    with pytest.raises(ContextLengthError):
        execute(session, "next")
    assert session.steps.ended
    assert len(session.tokens) == 4


def test_following_lines(session: Session) -> None:
    said: list[str] = []
    refused: list[str] = []
    lines = ["step", "nonsense", "", "step", "quit", "step"]
    count = follow(session, lines, said.append, refused.append, interruptible=False)
    assert count == len(refused) == 1
    assert [text.split("]")[0] for text in said] == ["prefill[0", "prefill[1", "prefill[2"]
    with pytest.raises(InputError, match="were closed"):
        session.steps.finish()


def test_ctrl_c_ends_a_command_of_a_person(session: Session) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    session.steps.replace("norm", interrupted)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        follow(session, ["run"], said.append, said.append, interruptible=False)
    assert session.launch.site == "norm"
    follow(session, ["run", "skip"], said.append, said.append, interruptible=True)
    assert said[-2].startswith("interrupted\nprefill[")
    assert "was skipped" in said[-1]


def test_in_pipes(launch: Callable[..., Any], artifact: Path) -> None:
    done = launch(
        "step", artifact, "--prompt", PROMPT, stdin=b"# a remark\nstep 2\nnonsense\n\nprint 9\nquit\nstep\n"
    )
    assert done.code == 2
    assert done.out.splitlines() == [
        "prefill[0] embed_tokens: by_row, about to be made",
        "> # a remark",
        "> step 2",
        "prefill[2] layers.0.self_attn.q_proj+k_proj+v_proj: tiled, about to be made",
        "> nonsense",
        "> print 9",
        "> quit",
    ]
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert errors[0] == "error: There is no command 'nonsense'; `help` lists them."
    assert errors[-1] == "error: 2 of the commands were refused."
    done = launch("step", artifact, "--ids", "--prompt", "1 2 3", stdin=b"next")
    assert done.code == 0
    assert done.out.splitlines()[-1] == "decode[0] embed_tokens: by_row, about to be made"


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["--prompt", ""], b"", "The prompt is empty"),
        (["--ids"], b"", "With --ids the prompt must be token ids"),
        (["--ids", "--prompt", "999"], b"", "The prompt contains token id 999"),
        (["--model", "other"], b"", "The model is named twice"),
        (["--weights", "bf16"], b"", "is compiled already, so --weights cannot change it"),
        ([], b"step\n\xff\n", "Line 2 of standard input is not UTF-8 text."),
    ],
)
def test_what_the_command_line_refuses(
    launch: Callable[..., Any], artifact: Path, arguments: list[str], stdin: bytes, message: str
) -> None:
    done = launch("step", artifact, *arguments, stdin=stdin)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_an_artifact_of_another_version(launch: Callable[..., Any], copy_of_artifact: Path) -> None:
    edit_manifest(copy_of_artifact, lambda manifest: manifest["versions"].update({"apache-tvm": "0.1"}))
    done = launch("step", copy_of_artifact)
    assert done.code == 2
    assert "was compiled with apache-tvm 0.1, but" in done.err


def test_lines_on_a_terminal(environment: dict[str, str], artifact: Path) -> None:
    """With --commands: a prompt, Enter to repeat, mistakes, Ctrl-C twice."""
    terminal = Terminal([*COMMAND, "step", str(artifact), "--commands"], environment)

    def answered(pattern: str) -> None:
        """Wait for an answer and the prompt below it; what is typed before it is there, nobody reads."""
        terminal.wait_for(r"step\) $", after=terminal.wait_for(pattern).end())

    try:
        answered(r"prefill\[0\]")
        terminal.press("step\n")
        answered(r"prefill\[1\]")
        terminal.press("\n")
        answered(r"prefill\[2\]")
        terminal.press("nonsense\n")
        answered("error: There is no command 'nonsense'")
        terminal.press(CTRL_C)
        answered("Ctrl-C once more leaves")
        terminal.press("text\n")
        answered(r"'My favorite music is' \(20 tokens\)")
        terminal.press(CTRL_D)
        assert terminal.finish() == 0
    finally:
        terminal.close()


def test_statistics_and_histograms() -> None:
    values = np.array([[1, np.nan, 3], [-np.inf, np.inf, 2]], np.float32)
    known = statistics(values)
    assert (known.size, known.minimum, known.maximum, known.mean) == (6, 1, 3, 2)
    assert (known.nans, known.infinities) == (1, 2)
    assert statistics(np.arange(10)).mean == 4.5
    assert np.isnan(statistics(np.full(3, np.nan)).maximum)
    assert histogram(np.full(3, np.inf)) == histogram(np.zeros((0, 2))) == ["no finite numbers"]
    assert histogram(np.full(3, 2.5)) == ["all are 2.5"]
    assert [line.split()[-2:] for line in histogram(np.array([0, 1, 1, 1, np.nan]), rows=2, width=6)] == [
        ["1", "##"],
        ["3", "######"],
    ]
    big = np.random.default_rng(0).standard_normal(5_000_001)
    assert np.isclose(statistics(big).mean, big.mean())
    assert sum(int(line.split()[3]) for line in histogram(big)) == big.size
