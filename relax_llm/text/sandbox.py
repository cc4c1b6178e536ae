"""The Jinja environment for chat templates, which come with a checkpoint and are not trusted.

What a template can reach: plain data it is given, and Jinja's own filters and tests. Underscore attributes,
changing what it is given, imports and files are out of reach (Jinja's immutable sandbox).

What is bounded, each with an error: the length of the template; loop turns and calls together; the time,
looked at on every one of those; ``range``; powers; the length of the output; and the length of every text or
list made by ``*``, ``+``, ``~``, ``%`` or by a method or filter that can make its input longer, each alone
and all in total. The longest thing that runs unchecked is one step over data of that length.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from relax_llm.errors import TokenizerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from jinja2.parser import Parser
    from jinja2.runtime import Context, Macro

MAX_TEMPLATE = 1_000_000  # characters of source
MAX_STEPS = 500_000  # loop turns and calls in one rendering
MAX_SECONDS = 10.0  # of one rendering, looked at on every step
MAX_LENGTH = 8_000_000  # characters or items of one value that the template makes, and of the output
MAX_TOTAL = 100_000_000  # characters or items of all those values together
MAX_DEPTH = 64  # of nesting in messages and variables
MAX_POWER = 4096  # bits of a power's result


class _Budget:
    """What one rendering has used of its steps, time and memory."""

    def __init__(self) -> None:
        self.steps = 0
        self.made = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def spend(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS} loop turns and calls")
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


@contextmanager
def limited_rendering() -> Iterator[None]:
    """One rendering with a fresh budget of steps, time and memory."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def _length(value: object) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0


def _allow(length: int) -> None:
    if length > MAX_LENGTH:
        raise SecurityError(
            f"it makes a text or list of {length} elements (at most {MAX_LENGTH} are allowed)"
        )
    budget = _budget.get()
    if budget is not None:
        budget.made += length
        if budget.made > MAX_TOTAL:
            raise SecurityError(f"it makes texts and lists of more than {MAX_TOTAL} elements in total")


def _concat(parts: Iterable[str]) -> str:
    """Jinja's own joining of a template's, macro's or block's output, with its length bounded."""
    kept, length = [], 0
    for part in parts:
        kept.append(part)
        length += len(part)
        if length > MAX_LENGTH:
            raise SecurityError(f"it writes more than {MAX_LENGTH} characters")
    return "".join(kept)


def _allow_operation(operator: str, left: Any, right: Any) -> None:
    """Refuses an operation whose result would be out of proportion, before it is done."""
    if operator == "*":
        for repeated, count in ((left, right), (right, left)):
            if isinstance(count, int):
                _allow(_length(repeated) * max(count, 0))
        if isinstance(left, int) and isinstance(right, int):
            _allow(left.bit_length() + right.bit_length())
    elif operator == "+":
        _allow(_length(left) + _length(right))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * max(right, 0) > MAX_POWER:
            raise SecurityError("it raises a number to a power with too many digits")
    elif operator == "%" and isinstance(left, str):
        _allow_format(left, right if isinstance(right, (tuple, dict)) else (right,))


def _allow_format(pattern: str, values: object) -> None:
    """Bounds what a format pattern can give: its widths, and every value as often as there are fields."""
    widths = [int(digits) for digits in re.findall(r"\d{1,18}", pattern)]
    if "*" in pattern:
        widths += [value for value in values if isinstance(value, int)] if isinstance(values, tuple) else []
    items = values.values() if isinstance(values, dict) else values
    longest = (
        max((_length(item) for item in items), default=0)
        if isinstance(items, (tuple, type({}.values())))
        else 0
    )
    fields = pattern.count("%") + pattern.count("{")
    _allow(len(pattern) + sum(abs(width) for width in widths) + fields * longest)


def _allow_growth(name: str, subject: Any, arguments: list[Any]) -> None:
    """Bounds a method or filter that can make its subject longer; others are not looked at."""
    numbers = [argument for argument in arguments if isinstance(argument, int)]
    texts = [argument for argument in arguments if isinstance(argument, str)]
    longest = max(map(len, texts), default=0)
    if name == "replace" and len(texts) >= 2:
        _allow(_length(subject) + str(subject).count(texts[0]) * len(texts[1]))
    elif name == "join":
        if isinstance(subject, str):  # the method: separator.join(items)
            subject, longest = (arguments[0] if arguments else ()), len(subject)
        items = subject if isinstance(subject, (list, tuple, dict)) else ()
        _allow(len(items) * longest + sum(map(_length, items)))
    elif name in ("format", "format_map"):
        _allow_format(str(subject), tuple(arguments))
    elif name in ("indent", "tojson", "wordwrap"):
        _allow((_length(subject) + 1) * (longest + 1) if longest > 256 else 0)
        _allow(1024 * sum(map(abs, numbers)))
    elif name in _SIZED:
        _allow(_length(subject) * (8 if name == "expandtabs" else 1) + sum(map(abs, numbers)))
        if name == "expandtabs":
            _allow(str(subject).count("\t") * sum(map(abs, numbers)))


_SIZED = {"batch", "center", "expandtabs", "ljust", "rjust", "round", "slice", "truncate", "zfill"}
_GROWING = _SIZED | {"format", "format_map", "indent", "join", "replace", "tojson", "wordwrap"}


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps Jinja's marks on filters that want the environment first
    def limited(*arguments: Any, **named: Any) -> Any:
        own = arguments[1:] if hasattr(function, "jinja_pass_arg") else arguments
        _allow_growth(name, own[0] if own else "", [*own[1:], *named.values()])
        return function(*arguments, **named)

    return limited


class _Steps(Extension):
    """Counts the turns of every loop."""

    def step(self) -> str:
        """Counted as a call is, by the environment."""
        return ""

    def join(self, *parts: Any) -> str:
        """The ``~`` of the template's language, with its result's length bounded."""
        texts = [str(part) for part in parts]
        _allow(sum(map(len, texts)))
        return "".join(texts)


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 -- Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return str(caller())


class _Namespace(Namespace):
    """``namespace()`` without underscore names, which could reach what the sandbox hides."""

    def __init__(*arguments: Any, **named: Any) -> None:
        self, rest = arguments[0], arguments[1:]
        Namespace.__init__(self, *rest, **named)
        for name in Namespace.__getattribute__(self, "_Namespace__attrs"):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores {name!r} in a namespace; names there cannot begin with an underscore")


class _NewDict:
    """``dict(...)`` for templates: makes dictionaries, and shows none of the type."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "+", "**", "%"})
    concat = staticmethod(_concat)

    def call(self, context: Context, called: Any, /, *arguments: Any, **named: Any) -> Any:
        budget = _budget.get()
        if budget is not None:
            budget.spend()
        name = getattr(called, "__name__", "")
        owner = getattr(getattr(called, "__wrapped__", called), "__self__", None)  # Jinja wraps str.format
        if name in _GROWING and isinstance(owner, str):
            _allow_growth(name, owner, [*arguments, *named.values()])
        return super().call(context, called, *arguments, **named)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _allow_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    _allow_format(pattern, ())
    return datetime.now().strftime(pattern)


@functools.cache
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Steps, _Generation, loopcontrols], optimized=False
    )
    environment.filters["tojson"] = _tojson
    for name in _GROWING & environment.filters.keys():
        environment.filters[name] = _limited_filter(name, environment.filters[name])
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
        "dict": _NewDict(),
    }
    del environment.globals["lipsum"]  # random filler text of any length
    return environment


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """Compiles a template so that every loop turn is counted.

    Args:
        source: The template.

    Raises:
        jinja2.TemplateSyntaxError: With the line.
        SecurityError: It is longer than any template that people write.
    """
    if len(source) > MAX_TEMPLATE:
        raise SecurityError(f"it is {len(source)} characters long (at most {MAX_TEMPLATE} are allowed)")
    environment = _environment()
    steps = environment.extensions[_Steps.identifier]
    tree = environment.parse(source)
    for loop in tree.find_all(nodes.For):
        loop.body.insert(0, nodes.ExprStmt(steps.call_method("step")).set_lineno(loop.lineno))
    for parent in [tree, *tree.find_all(nodes.Node)]:
        _replace_concatenations(parent, steps)
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


def _replace_concatenations(parent: nodes.Node, steps: Extension) -> None:
    """``a ~ b`` becomes a call, so that its length is bounded as the other operators' is."""

    def replaced(node: Any) -> Any:
        if isinstance(node, nodes.Concat):
            return steps.call_method("join", node.nodes, lineno=node.lineno)
        return node

    for name, value in parent.iter_fields():
        if isinstance(value, list):
            value[:] = map(replaced, value)
        else:
            setattr(parent, name, replaced(value))


def plain_data(name: str, value: Any, depth: int = 0) -> Any:
    """A copy made of plain JSON types alone, so that a template cannot reach methods of anything richer.

    Args:
        name: Of the template's variable, for error messages.
        value: Texts, numbers, booleans, None, and lists, tuples and mappings of those.
        depth: Of nesting above ``value``.

    Raises:
        TokenizerError: There is something else in it, or it is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise TokenizerError(f"The chat template's variable {name!r} is nested more than {MAX_DEPTH} deep.")
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        pairs = ((plain_data(name, k, depth + 1), plain_data(name, v, depth + 1)) for k, v in value.items())
        return dict(pairs)
    if isinstance(value, (list, tuple)):
        return [plain_data(name, item, depth + 1) for item in value]
    raise TokenizerError(
        f"The chat template's variable {name!r} holds a {type(value).__name__}; give it text, numbers, "
        "lists and dictionaries alone."
    )
