"""Arithmetic on single elements as a tree: printed and read as Python's own notation, hashed, folded into anything."""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from relax_llm.errors import KernelError

Result = TypeVar("Result")

BINARY: Mapping[str, type[ast.operator]] = {
    "+": ast.Add,
    "-": ast.Sub,
    "*": ast.Mult,
    "/": ast.Div,
    "//": ast.FloorDiv,
    "%": ast.Mod,
}
COMPARISONS: Mapping[str, type[ast.cmpop]] = {
    "<": ast.Lt,
    "<=": ast.LtE,
    "==": ast.Eq,
    "!=": ast.NotEq,
}
LOGICAL: Mapping[str, type[ast.boolop]] = {"and": ast.And, "or": ast.Or}
CASTS = ("float32", "int32", "int64")
FUNCTIONS: Mapping[str, int] = {
    **dict.fromkeys(("abs", "ceil", "cos", "erf", "exp", "floor", "log", "not", "round", "rsqrt"), 1),
    **dict.fromkeys(("sigmoid", "sin", "sqrt", "tanh", "trunc", *CASTS), 1),
    **dict.fromkeys(("maximum", "minimum", "pow"), 2),
    "where": 3,
}
"""What an expression may call, and with how many arguments; the names are NumPy's."""


@dataclass(frozen=True)
class Input:
    """An element of an operand, `a`; or one further along its last axis by a constant, `a[48:]`."""

    name: str
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.name}[{self.offset}:]" if self.offset else self.name


@dataclass(frozen=True)
class Number:
    """A constant: a float32, or a whole number of the type of what it is combined with."""

    value: float | int

    def __str__(self) -> str:
        return str(np.float32(self.value)) if isinstance(self.value, float) else str(self.value)


@dataclass(frozen=True)
class Apply:
    """An operator or a function, applied."""

    function: str
    arguments: tuple["Tree", ...]

    def __str__(self) -> str:
        if self.function in BINARY or self.function in COMPARISONS or self.function in LOGICAL:
            return f" {self.function} ".join(map(_within, self.arguments))
        if self.function == "not":
            return f"not {_within(self.arguments[0])}"
        return f"{self.function}({', '.join(map(str, self.arguments))})"


Tree = Input | Number | Apply


def _within(tree: Tree) -> str:
    """A part of a larger expression, in parentheses where it is written between its arguments."""
    text = str(tree)
    return f"({text})" if isinstance(tree, Apply) and not text.startswith(f"{tree.function}(") else text


def parse(text: str) -> Tree:
    """The tree of an expression.

    Raises:
        KernelError: It is none, or has something else in it than arithmetic.
    """
    try:
        return _tree(ast.parse(text, mode="eval").body)
    except (SyntaxError, RecursionError, ValueError) as error:
        raise KernelError(f"{text!r} is no expression of single elements: {error}.") from error


def fold(tree: Tree, make: Callable[[Tree, tuple[Result, ...]], Result]) -> Result:
    """Make something of a tree from what was made of its parts; of equal parts once."""
    made: dict[Tree, Result] = {}

    def visit(part: Tree) -> Result:
        if part not in made:
            arguments = part.arguments if isinstance(part, Apply) else ()
            made[part] = make(part, tuple([visit(argument) for argument in arguments]))
        return made[part]

    return visit(tree)


def parts(tree: Tree) -> Iterator[Tree]:
    """Every different part of a tree, arguments first, the tree itself last."""
    found: list[Tree] = []

    def note(part: Tree, _: tuple[None, ...]) -> None:
        found.append(part)

    fold(tree, note)
    return iter(found)


def _tree(node: Any) -> Tree:
    match node:
        case ast.Name(name):
            return Number(float("inf")) if name == "inf" else Input(name)
        case ast.Subscript(ast.Name(name), ast.Slice(ast.Constant(int(offset)), None, None)):
            return Input(name, offset)
        case ast.Constant(bool()):
            raise ValueError("True and False are no numbers here")
        case ast.Constant(int(value)):
            return Number(value)
        case ast.Constant(float(value)):
            return Number(float(np.float32(value)))
        case ast.UnaryOp(ast.USub(), operand):
            negative = _tree(operand)
            if isinstance(negative, Number):
                return Number(-negative.value)
        case ast.UnaryOp(ast.Not(), operand):
            return Apply("not", (_tree(operand),))
        case ast.BinOp(left, operation, right):
            return Apply(_symbol(BINARY, operation), (_tree(left), _tree(right)))
        case ast.Compare(left, [operation], [right]):
            return Apply(_symbol(COMPARISONS, operation), (_tree(left), _tree(right)))
        case ast.BoolOp(operation, [left, right]):
            return Apply(_symbol(LOGICAL, operation), (_tree(left), _tree(right)))
        case ast.Call(ast.Name(name), arguments, []) if FUNCTIONS.get(name) == len(arguments):
            return Apply(name, tuple(map(_tree, arguments)))
    raise ValueError(f"{ast.unparse(node)!r} is not known")


def _symbol(known: Mapping[str, type], operation: object) -> str:
    for symbol, kind in known.items():
        if isinstance(operation, kind):
            return symbol
    raise ValueError(f"{type(operation).__name__} is not known")
