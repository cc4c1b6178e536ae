"""The commands of the debugger. A full screen and lines of text carry out the same ones, by the same function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from relax_llm.debugger import describe
from relax_llm.debugger.session import Session
from relax_llm.debugger.words import (
    nothing_more,
    one_word,
    quoted,
    read_condition,
    read_count,
    read_number,
    read_part,
)
from relax_llm.errors import InputError
from relax_llm.plan.plan import parts_of
from relax_llm.runtime.launch import Launch

Work = Callable[[Session, Sequence[str]], str]


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: What it is called; its first letters do, where no other begins so.
        usage: What follows the name.
        says: What it does, in a line.
        work: Carries it out, and returns what there is to say.
        key: The key that does it on the full screen; "" where it takes words.
    """

    name: str
    usage: str
    says: str
    work: Work
    key: str = ""


def execute(session: Session, line: str) -> str:
    """Carry out a command.

    Args:
        session: What it acts on.
        line: The command and what follows it; a line that is empty or begins with # does nothing.

    Returns:
        What there is to say, without a line break at its end.

    Raises:
        RelaxLLMError: There is no such command, or it cannot be carried out; nothing has happened.
    """
    words = line.split()
    if not words or words[0].startswith("#"):
        return ""
    session.begin()
    return command(words[0]).work(session, words[1:])


def command(word: str) -> Command:
    """The command of a name, or of its first letters.

    Raises:
        InputError: There is none, or more than one.
    """
    if word in _SHORT:
        return COMMANDS[_SHORT[word]]
    found = [known for name, known in COMMANDS.items() if name.startswith(word)]
    if word in COMMANDS or len(found) == 1:
        return COMMANDS.get(word) or found[0]
    if found:
        raise InputError(f"{word!r} may be {' or '.join(known.name for known in found)}; write more of it.")
    near = get_close_matches(word, COMMANDS, 1)
    hint = f" Is {near[0]!r} meant?" if near else ""
    raise InputError(f"There is no command {word!r}; `help` lists them.{hint}")


def _help(session: Session, words: Sequence[str]) -> str:
    if words:
        known = command(one_word(words, "help", "a command"))
        return f"{known.name} {known.usage}".rstrip() + f"\n  {known.says}"
    return "\n".join(f"{f'{known.name} {known.usage}':<27} {known.says}" for known in COMMANDS.values())


def _list(session: Session, words: Sequence[str]) -> str:
    pattern = one_word(words, "list", "a pattern of sites") if words else "*"
    rows = [
        row
        for row in session.steps.launches
        if any(fnmatchcase(part, pattern) for part in parts_of(row.site))
    ]
    if not rows:
        raise InputError(f"{session.steps.function} launches nothing at {pattern!r}; `list` shows all sites.")
    return describe.launches(rows)


def _info(session: Session, words: Sequence[str]) -> str:
    nothing_more(words, "info")
    return describe.information(session)


def _print(session: Session, words: Sequence[str]) -> str:
    if not words:
        return describe.tensors(session.launch)
    if len(words) > 2:
        raise InputError("print takes the number of a tensor and a part of it, as in `print 2 0,0,:8`.")
    part = read_part(words[1]) if len(words) == 2 else ...
    return describe.tensor(session.launch, read_number(words[0], "the number of a tensor"), part)


def _set(session: Session, words: Sequence[str]) -> str:
    if len(words) not in (2, 3):
        raise InputError(
            "set takes a tensor, a part of it and a number, as in `set 0 0,0,17 1.5` or `set 0 0`."
        )
    number = read_number(words[0], "the number of a tensor")
    part = read_part(words[1]) if len(words) == 3 else ...
    try:
        value = float(words[-1])
    except ValueError:
        raise InputError(f"{words[-1]!r} is no number.") from None
    target = describe.part_of(describe.argument(session.launch, number).value, part)
    target[...] = value
    return f"{target.size:,} {'number is' if target.size == 1 else 'numbers are'} {value:g} now"


def _step(session: Session, words: Sequence[str]) -> str:
    session.step(read_count(words, "step"))
    return describe.where(session)


def _run(session: Session, words: Sequence[str]) -> str:
    nothing_more(words, "run")
    session.go()
    return describe.where(session)


def _until(session: Session, words: Sequence[str]) -> str:
    if not words:
        raise InputError("until takes what `break` takes, as in `until layers.3.*`.")
    session.go(**read_condition(words))
    return describe.where(session)


def _end(session: Session, words: Sequence[str]) -> str:
    nothing_more(words, "end")
    session.end()
    return describe.where(session)


def _detach(session: Session, words: Sequence[str]) -> str:
    nothing_more(words, "detach")
    _ = session.launch
    session.steps.detach()
    return describe.where(session)


def _next(session: Session, words: Sequence[str]) -> str:
    count = read_count(words, "next")
    for _ in range(count):
        token = session.next_token()
        if token is None:
            break
    return f"{quoted(session.text)}\n{describe.where(session)}"


def _break(session: Session, words: Sequence[str]) -> str:
    said = (
        read_condition(words) if words else {"site": session.launch.site, "operator": session.launch.operator}
    )
    made = session.runner.breakpoints.add(**said)
    return f"breakpoint {made.number}: {made}"


def _watch(session: Session, words: Sequence[str]) -> str:
    if not 1 <= len(words) <= 2:
        raise InputError(
            "watch takes a weight, a cache or a site, and a part of it: `watch layers.3.self_attn.k_cache 0,0`."
        )
    part = read_part(words[1]) if len(words) == 2 else ...
    made = session.runner.breakpoints.watch(words[0], part)
    return f"breakpoint {made.number}: {made}"


def _breaks(session: Session, words: Sequence[str]) -> str:
    nothing_more(words, "breaks")
    return repr(session.runner.breakpoints)


def _delete(session: Session, words: Sequence[str]) -> str:
    which = one_word(words, "delete", "a breakpoint's number, or all")
    if which == "all":
        session.runner.breakpoints.clear()
    else:
        session.runner.breakpoints.remove(read_number(which, "a breakpoint's number, or all"))
    return repr(session.runner.breakpoints)


def _skip(session: Session, words: Sequence[str]) -> str:
    nothing_more(words, "skip")
    launch = _waiting(session)
    launch.skip()
    session.step(1)
    return f"{launch} was skipped; its outputs keep what they hold\n{describe.where(session)}"


def _replace(session: Session, words: Sequence[str]) -> str:
    if len(words) == 2:
        kernel, site = words
        session.replace(site, kernel)
        return f"{kernel} serves {site} from here on, where it can"
    launch = _waiting(session)
    kernel = one_word(words, "replace", f"one of the kernels {', '.join(launch.kernels)}, and perhaps sites")
    launch.replace(kernel)
    return describe.where(session)


def _waiting(session: Session) -> Launch:
    """The present launch, which has not been made."""
    launch = session.launch
    if launch.done:
        raise InputError(f"{launch} was {launch.done} already; `make` makes it again, `step` goes on.")
    return launch


def _make(session: Session, words: Sequence[str]) -> str:
    nothing_more(words, "make")
    launch = session.launch
    if launch.done:
        launch.rerun()
    else:
        launch.run()
    return describe.where(session)


def _time(session: Session, words: Sequence[str]) -> str:
    launch = session.launch
    cold = "cold" in words
    repeats = [word for word in words if word.isdecimal()]
    kernels = [word for word in words if word != "cold" and not word.isdecimal()] or list(launch.kernels)
    repeat = read_count(repeats[-1:] or ["20"], "time")
    lines = []
    for kernel in kernels:
        seconds = launch.time(repeat, cold=cold, kernel=kernel)
        rate = f"{launch.flops / seconds / 1e9:8.2f} GFLOP/s {launch.bytes / seconds / 1e9:8.2f} GB/s"
        lines.append(
            f"{kernel:<24} {seconds * 1e6:10.1f} us {rate}{'  chosen' if kernel == launch.kernel else ''}"
        )
        if session.interrupted:
            break
    return "\n".join(lines)


def _listing(form: str) -> Work:
    def work(session: Session, words: Sequence[str]) -> str:
        nothing_more(words, form)
        return describe.listing(session.launch, form)

    return work


def _text(session: Session, words: Sequence[str]) -> str:
    nothing_more(words, "text")
    return f"{quoted(session.text)} ({len(session.tokens)} tokens)"


def _quit(session: Session, words: Sequence[str]) -> str:
    nothing_more(words, "quit")
    raise Quit


class Quit(Exception):  # noqa: N818 - not an error: the wish to leave
    """The user wants to leave."""


COMMANDS = {
    known.name: known
    for known in (
        Command("step", "[N]", "make this launch and go on to the next, or N further", _step, "s"),
        Command("run", "", "go on to the next breakpoint, or the end of the call", _run, "r"),
        Command("until", "CONDITION", "go on to a launch that is so: as for break, once", _until),
        Command("end", "", "go on to the end of the call, past breakpoints", _end, "e"),
        Command("detach", "", "run the rest of the call natively, at full speed", _detach, "d"),
        Command("next", "[N]", "end the call and begin the next token's, or N on", _next, "n"),
        Command("make", "", "make this launch, or again, and stay behind it", _make, "m"),
        Command("skip", "", "do not make this launch, and go on to the next", _skip, "k"),
        Command("replace", "KERNEL [SITES]", "make it with another kernel; at sites: from here on", _replace),
        Command("time", "[N] [cold] [KERNEL...]", "time this launch with its kernels, in place", _time, "t"),
        Command("break", "[CONDITION]", "stop at SITES, kernel=K, operator=O, M=17, nan", _break),
        Command("watch", "TENSOR [PART]", "stop behind each launch that changes a tensor", _watch),
        Command("breaks", "", "list breakpoints", _breaks),
        Command("delete", "N|all", "remove breakpoints", _delete),
        Command("list", "[SITES]", "list the launches", _list),
        Command("info", "", "all about this launch", _info),
        Command("print", "[N [PART]]", "its tensors, or one with a histogram: print 2 0,0,:8", _print),
        Command("set", "N [PART] NUMBER", "write into a tensor: set 0 0,0,17 1.5", _set),
        Command("source", "", "the kernel as it was written", _listing("source")),
        Command("tir", "", "the kernel's TIR", _listing("tir")),
        Command("llvm", "", "the kernel's LLVM IR", _listing("llvm")),
        Command("assembly", "", "the kernel's assembly", _listing("assembly")),
        Command("text", "", "the text so far", _text),
        Command("help", "[COMMAND]", "this", _help),
        Command("quit", "", "leave", _quit, "q"),
    )
}

_SHORT = {known.key: known.name for known in COMMANDS.values() if known.key} | {
    "c": "run",
    "u": "until",
    "b": "break",
    "l": "list",
    "i": "info",
    "p": "print",
    "w": "watch",
    "h": "help",
}
