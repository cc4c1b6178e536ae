"""How each family cuts text, in the form its own tokenizer.json publishes (normalizer and pre-tokenizer)."""

# ruff: noqa: RUF001 -- characters that look like others are the point here

from __future__ import annotations

from typing import Any


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


DIGITS = {"type": "Digits", "individual_digits": True}
NFC = {"type": "NFC"}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Letters that Unicode composes to others are written by number, so that no editor changes them.
DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbe"
    "ῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
CJK_AND_HANGUL = "[一-龥ࠀ-一가-퟿]+"
DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES_LAST = _bytes(False)

# name: (normalizer, pre-tokenizer, words that are tokens are taken whole)
PUBLISHED: dict[str, tuple[dict[str, Any] | None, dict[str, Any], bool]] = {
    "gpt-2": (None, _bytes(True), False),
    "mpt": (NFC, _bytes(True), False),
    "smollm": (None, _sequence(DIGITS, _bytes(True)), False),
    "command-r": (NFC, _sequence(DIGITS, _bytes(True)), False),
    "falcon": (
        None,
        _sequence(
            {"type": "Punctuation", "behavior": "Contiguous"},
            _bytes(True),
            {"type": "Digits", "individual_digits": False},
            _split("[0-9][0-9][0-9]"),
        ),
        False,
    ),
    "llama-bpe": (None, _sequence(_split(LLAMA3), BYTES_LAST), True),
    "dbrx": (None, _sequence(_split(LLAMA3), BYTES_LAST), False),
    "qwen2": (NFC, _sequence(_split(QWEN2), BYTES_LAST), False),
    "tekken": (None, _sequence(_split(TEKKEN), BYTES_LAST), True),
    "gpt-4o": (None, _sequence(_split(GPT4O), BYTES_LAST), False),
    "deepseek-llm": (
        {"type": "Sequence", "normalizers": []},
        _sequence(
            _split("[\r\n]"),
            _split(rf"\s?[{DEEPSEEK_LETTERS}]+"),
            _split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            _split(r"\s+$"),
            _split(CJK_AND_HANGUL),
            DIGITS,
            BYTES_LAST,
        ),
        False,
    ),
    "deepseek-coder": (
        {"type": "Sequence", "normalizers": []},
        _sequence(
            _split("[\r\n]"),
            _split(r"\s?\p{L}+"),
            _split(r"\s?\p{P}+"),
            _split(CJK_AND_HANGUL),
            DIGITS,
            BYTES_LAST,
        ),
        False,
    ),
    "deepseek-v3": (
        {"type": "Sequence", "normalizers": []},
        _sequence(_split(r"\p{N}{1,3}"), _split("[一-龥぀-ゟ゠-ヿ]+"), _split(DEEPSEEK_V3), BYTES_LAST),
        False,
    ),
    "bloom": (None, _sequence(_split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), BYTES_LAST), False),
}

# The same cuts for a plain regular-expression engine: (patterns in turn, composed first, words taken whole).
PLAIN: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    "gpt-2": ((GPT2,), False, False),
    "smollm": ((r"\p{N}", GPT2), False, False),
    "qwen2": ((QWEN2,), True, False),
    "llama-bpe": ((LLAMA3,), False, True),
    "tekken": ((TEKKEN,), False, True),
    "gpt-4o": ((GPT4O,), False, False),
    "deepseek-v3": ((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_V3), False, False),
}
