"""Formulas give what exact arithmetic gives, and nothing but arithmetic is a formula."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from relax_llm.artifact import formulas
from relax_llm.errors import ArtifactError, InputError

SIZES = {"batch": 3, "seq": 5, "kv_len": 100}


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("7", 7),
        ("batch", 3),
        ("2304*batch*seq*(kv_len - (seq - 1)/2)", 2304 * 3 * 5 * 98),
        ("7077888 + 8448*batch*seq", 7077888 + 8448 * 15),
        ("(kv_len + 15)//16", 7),
        ("-7//2", -4),
        ("-(seq - 7)", 2),
        ("+seq", 5),
        ("seq/2", 2.5),
        ("1.5*batch*2", 9),
        ("min(seq, 3) + max(batch, seq, 9)", 12),
        ("min(seq)", 5),
        ("10000000000000000000000*seq/5", 10**22),
        ("  seq  ", 5),
        ("seq/3*3", 5),
    ],
)
def test_values(formula: str, value: float) -> None:
    found = formulas.evaluate(formula, SIZES)
    assert found == value
    assert type(found) is (float if found % 1 else int)


def test_names() -> None:
    assert formulas.names("2*batch*seq + min(kv_len, 3) - 1") == {"batch", "seq", "kv_len"}
    assert formulas.names("4") == frozenset()


expressions = st.recursive(
    st.sampled_from(sorted(SIZES)) | st.integers(0, 10**12).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//"]), inner).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        ),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
        inner.map(lambda text: f"-{text}"),
    ),
    max_leaves=12,
)


@given(expressions)
def test_values_are_exact(formula: str) -> None:
    try:
        expected = reference(formula)
    except ZeroDivisionError:
        with pytest.raises(ArtifactError, match="divides by zero"):
            formulas.evaluate(formula, SIZES)
        return
    found = formulas.evaluate(formula, SIZES)
    assert found == (int(expected) if expected.denominator == 1 else float(expected))


def reference(formula: str) -> Fraction:
    """Python's own evaluation, with every number made a fraction first."""
    exact = re.sub(r"\b\d+\b", lambda number: f"Fraction({number.group()})", formula)
    sizes = {name: Fraction(size) for name, size in SIZES.items()}
    return Fraction(eval(exact, {"Fraction": Fraction, "min": min, "max": max}, sizes))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "2**9",
            "a.b",
            "a[0]",
            "'a'",
            "True",
            "None",
            "...",
            "1j",
            "1e999",
            "lambda: 1",
            "[1]",
            "(1, 2)",
        ),
        *(
            "f(1)",
            "min()",
            "min(*a)",
            "min(1, key=2)",
            "abs(1)",
            "1 if a else 2",
            "a < 2",
            "a and b",
            "not a",
            "~1",
        ),
        *(
            "a % 2",
            "a << 2",
            "a @ b",
            "x := 1",
            "1; 2",
            "import os",
            "__import__('os')",
            "a\n+1",
            "\0",
            "1 +",
            "((",
        ),
        *("(" * 300 + "1" + ")" * 300, "-" * 9000 + "1", "1+" * 4999 + "1", "1+" * 9000 + "1", "9" * 9000),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_what_is_no_formula(text: str) -> None:
    with pytest.raises(ArtifactError, match="not a formula"):
        formulas.evaluate(text, {"a": 1, "b": 1, "x": 1})
    with pytest.raises(ArtifactError, match="not a formula"):
        formulas.names(text)


def test_a_value_that_no_float_holds() -> None:
    text = "*".join(["1" + "0" * 300] * 3) + "/7"
    with pytest.raises(ArtifactError, match="not a formula"):
        formulas.evaluate(text, {})


def test_a_missing_size_is_named() -> None:
    with pytest.raises(InputError, match="needs the size 'kv_len'"):
        formulas.evaluate("kv_len + 1", {"seq": 1})


def test_division_by_zero() -> None:
    for text in ("1/(seq - 5)", "1//(seq - 5)"):
        with pytest.raises(ArtifactError, match="divides by zero"):
            formulas.evaluate(text, SIZES)
