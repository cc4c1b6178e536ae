"""Strings on which tokenizers differ, the same ones for a given seed."""

# ruff: noqa: RUF001 -- characters that look like others are the point here

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "don't",
    "I'll",
    "they've",
    "WE'RE",
    "it's",
    "HELLO",
    "camelCase",
    "XMLHttpRequest",
    "snake_case",
    "naïve",
    "café",
    "Straße",
    "İstanbul",
    "ﬁne",
    "Größe",
    "übermäßig",
    "ĲSSEL",
    "Ǆungla",
    "résumé",
    "résumé",
    "façade",
    "O'Neil's",
    "'tis",
]
SCRIPTS = {
    "cjk": "你好世界东京都今天天气很好机器学习漢字かなカナ日本語の文章한국어문장입니다，。！？「」、",
    "arabic": "مرحبا بالعالم كيف حالك اليوم العربية،؟ ١٢٣٤٥ فارسی پنج",
    "hebrew": "שלום עולם מה שלומך",
    "indic": "नमस्ते दुनिया हिन्दी में लिखा हुआ १२३ বাংলা தமிழ்",
    "thai": "สวัสดีชาวโลกภาษาไทยไม่มีช่องว่าง ๑๒๓",
    "cyrillic": "Привет мир как дела сегодня Українська ї",
    "greek": "Καλημέρα κόσμε τι κάνεις σήμερα ΰ",
    "math": "∑∫√∞≠≤≥αβγ𝒜𝔅ℂ⅓½²³ⅫⅣ①②",
}
EMOJI = (
    "😀",
    "🙂",
    "👍🏽",
    "👨\u200d👩\u200d👧\u200d👦",
    "🏳️\u200d🌈",
    "🇩🇪🇫🇷",
    "❤️",
    "🧑🏿\u200d💻",
    "☃",
    "✈️",
    "1️⃣",
)
SPACES = (
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    " \n ",
    "\n  ",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\u2003",
    "\x0b",
)
ODD = (
    *(chr(i) for i in range(32)),
    *(
        "\x7f",
        "\x85",
        "\u200b",
        "\u200c",
        "\u200d",
        "\ufeff",
        "\u2060",
        "\u00ad",
        "\u0301",
        "\u0308\u0323",
        "\u20dd",
    ),
    *(
        "\ufffd",
        "\uffff",
        "\ue000",
        "\U0010ffff",
        "\U000e0041",
        "\u0378",
        "\u1e9b\u0323",
        "\u1100\u1161\u11a8",
        "\u212b",
    ),
)
CODE = (
    "def f(x, *, y=1):\n    return x**2 + y\n",
    "for (int i = 0; i < n; ++i) {\n\t\ta[i] += b[i] * 3.14e-10f;\n}\n",
    '<div class="a b">&nbsp;</div><!-- c -->',
    "SELECT * FROM t WHERE a='it''s' AND b>=10;",
    "#include <stdio.h>\r\n#define X(a) (a##_t)\r\n",
    "https://example.org/a/b?c=d%20e&f=#g",
    '{"key": [1, 2.5, null, true], "k\\n": "\\u00e9"}',
    "$ rm -rf /tmp/x && echo \"done\" | grep -E '^[a-z]+$'",
    "    \n        if x:\n            pass\n\n\n",
    "a||b&&c!==d?.e??f=>({...g})//h/*i*/",
)
LITERALS = (
    "▁",
    "▁▁the",
    "<0x41>",
    "<0xE4>",
    "Ġ",
    "Ċ",
    "Ã©",
    "</w>",
    "##ing",
    "[PAD]",
    "<unk",
    "|>",
    "<|",
    "<s",
    "s>",
)


def _digits(rng: random.Random) -> str:
    run = "".join(rng.choices("0123456789", k=rng.choice((1, 2, 3, 4, 7, 12, 40))))
    return rng.choice(
        (run, run, f"{run[:3]},{run}", f"-{run}.{run}", f"0x{run}", f"{run}km", run.replace("1", "٣"))
    )


def _part(rng: random.Random, special: Sequence[str]) -> str:
    kind = rng.randrange(12 if special else 11)
    if kind <= 2:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
    if kind == 3:
        script = rng.choice(list(SCRIPTS.values()))
        at = rng.randrange(len(script))
        return script[at : at + rng.randint(1, 14)]
    if kind == 4:
        return "".join(rng.choices(EMOJI, k=rng.randint(1, 3)))
    if kind == 5:
        return _digits(rng)
    if kind == 6:
        return rng.choice(SPACES) * rng.choice((1, 1, 2, 3, 9))
    if kind == 7:
        code = rng.choice(CODE)
        return code[rng.randrange(len(code)) :] if rng.random() < 0.5 else code
    if kind == 8:
        return rng.choice(("a", "e", "ก", "", " ")) + "".join(rng.choices(ODD, k=rng.randint(1, 3)))
    if kind == 9:
        return rng.choice(LITERALS)
    if kind == 10:
        return "".join(rng.choices(".,;:!?…—-_()[]{}<>*&^%$#@~`'\"\\/|+=", k=rng.randint(1, 8)))
    return rng.choice(special)


def corpus(count: int, *, seed: int = 0, special: Sequence[str] = ()) -> list[str]:
    """Strings of many scripts, code, digits, spaces and control characters.

    Args:
        count: How many, the empty string and each single ingredient among them.
        seed: Of the random combinations.
        special: Tokens to put inside the text.
    """
    rng = random.Random(seed)
    strings = ["", *WORDS, *SCRIPTS.values(), *EMOJI, *SPACES, *ODD, *CODE, *LITERALS, *special]
    strings += [" " * n + word for n in range(1, 6) for word in ("x", "1", "!", "é", "你", "🙂", "")]
    while len(strings) < count:
        joint = rng.choice(("", "", " ", "\n"))
        strings.append(joint.join(_part(rng, special) for _ in range(rng.randint(1, 6))))
    return strings
