"""Byte-level BPE: the pre-tokenizer of each model family, by the name GGUF files give it.

A byte-level vocabulary alone does not say how text is cut into words before merging, and two families with
the same merges and another cut give other token ids. Each entry below is the definition in that family's own
``tokenizer.json``. A name that is not listed is refused: a near match would run and be subtly wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class ByteLevelFamily:
    """How one family cuts text before byte-level BPE.

    Attributes:
        splits: The steps, in order: a regular expression whose matches stand alone, or one of the names
            ``digits`` (each digit alone), ``digit-runs``, ``punctuation`` (runs) and ``bytes`` (GPT-2's own
            cut, and bytes to letters at this place of the sequence instead of at its end).
        nfc: The text is brought to Unicode's composed form first.
        ignore_merges: A word that is in the vocabulary as a whole is taken as it is, whatever the merges say.
        add_bos: A GGUF file that does not say otherwise puts the beginning-of-sequence token first.
    """

    splits: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS_CL100K = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_LLAMA3 = _WORDS_CL100K % "{1,3}"
_QWEN2 = _WORDS_CL100K % ""
_QWEN35 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _TAIL

# Words that keep their case together: capitals then small letters, both with the letters that have no case.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%(end)s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%(end)s"
_TEKKEN = _CASED % {"end": ""} + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
_GPT4O = _CASED % {"end": _CONTRACTION + "?"} + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL

# DeepSeek LLM lists the cased letters (Unicode 11) by range, and its CJK and punctuation blocks.
_CASED_LETTERS = (
    r"A-Za-z\u00B5\u00C0-\u00D6\u00D8-\u00F6\u00F8-\u01BA\u01BC-\u01BF\u01C4-\u0293\u0295-\u02AF\u0370-\u0373"
    r"\u0376\u0377\u037B-\u037D\u037F\u0386\u0388-\u038A\u038C\u038E-\u03A1\u03A3-\u03F5\u03F7-\u0481\u048A-\u052F"
    r"\u0531-\u0556\u10A0-\u10C5\u13A0-\u13F5\u13F8-\u13FD\u1C90-\u1CBA\u1CBD-\u1CBF\u1D00-\u1D2B\u1D6B-\u1D77"
    r"\u1D79-\u1D9A\u1E00-\u1F15\u1F18-\u1F1D\u1F20-\u1F45\u1F48-\u1F4D\u1F50-\u1F57\u1F59\u1F5B\u1F5D"
    r"\u1F5F-\u1F7D\u1F80-\u1FB4\u1FB6-\u1FBC\u1FBE\u1FC2-\u1FC4\u1FC6-\u1FCC\u1FD0-\u1FD3\u1FD6-\u1FDB"
    r"\u1FE0-\u1FEC\u1FF2-\u1FF4\u1FF6-\u1FFC\u2102\u2107\u210A-\u2113\u2115\u2119-\u211D\u2124\u2126\u2128"
    r"\u212A-\u212D\u212F-\u2134\u2139\u213C-\u213F\u2145-\u2149\u214E\u2183\u2184\u2C00-\u2C7B\u2C7E-\u2CE4"
    r"\u2CEB-\u2CEE\u2CF2\u2CF3\uA640-\uA66D\uA680-\uA69B\uA722-\uA76F\uA771-\uA787\uA78B-\uA78E\uAB70-\uABBF"
    r"\uFB00-\uFB06\uFB13-\uFB17\uFF21-\uFF3A\uFF41-\uFF5A\U00010400-\U0001044F\U000104B0-\U000104D3"
    r"\U000104D8-\U000104FB\U00010C80-\U00010CB2\U00010CC0-\U00010CF2\U000118A0-\U000118DF\U0001E900-\U0001E943"
)


def _characters(escaped: str) -> str:
    r"""The same text with ``\uXXXX`` escapes as characters: the regex engine here has its own escapes."""
    return escaped.encode("ascii").decode("raw_unicode_escape")


_DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{_characters(_CASED_LETTERS)}]+",
    _characters(r"\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3000-\u3002]+"),
    r"\s+$",
    _characters(r"[\u4E00-\u9FA5\u0800-\u4E00\uAC00-\uD7FF]+"),
    "digits",
)
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_LLM[4], "digits")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    _characters(r"[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+"),
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*" + _TAIL,
)
# A word is whatever is not white space or one of the sentence marks of BLOOM's languages.
_BLOOM = _characters(r" ?[^(\s|[.,!?\u2026\u3002\uFF0C\u3001\u0964\u06D4\u060C])]+")

_GPT2_FAMILY = ByteLevelFamily(("bytes",))
_NEOX_FAMILY = ByteLevelFamily(("bytes",), nfc=True)
_DIGITS_FAMILY = ByteLevelFamily(("digits", "bytes"))
_LLAMA3_FAMILY = ByteLevelFamily((_LLAMA3,), ignore_merges=True, add_bos=True)
_CL100K_FAMILY = ByteLevelFamily((_LLAMA3,))
_QWEN2_FAMILY = ByteLevelFamily((_QWEN2,), nfc=True)
_GPT4O_FAMILY = ByteLevelFamily((_GPT4O,))
_BLOOM_FAMILY = ByteLevelFamily((_BLOOM,))

FAMILIES: Mapping[str, ByteLevelFamily] = {
    **dict.fromkeys(("gpt-2", "default", "phi-2", "jais"), _GPT2_FAMILY),
    **dict.fromkeys(("mpt", "olmo"), _NEOX_FAMILY),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS_FAMILY),
    "command-r": ByteLevelFamily(("digits", "bytes"), nfc=True),
    "falcon": ByteLevelFamily(("punctuation", "bytes", "digit-runs", "[0-9][0-9][0-9]")),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _LLAMA3_FAMILY,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _CL100K_FAMILY),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2", "stablelm2"), _QWEN2_FAMILY),
    "qwen35": ByteLevelFamily((_QWEN35,), nfc=True),
    "tekken": ByteLevelFamily((_TEKKEN,), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _GPT4O_FAMILY),
    "deepseek-llm": ByteLevelFamily(_DEEPSEEK_LLM),
    "deepseek-coder": ByteLevelFamily(_DEEPSEEK_CODER),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), ByteLevelFamily(_DEEPSEEK_V3)),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), _BLOOM_FAMILY),
}


def _pre_tokenizer(splits: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = []
    for split in splits:
        if split == "bytes":
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
        elif split in ("digits", "digit-runs"):
            steps.append(pre_tokenizers.Digits(individual_digits=split == "digits"))
        elif split == "punctuation":
            steps.append(pre_tokenizers.Punctuation(behavior="contiguous"))
        else:
            steps.append(pre_tokenizers.Split(Regex(split), behavior="isolated", invert=False))
    if "bytes" not in splits:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def byte_level_backend(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], family: ByteLevelFamily
) -> Tokenizer:
    """A byte-level BPE tokenizer without its added tokens and post-processor.

    Args:
        vocab: Token to id, every token in the byte alphabet of GPT-2.
        merges: Pairs of tokens, the first to merge first.
        family: How text is cut before merging.

    Raises:
        Exception: As ``tokenizers`` does when a merge names a token that the vocabulary lacks.
    """
    backend = Tokenizer(models.BPE(dict(vocab), list(merges), ignore_merges=family.ignore_merges))
    if family.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(family.splits)
    backend.decoder = decoders.ByteLevel()
    return backend


@cache
def byte_alphabet() -> Mapping[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
