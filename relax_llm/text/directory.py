"""The tokenizer files of a Hugging Face directory: which are read, in what order, and what they must hold."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from relax_llm.errors import TokenizerError
from relax_llm.text.bytelevel import FAMILIES, byte_level_backend
from relax_llm.text.postprocess import add_bos_eos
from relax_llm.text.sentencepiece import sentencepiece_backend
from relax_llm.text.sentencepiece_model import read_sentencepiece_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_DIRECTORY = "additional_chat_templates"

# The tokenizer classes of vocab.json with merges.txt whose way of cutting text is known, as GGUF names it.
_VOCAB_CLASSES = {
    "GPT2Tokenizer": "gpt-2",
    "CodeGenTokenizer": "gpt-2",
    "GPTNeoXTokenizer": "mpt",
    "Qwen2Tokenizer": "qwen2",
    "CohereTokenizer": "command-r",
}
_CONVERT = (
    "Make a tokenizer.json once, with transformers: "
    "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)."
)


@dataclass(frozen=True)
class TokenizerFiles:
    """What a directory says about its tokenizer.

    Attributes:
        backend: Vocabulary, rules, added tokens and the tokens around a sequence.
        special_tokens: Role (``bos_token``) to token text.
        chat_templates: Name to Jinja template.
        stop_tokens: Texts of tokens that end an answer, beside ``eos_token``.
        add_bos: A sequence begins with ``bos_token`` where no file says.
    """

    backend: Tokenizer
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]
    stop_tokens: tuple[str, ...] = ()
    add_bos: bool = False


def read_directory(directory: Path) -> TokenizerFiles:
    """Reads ``tokenizer.json``, else ``vocab.json`` and ``merges.txt``, else ``tokenizer.model``.

    Raises:
        TokenizerError: A file is missing, malformed, contradictory or not supported.
    """
    if not directory.is_dir():
        raise TokenizerError(f"{directory}: there is no such directory to read a tokenizer from.")
    config_path = directory / CONFIG_FILE
    config = _json_object(config_path)
    if "added_tokens_decoder" not in config:  # older directories keep the roles in a file of their own
        config |= _json_object(directory / "special_tokens_map.json")
    found = _backend(directory, config)
    _add_tokens(found.backend, directory, config)
    roles = _special_tokens(found, config_path, config, _json_object(directory / "config.json"))
    if found.backend.post_processor is None:
        bos = roles.get("bos_token") if _flag(config_path, config, "add_bos_token", found.add_bos) else None
        eos = roles.get("eos_token") if _flag(config_path, config, "add_eos_token", False) else None
        add_bos_eos(found.backend, bos, eos)
    stop = config.get("stop_tokens", [])
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise TokenizerError(f"{config_path}: stop_tokens must be a list of texts.")
    return replace(
        found,
        special_tokens=roles,
        chat_templates=_chat_templates(directory, config.get("chat_template")),
        stop_tokens=tuple(stop),
    )


def _text(path: Path) -> str | None:
    """The file's text, or None where there is no such file."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{path}: not UTF-8 text (byte {error.start}); download the file again."
        ) from error
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _json_object(path: Path) -> dict[str, Any]:
    """The file's JSON object, or an empty one where there is no such file."""
    text = _text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds a JSON {type(value).__name__}, where an object is expected.")
    return value


def _guarded_backend(path: Path, text: str) -> Tokenizer:
    """``tokenizers`` raises bare Exception for a malformed file, and panics (a BaseException) for some."""
    try:
        return Tokenizer.from_str(text)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{path}: not a usable tokenizer: {error}.") from error
        raise


def _backend(directory: Path, config: dict[str, Any]) -> TokenizerFiles:
    """The first of the three forms that is there, with the roles that this form itself knows."""
    path = directory / TOKENIZER_FILE
    text = _text(path)
    if text is not None:
        return TokenizerFiles(_guarded_backend(path, text), {}, {})
    if (directory / "vocab.json").exists():
        return _from_vocab_and_merges(directory, config)
    path = directory / "tokenizer.model"
    if path.exists():
        model = read_sentencepiece_model(path)
        pieces = model.vocab.pieces
        ids = {
            "bos_token": model.bos_id,
            "eos_token": model.eos_id,
            "pad_token": model.pad_id,
            "unk_token": model.vocab.unknown_id,
        }
        roles = {role: pieces[i] for role, i in ids.items() if i is not None}
        return TokenizerFiles(sentencepiece_backend(model.vocab, str(path)), roles, {}, add_bos=True)
    raise TokenizerError(
        f"{directory}: holds no tokenizer: neither tokenizer.json, nor vocab.json with merges.txt, nor "
        "tokenizer.model. Download these files of the model too."
    )


def _from_vocab_and_merges(directory: Path, config: dict[str, Any]) -> TokenizerFiles:
    path, merges_path = directory / "vocab.json", directory / "merges.txt"
    name = config.get("tokenizer_class") or "GPT2Tokenizer"
    family = _VOCAB_CLASSES.get(str(name).removesuffix("Fast"))
    if family is None or config.get("add_prefix_space"):
        what = f"tokenizer_class {name!r}" if family is None else "add_prefix_space"
        raise TokenizerError(
            f"{directory / CONFIG_FILE}: {what} cannot be built from vocab.json here. {_CONVERT}"
        )
    vocab = _json_object(path)
    if not vocab or not all(type(i) is int and 0 <= i < 1 << 32 for i in vocab.values()):
        raise TokenizerError(f"{path}: must map each token to its id, a number from 0.")
    lines = _text(merges_path)
    if lines is None:
        raise TokenizerError(
            f"{merges_path}: is missing; vocab.json is of no use without it. Download it too."
        )
    merges = []
    for number, line in enumerate(lines.split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise TokenizerError(f"{merges_path}: line {number} must be two tokens, not {line[:80]!r}.")
        merges.append((pair[0], pair[1]))
    try:
        backend = byte_level_backend(vocab, merges, FAMILIES[family])
    except Exception as error:
        raise TokenizerError(f"{merges_path}: does not fit vocab.json: {error}.") from error
    end = "<|endoftext|>"  # what these classes take for their roles unless told otherwise
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end) if end in vocab else {}
    return TokenizerFiles(backend, roles, {})


def _added_token(path: Path, where: str, value: object, special: bool) -> AddedToken:
    """A token written as text or as an object with its flags."""
    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=False)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise TokenizerError(f"{path}: {where} must be a token's text or an object with its 'content'.")
    flags = {name: value.get(name, False) for name in ("single_word", "lstrip", "rstrip")}
    flags["special"] = value.get("special", special)
    flags["normalized"] = value.get("normalized", not flags["special"])
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TokenizerError(f"{path}: {name} of {where} must be true or false, not {flag!r}.")
    return AddedToken(value["content"], **flags)


def _add_tokens(backend: Tokenizer, directory: Path, config: dict[str, Any]) -> None:
    """Adds the tokens that stand outside ``tokenizer.json``, in the order of their ids, which are checked."""
    path = directory / CONFIG_FILE
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        path = directory / "added_tokens.json"
        listed = _json_object(path)
        for text, i in listed.items():
            if type(i) is not int or i < 0:
                raise TokenizerError(f"{path}: {i!r} is not the id of the added token {text!r}.")
        decoder = {str(i): {"content": text} for text, i in listed.items()}
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{path}: added_tokens_decoder must be an object from ids to tokens.")
    tokens = {}
    for key, value in decoder.items():
        if not key.isdecimal():
            raise TokenizerError(f"{path}: {key!r} is not the id of an added token.")
        tokens[int(key)] = _added_token(path, f"the added token {key}", value, False)
    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for i, token in sorted(tokens.items()):
        if token.content not in present:
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != i:
            actual = backend.token_to_id(token.content)
            raise TokenizerError(
                f"{path}: the added token {token.content!r} has id {i}, but the vocabulary says {actual}. "
                "The files are of different models, or one is old; download them again together."
            )


def _special_tokens(
    found: TokenizerFiles, path: Path, config: dict[str, Any], model_config: dict[str, Any]
) -> dict[str, str]:
    """Role to token; every one of them, and the nameless extra ones, become special tokens of the backend."""
    named = {
        k: v for k, v in config.items() if k.endswith("_token") and not k.startswith("add_") and v is not None
    }
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        named |= extra
        extra = []
    if not isinstance(extra, list):
        raise TokenizerError(f"{path}: additional_special_tokens must be a list of tokens.")
    tokens = {role: _added_token(path, role, value, True) for role, value in named.items()}
    extras = [_added_token(path, f"additional_special_tokens[{i}]", v, True) for i, v in enumerate(extra)]
    known = {token.content for token in found.backend.get_added_tokens_decoder().values() if token.special}
    for token in (*tokens.values(), *extras):
        if token.content not in known:
            token.special = True
            found.backend.add_special_tokens([token])
            known.add(token.content)
    roles = {role: token.content for role, token in tokens.items()}
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if role in config:
            continue
        i = model_config.get(f"{role}_id")
        i = i[0] if isinstance(i, list) and i else i
        text = found.backend.id_to_token(i) if type(i) is int and 0 <= i < 1 << 32 else None
        text = found.special_tokens.get(role, text)
        if text is not None:
            roles[role] = text
    return roles


def _flag(path: Path, config: dict[str, Any], name: str, default: bool) -> bool:
    value = config.get(name, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise TokenizerError(f"{path}: {name} must be true or false, not {value!r}.")
    return value


def _chat_templates(directory: Path, configured: object) -> dict[str, str]:
    """Templates in files of their own, else in ``tokenizer_config.json``, else in ``chat_template.json``."""
    path = directory / TEMPLATE_DIRECTORY
    files = {file.stem: file for file in sorted(path.glob("*.jinja"))} if path.is_dir() else {}
    files["default"] = directory / TEMPLATE_FILE
    texts = {name: _text(file) for name, file in files.items()}
    found = {name: text for name, text in texts.items() if text is not None}
    if found:
        return found
    path = directory / CONFIG_FILE
    if configured is None:
        path = directory / "chat_template.json"
        configured = _json_object(path).get("chat_template")
    if configured is None:
        return {}
    if isinstance(configured, str):
        return {"default": configured}
    if isinstance(configured, list):
        pairs = [
            (item.get("name"), item.get("template")) if isinstance(item, dict) else item
            for item in configured
        ]
        configured = dict(pair for pair in pairs if isinstance(pair, tuple)) if _are_pairs(pairs) else None
    if isinstance(configured, dict) and all(isinstance(x, str) for pair in configured.items() for x in pair):
        return configured
    raise TokenizerError(
        f"{path}: chat_template must be a template's text, or a list of objects with 'name' and 'template'."
    )


def _are_pairs(pairs: list[Any]) -> bool:
    return all(isinstance(pair, tuple) and all(isinstance(x, str) for x in pair) for pair in pairs)
