"""What of a Hugging Face reference needs PyTorch and transformers, which are imported here and nowhere else."""

import inspect
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm.checkpoint import Checkpoint, open_checkpoint
from relax_llm.errors import CheckpointError

_DEVIATING = ("lm_head.weight",)  # a tied model has it under the embedding's name


def load(reference: str | os.PathLike[str] | Checkpoint) -> tuple[str, Any]:
    """A checkpoint as a module of transformers, in float32, ready to be evaluated.

    Returns:
        Its name for people, and the module.

    Raises:
        CheckpointError: It cannot be read, or `transformers` cannot make it, or is not installed.
    """
    checkpoint = reference if isinstance(reference, Checkpoint) else open_checkpoint(reference)
    try:
        import torch
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"A checkpoint as the reference is run by transformers and PyTorch, and {error.name} is not installed: "
            "pip install transformers torch."
        ) from error
    with _quiet(transformers), torch.inference_mode():
        try:
            model = _read(checkpoint) if checkpoint.format == "huggingface" else _built(checkpoint)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
            raise CheckpointError(
                f"transformers {transformers.__version__} cannot load {checkpoint.path}: {' '.join(str(error).split())}"
            ) from error
    return str(checkpoint.path), model.eval()


def cache(model: Any) -> Any:
    """An empty cache."""
    from transformers import DynamicCache

    try:
        return DynamicCache(config=model.config)
    except TypeError:  # older versions take nothing
        return DynamicCache()


def with_cache(model: Any, kept: Any) -> dict[str, Any]:
    """The arguments by which a model, or a part of one, goes on from a cache; newer versions call it otherwise."""
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": kept, "use_cache": True}


def call(model: Any, kept: Any, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Go on by some tokens; logits [vocab] after the last."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([list(token_ids)], dtype=torch.long)
        logits: npt.NDArray[np.float32] = model(ids, **with_cache(model, kept)).logits[0, -1].numpy()
    return logits


def _read(checkpoint: Checkpoint) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": "eager", "local_files_only": True, "trust_remote_code": False}
    return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, **options)


def _built(checkpoint: Checkpoint) -> Any:
    """A model made from a config, and given the tensors that a GGUF file holds, dequantized."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(dict(checkpoint.config)), encoding="utf-8")
        config = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    tensors = {
        name: torch.from_numpy(np.array(tensor.read(), np.float32))
        for name, tensor in checkpoint.tensors.items()
    }
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = checkpoint.config.get("tie_word_embeddings", False)
    lacking = [name for name in missing if not (tied and name in _DEVIATING)]
    if lacking or unexpected:
        names = ", ".join([*lacking, *unexpected][:5])
        raise CheckpointError(
            f"{checkpoint.path} does not fit the model that transformers makes of its config: {names}."
        )
    model.tie_weights()
    return model


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bars and no advice while a model is loaded; what was set before is set afterwards."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
