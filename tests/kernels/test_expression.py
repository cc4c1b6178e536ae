"""Expressions of single elements: written and read back, refused, folded."""

from __future__ import annotations

import numpy as np
import pytest

from relax_llm.errors import KernelError
from relax_llm.kernels.elementwise import Elementwise
from relax_llm.kernels.expression import Apply, Input, Number, Tree, fold, parse, parts
from relax_llm.kernels.operators import operator_of
from relax_llm.kernels.problem import Problem

WRITTEN = [
    "a",
    "a[48:]",
    "1.5",
    "-3",
    "a + -0.1",
    "a - (b - c)",
    "(a - b) - c",
    "(a * sigmoid(a)) * a[48:]",
    "where((0.0 < a) and (a != b), maximum(a, b), minimum(a, inf))",
    "not (a <= b)",
    "(not (a < b)) or (b == c)",
    "float32(a // 2) / int64(b % 3)",
    "pow(a, 1e-05)",
]


@pytest.mark.parametrize("text", WRITTEN)
def test_what_is_written_is_read(text: str) -> None:
    tree = parse(text)
    assert str(tree) == text
    assert parse(str(tree)) == tree
    assert hash(parse(text)) == hash(tree)


@pytest.mark.parametrize(
    "text",
    [
        *("", "a +", "a.b", "f(a)", "exp(a, b)", "a if b else c", "a[1]", "a[1:2]", "a[b:]", "a < b < c"),
        *(
            "lambda: 0",
            "[a]",
            "'x'",
            "True",
            "a ** 2",
            "exp(x=a)",
            "(" * 300 + "a" + ")" * 300,
            "a\n+",
            "a; b",
        ),
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(KernelError, match="is no expression of single elements"):
        parse(text)


def test_a_constant_is_the_float32_that_it_stands_for() -> None:
    value = float(np.float32(0.044715))
    assert parse("0.044715") == Number(value)
    assert parse(str(Number(value))) == Number(value)


def test_equal_parts_are_made_once() -> None:
    tree = parse("exp(a + b) * exp(a + b)")
    assert [str(part) for part in parts(tree)] == ["a", "b", "a + b", "exp(a + b)", "exp(a + b) * exp(a + b)"]
    made: list[Tree] = []

    def count(part: Tree, of: tuple[int, ...]) -> int:
        made.append(part)
        return 1 + sum(of)

    assert fold(tree, count) == 9  # of a tree that is written out
    assert len(made) == 5


def test_a_problem_is_its_expression_and_shapes() -> None:
    problem = Elementwise("a * b[4:]", ("batch", "seq", 4), ((4,), ("batch", 1, 8)), ("float32",) * 3)
    assert Problem.from_json(problem.to_json()) == problem
    assert hash(Problem.from_json(problem.to_json())) == hash(problem)
    assert problem.tree == Apply("*", (Input("a"), Input("b", 4)))
    assert problem.name.startswith("elementwise_mul_")
    assert problem.name.isidentifier()
    assert problem.flops == "1*batch*seq*4"
    assert problem.bytes == "4*4 + 4*batch*1*4 + 4*batch*seq*4"


def test_an_error_moves_through_what_follows() -> None:
    """A difference of near numbers has the error of what was rounded before it; a comparison in doubt has both."""
    shape = ("batch", "seq", 4)
    a = np.array([[[3.0, 0.1, 100.0, -2.0]]], np.float32)
    for expression, least in (("(a * a + 1.0) - a * a", 1e-4), ("where(exp(a) == exp(a), 1.0, 0.0)", 0.5)):
        problem = Elementwise(expression, shape, (shape,), ("float32",) * 2)
        found = operator_of(problem).expected(problem, {"batch": 1, "seq": 1}, {"a": a}, False)["out"]
        np.testing.assert_array_equal(found.right, np.ones((1, 1, 4)))
        assert found.bound[0, 0, 2] > least
