"""What a checkpoint's generation config asks for and generation does not do, said in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}
"""Settings that change what transformers generates and are not applied here, each with its neutral values."""


def unapplied_settings(config: Mapping[str, Any]) -> tuple[str, ...]:
    """One sentence for each setting of a generation config that changes transformers' text and not ours.

    Args:
        config: The fields of `generation_config.json`; may be empty.
    """
    return tuple(
        f"The checkpoint's generation config sets {name} to {config[name]!r}, which is not applied."
        for name, neutral in _NEUTRAL.items()
        if config.get(name) is not None and config[name] not in neutral
    )
