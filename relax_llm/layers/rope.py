"""Rotary position embeddings: from a config's parameters to the frequencies that kernels use."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from relax_llm.errors import ArchitectureError
from relax_llm.kernels.positions import RopeTable
from relax_llm.layers.fields import Fields

Frequencies = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rope:
    """A rotary embedding with its scaling applied.

    Attributes:
        table: The problem of computing its cosines and sines.
        context_length: Positions the model is made for, the scaling counted in.
    """

    table: RopeTable
    context_length: int

    @staticmethod
    def from_config(
        config: Fields, head_dim: int, *, theta: float = 10000.0, context_length: int = 2048
    ) -> "Rope":
        """Read `rope_parameters` (or `rope_scaling` and `rope_theta`) and `max_position_embeddings`.

        Args:
            config: The config of the model.
            head_dim: Channels that are rotated; must be even.
            theta: Base of the frequencies where the config has none.
            context_length: The model's context where the config has none.

        Raises:
            ArchitectureError: The scaling is not known, or one of its parameters is missing.
        """
        if head_dim % 2:
            raise ArchitectureError(
                f"config.json: head_dim is {head_dim}, but rotary embeddings need an even one."
            )
        context = config.integer("max_position_embeddings", context_length)
        scaling = config.section("rope_parameters") or config.section("rope_scaling") or Fields({})
        theta = scaling.number("rope_theta", config.number("rope_theta", theta))
        if scaling.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0)) != 1.0:
            raise ArchitectureError(
                "config.json: field 'partial_rotary_factor' is not supported by this architecture."
            )
        for field, value in (("rope_theta", theta), ("factor", scaling.number("factor", 1.0))):
            if value <= 0:
                raise ArchitectureError(f"config.json: field {field!r} must be positive, but is {value}.")
        kind = scaling.text("rope_type", scaling.text("type", "default"))
        plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if kind == "default":
            return _rope(plain, context)
        if kind == "linear":
            return _rope(plain / scaling.number("factor"), context)
        if kind == "dynamic":
            if head_dim == 2:
                raise ArchitectureError(
                    "config.json: head_dim is 2, but dynamic rope scaling needs at least 4."
                )
            factor = scaling.number("factor")
            return _rope(plain, math.ceil(context * factor), dynamic=(theta, factor, context))
        if kind == "llama3":
            return _rope(_llama3(plain, scaling, context), context)
        if kind == "yarn":
            return _yarn(plain, theta, scaling, context)
        raise ArchitectureError(
            f"config.json: rope_type {kind!r} is not supported; known: default, linear, dynamic, llama3, yarn."
        )


def _rope(
    frequencies: Frequencies,
    context: int,
    magnitude: float = 1.0,
    dynamic: tuple[float, float, int] | None = None,
) -> Rope:
    values = tuple(float(np.float32(frequency)) for frequency in frequencies)
    return Rope(RopeTable(values, magnitude, dynamic), context)


def _llama3(plain: Frequencies, scaling: Fields, context: int) -> Frequencies:
    """Llama 3.1: long wavelengths are interpolated, short ones kept, those between blended."""
    factor = scaling.number("factor")
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    original = scaling.integer("original_max_position_embeddings", context)
    turns = original * plain / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (blend + (1.0 - blend) / factor)


def _yarn(plain: Frequencies, theta: float, scaling: Fields, context: int) -> Rope:
    """YaRN (Peng et al. 2023): a ramp over the channels from interpolation to extrapolation, and hotter attention."""
    dim = 2 * len(plain)
    original = scaling.integer("original_max_position_embeddings", context)
    factor = scaling.number("factor", context / original)

    def channel(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = channel(scaling.number("beta_fast", 32.0) or 32.0)
    high = channel(scaling.number("beta_slow", 1.0) or 1.0)
    if scaling.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0.0, 1.0)

    def hotter(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, all_dim = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    magnitude = hotter(mscale) / hotter(all_dim) if mscale and all_dim else hotter(1.0)
    magnitude = scaling.number("attention_factor", magnitude)
    return _rope(plain * (ramp / factor + 1.0 - ramp), max(context, math.ceil(original * factor)), magnitude)
