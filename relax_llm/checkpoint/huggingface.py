"""A Hugging Face directory: config.json, generation_config.json, safetensors with or without an index."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from relax_llm.checkpoint.checkpoint import Checkpoint, Tensor
from relax_llm.checkpoint.config import check_config, check_generation_config, check_layer_count
from relax_llm.checkpoint.files import Fingerprint, is_file
from relax_llm.checkpoint.jsonfile import read_object
from relax_llm.checkpoint.safetensors_file import read_safetensors
from relax_llm.errors import CheckpointError

if TYPE_CHECKING:
    from relax_llm.text.tokenizer import Tokenizer

__all__ = ["open_huggingface"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG_LIMIT = 4 << 20
INDEX_LIMIT = 16 << 20

PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl")
OTHER_FRAMEWORKS = ("*.h5", "*.msgpack", "*.onnx")

# Files that do not hold weights but change what a compiled artifact contains.
_SIDE_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
]


def open_huggingface(directory: Path) -> Checkpoint:
    """Open a directory as `save_pretrained` writes it.

    Args:
        directory: Holds config.json and either model.safetensors or model.safetensors.index.json and its
            shards.

    Raises:
        CheckpointError: A file is missing, malformed or contradicts another, or only pickle files hold
            weights.
    """
    config_path = directory / "config.json"
    if not is_file(config_path):
        raise CheckpointError(_missing_config(directory))
    config = read_object(config_path, CONFIG_LIMIT)
    check_config(config, config_path)
    generation_config = _generation_config(directory / "generation_config.json")

    notes: list[str] = []
    if config.get("auto_map"):
        notes.append(
            "config.json: 'auto_map' names Python code in the checkpoint; it is ignored and never run."
        )
    fingerprint = Fingerprint()
    fingerprint.add("huggingface")
    fingerprint.add_files(directory / name for name in _SIDE_FILES)
    tensors = _weights(directory, fingerprint, notes)
    if not tensors:
        raise CheckpointError(f"{directory}: the safetensors files hold no tensors.")
    check_layer_count(config, len(tensors), config_path)
    return Checkpoint(
        path=directory,
        format="huggingface",
        config=config,
        generation_config=generation_config,
        tensors=MappingProxyType(tensors),
        fingerprint=fingerprint.hexdigest(),
        notes=tuple(notes),
        tokenizer_loader=lambda: _load_tokenizer(directory),
    )


def _load_tokenizer(directory: Path) -> Tokenizer:
    from relax_llm.text.tokenizer import Tokenizer

    return Tokenizer.load(directory)


def _generation_config(path: Path) -> dict[str, Any]:
    if not is_file(path):
        return {}
    config = read_object(path, CONFIG_LIMIT)
    check_generation_config(config, path)
    return config


def _missing_config(directory: Path) -> str:
    if is_file(directory / "adapter_config.json"):
        return (
            f"{directory}: config.json is missing and adapter_config.json is there: this is an adapter, not "
            "a model; merge it into its base model (peft's merge_and_unload) and open the result."
        )
    return (
        f"{directory}: config.json is missing; a checkpoint directory holds config.json and safetensors "
        "files, or one GGUF file."
    )


def _weights(directory: Path, fingerprint: Fingerprint, notes: list[str]) -> dict[str, Tensor]:
    single, index = directory / SINGLE, directory / INDEX
    if is_file(single):
        if is_file(index):
            notes.append(f"{INDEX} is ignored, because {SINGLE} holds the whole model.")
        return {tensor.name: tensor for tensor in read_safetensors(single, fingerprint)}
    if is_file(index):
        return _sharded(directory, index, fingerprint, notes)
    raise CheckpointError(_missing_weights(directory))


def _missing_weights(directory: Path) -> str:
    start = f"{directory}: neither {SINGLE} nor {INDEX} is there"
    loose = sorted(path.name for path in directory.glob("*.safetensors"))
    if loose:
        return (
            f"{start}, but {', '.join(loose[:3])}{' and others' if len(loose) > 3 else ''}; "
            f"fetch the missing {INDEX}, or rename a file that holds the whole model to {SINGLE}."
        )
    pickles = sorted({path.name for pattern in PICKLES for path in directory.glob(pattern)})
    if pickles:
        return (
            f"{start}; {pickles[0]} is a pickle file, which can run any code when it is read and is refused "
            "by "
            "policy: convert it with transformers (save_pretrained writes safetensors) in a place you trust."
        )
    others = sorted({path.name for pattern in OTHER_FRAMEWORKS for path in directory.glob(pattern)})
    if others:
        return f"{start}; {others[0]} belongs to another framework: save the model as safetensors."
    return f"{start}; the directory holds no weights."


def _sharded(
    directory: Path, index_path: Path, fingerprint: Fingerprint, notes: list[str]
) -> dict[str, Tensor]:
    fingerprint.add_file(index_path)
    weight_map = _weight_map(index_path)
    found: dict[str, dict[str, Tensor]] = {}
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        if not is_file(path):
            tensor = next(name for name, file in weight_map.items() if file == shard)
            raise CheckpointError(
                f"{index_path}: 'weight_map' puts {tensor!r} into {shard!r}, which is missing; fetch that "
                "file."
            )
        found[shard] = {tensor.name: tensor for tensor in read_safetensors(path, fingerprint)}
    for name, shard in weight_map.items():
        if name not in found[shard]:
            raise CheckpointError(
                f"{index_path}: 'weight_map' puts {name!r} into {shard!r}, but that file does not hold it; "
                "index and shards come from different saves."
            )
    for shard, tensors in found.items():
        unused = [name for name in tensors if weight_map.get(name) != shard]
        if unused:
            notes.append(
                f"{shard}: {len(unused)} tensors that {INDEX} does not place there are ignored, "
                f"such as {unused[0]!r}."
            )
    return {name: found[shard][name] for name, shard in weight_map.items()}


def _weight_map(path: Path) -> dict[str, str]:
    """The index's map from tensor to file, with every file's name checked to lie inside the directory."""
    index = read_object(path, INDEX_LIMIT, unique=True)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: the field 'weight_map' must be an object with one entry for each tensor."
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{path}: 'weight_map' has no file name for {name!r}.")
        if not _is_inside(shard):
            raise CheckpointError(
                f"{path}: 'weight_map' puts {name!r} into {shard!r}, which is not a safetensors file inside "
                "this directory; only files in the checkpoint's own directory are read."
            )
    return weight_map


def _is_inside(shard: str) -> bool:
    return (
        shard.endswith(".safetensors")
        and shard.isprintable()
        and "\\" not in shard
        and ":" not in shard
        and not PurePosixPath(shard).is_absolute()
        and ".." not in PurePosixPath(shard).parts
    )
