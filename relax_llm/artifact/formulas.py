"""Formulas in the symbolic sizes, as the manifest states costs and shapes: read and evaluated without `eval`."""

import ast
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache

from relax_llm.errors import ArtifactError, InputError

_LONGEST = 10_000
"""Characters. Longer text in a manifest is not a formula, and would make the parser recurse for ever."""

_FUNCTIONS = {"min": min, "max": max}


def names(formula: str) -> frozenset[str]:
    """The symbolic sizes that a formula depends on.

    >>> sorted(names("2304*batch*seq*(kv_len - (seq - 1)/2)"))
    ['batch', 'kv_len', 'seq']

    Raises:
        ArtifactError: It is not a formula.
    """
    tree = _parse(formula)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    return frozenset(node.id for node in found if id(node) not in called)


def evaluate(formula: str, sizes: Mapping[str, int]) -> int | float:
    """The value of a formula: numbers, names, + - * / //, min and max.

    The arithmetic is exact, so that a count of 10^18 operations does not lose its last digits to a division.

    >>> evaluate("2304*batch*seq*(kv_len - (seq - 1)/2)", {"batch": 1, "seq": 4, "kv_len": 4})
    23040

    Args:
        formula: The text.
        sizes: A value for each name in it; more do no harm.

    Returns:
        An int where the value is whole.

    Raises:
        ArtifactError: It is not a formula, or it divides by zero.
        InputError: A name has no value.
    """
    try:
        value = _value(_parse(formula), sizes, formula)
        return int(value) if value.denominator == 1 else float(value)
    except ZeroDivisionError:
        raise ArtifactError(f"The formula {_shown(formula)} divides by zero for these sizes.") from None
    except (RecursionError, OverflowError):
        raise _not_arithmetic(formula) from None


@lru_cache(maxsize=4096)
def _parse(formula: str) -> ast.expr:
    if len(formula) > _LONGEST:
        raise _not_arithmetic(formula)
    try:
        tree = ast.parse(formula.strip(), mode="eval").body
        for node in ast.walk(tree):
            if not _is_arithmetic(node):
                raise _not_arithmetic(formula)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _not_arithmetic(formula) from None
    return tree


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        number = node.value
        return type(number) is int or (type(number) is float and number - number == 0)
    if isinstance(node, ast.Call):
        return (
            isinstance(node.func, ast.Name)
            and node.func.id in _FUNCTIONS
            and bool(node.args)
            and not node.keywords
        )
    operators = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.USub, ast.UAdd)
    return isinstance(node, (ast.BinOp, ast.UnaryOp, ast.Name, ast.Load, *operators))


def _value(node: ast.expr, sizes: Mapping[str, int], formula: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(number)
        case ast.Name(id=name):
            if name not in sizes:
                raise InputError(
                    f"The formula {_shown(formula)} needs the size {name!r}, which has no value."
                )
            return Fraction(sizes[name])
        case ast.UnaryOp(op=operator, operand=operand):
            value = _value(operand, sizes, formula)
            return -value if isinstance(operator, ast.USub) else value
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _FUNCTIONS[name]([_value(argument, sizes, formula) for argument in arguments])
        case ast.BinOp(left=left_node, op=operator, right=right_node):
            left, right = _value(left_node, sizes, formula), _value(right_node, sizes, formula)
            match operator:
                case ast.Add():
                    return left + right
                case ast.Sub():
                    return left - right
                case ast.Mult():
                    return left * right
                case ast.Div():
                    return left / right
                case ast.FloorDiv():
                    return Fraction(left // right)
    raise _not_arithmetic(formula)


def _not_arithmetic(formula: str) -> ArtifactError:
    return ArtifactError(
        f"{_shown(formula)} is not a formula of numbers, names, + - * / //, min and max; compile the artifact again."
    )


def _shown(formula: str) -> str:
    return repr(formula if len(formula) <= 80 else f"{formula[:77]}...")
