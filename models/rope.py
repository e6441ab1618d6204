"""Rotary embedding: what a model says of it, and the cosines and sines that follow.

Types and keys are Hugging Face's (transformers, modeling_rope_utils.py). Two of them depend on how long a text gets:
``longrope`` and ``dynamic``. There it is the *context* that counts, the most tokens that the sequence may hold, and not how
many there are yet: so a token's key never depends on what comes after it, nor on how a prompt was cut.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from . import limits
from .check import positive_float, shown, whole
from .errors import ModelError

Float32 = NDArray[np.float32]
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_BY_CONTEXT = ("dynamic", "longrope")
_LARGEST = {"theta": limits.MAX_ROPE_THETA, "attention_factor": limits.MAX_MULTIPLIER}


@dataclass(frozen=True, slots=True)
class Rope:
    """How positions turn queries and keys. Checked when it is made: ModelError names the field.

    Attributes:
        theta: the base: channel pair i of n turns by position / theta^(i / n).
        rope_type: one of ``ROPE_TYPES``.
        factor: by which the context was stretched; all but default and longrope.
        original_context: tokens of the context before that, 0 where it does not count.
        low_freq_factor, high_freq_factor: llama3's.
        beta_fast, beta_slow, truncate: yarn's.
        attention_factor: of yarn and longrope, by which cosines and sines are multiplied.
        short_factor, long_factor: longrope's, one number a channel pair, for contexts up to the original one and beyond.

    """

    theta: float = 10_000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ModelError(f"rope_type is {shown(self.rope_type)}; supported: {', '.join(ROPE_TYPES)}")
        for field in fields(self):
            value = getattr(self, field.name)
            largest = _LARGEST.get(field.name, limits.MAX_ROPE_FACTOR)
            if field.type is float:
                name = "rope_theta" if field.name == "theta" else f"rope {field.name}"
                object.__setattr__(self, field.name, positive_float(name, value, largest))
            elif field.name.endswith("_factor"):
                if not isinstance(value, tuple):
                    raise ModelError(f"rope {field.name} is {shown(value)}; it must be a list of numbers")
                object.__setattr__(
                    self, field.name, tuple(positive_float(f"rope {field.name}", x, largest) for x in value)
                )
        whole("rope original_max_position_embeddings", self.original_context, 0, limits.MAX_CONTEXT)
        if not isinstance(self.truncate, bool):
            raise ModelError(f"rope truncate is {shown(self.truncate)}; it must be true or false")
        if self.original_context == 0 and self.rope_type in ("dynamic", "llama3", "yarn", "longrope"):
            raise ModelError(f"rope_type {self.rope_type} needs original_max_position_embeddings, there is none")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ModelError(
                f"rope low_freq_factor is {self.low_freq_factor:g} and high_freq_factor {self.high_freq_factor:g}; "
                f"the first must be smaller"
            )
        if self.rope_type in ("dynamic", "llama3", "linear", "yarn") and self.factor < 1:
            raise ModelError(f"rope factor is {self.factor:g}; it must be 1 or more")
        if self.rope_type == "yarn" and self.theta <= 1:
            raise ModelError(f"rope_theta is {self.theta:g}; for yarn it must be above 1")

    def check_dim(self, rotary_dim: int) -> None:
        """ModelError where the factors are not one for each channel pair, or there are too few channels to stretch."""
        if self.rope_type == "longrope":
            for name in ("short_factor", "long_factor"):
                if len(getattr(self, name)) != rotary_dim // 2:
                    raise ModelError(
                        f"rope {name} has {len(getattr(self, name))} numbers; there are {rotary_dim // 2} pairs of channels"
                    )
        if self.rope_type == "dynamic" and rotary_dim < 4:
            raise ModelError(f"rope_type dynamic needs 4 rotated channels or more, there are {rotary_dim}")

    def stretch(self, context: int) -> int:
        """What of a context changes the angles: contexts for which this is the same can go on with each other's keys."""
        if self.rope_type not in _BY_CONTEXT or context <= self.original_context:
            return 0
        return context if self.rope_type == "dynamic" else 1

    def inverse_frequencies(self, rotary_dim: int, context: int) -> Float32:
        """The angle a position of each channel pair, (rotary_dim / 2,), in sequences of up to ``context`` tokens."""
        exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
        theta = self.theta
        if self.rope_type == "dynamic" and context > self.original_context:
            stretched = self.factor * context / self.original_context - (self.factor - 1)
            theta *= stretched ** (rotary_dim / (rotary_dim - 2))
        powers = (np.float32(theta) ** exponents).astype(np.float32)
        if self.rope_type == "longrope":
            long = context > self.original_context
            powers = powers * np.array(self.long_factor if long else self.short_factor, np.float32)
        plain = np.float32(1) / powers
        if self.rope_type == "linear":
            return plain / np.float32(self.factor)
        if self.rope_type == "llama3":
            return self._llama3(plain)
        if self.rope_type == "yarn":
            kept = self._kept(rotary_dim)
            return (plain / np.float32(self.factor) * (1 - kept) + plain * kept).astype(np.float32)
        return plain

    def turns(self, positions: NDArray[np.int64], inverse_frequencies: Float32, out: Float32) -> None:
        """Cosines, then sines, into ``out`` (T, rotary_dim): from float32 angles, as the models were trained."""
        angles = positions.astype(np.float32)[:, None] * inverse_frequencies
        half = out.shape[1] // 2
        np.cos(angles, out=out[:, :half])
        np.sin(angles, out=out[:, half:])
        if self.attention_factor != 1 and self.rope_type in ("yarn", "longrope"):
            out *= np.float32(self.attention_factor)

    def _llama3(self, plain: Float32) -> Float32:
        """Long waves are stretched, short ones stay, and between them there is a ramp (Llama 3.1)."""
        waves = np.float32(self.original_context) / (np.float32(2 * math.pi) / plain)  # that the original context holds
        ramp = (waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(ramp, 0, 1).astype(np.float32)
        return (1 - kept) * plain / np.float32(self.factor) + kept * plain

    def _kept(self, rotary_dim: int) -> Float32:
        """How much of each angle yarn does not stretch, from 0 to 1 (https://arxiv.org/abs/2309.00071, section 3.2)."""

        def pair(turns: float) -> float:  # the channel pair that turns so often in the original context
            length = math.log(self.original_context / (turns * 2 * math.pi))
            return rotary_dim * length / (2 * math.log(self.theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        ramp = (np.arange(rotary_dim // 2, dtype=np.float32) - low) / (high - low if low != high else 0.001)
        return (1 - np.clip(ramp, 0, 1)).astype(np.float32)


def yarn_attention_factor(factor: float, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """By what yarn multiplies cosines and sines where nobody says: 0.1 ln(factor) + 1 (section 3.4), or a ratio of two."""

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    return growth(mscale) / growth(mscale_all_dim) if mscale_all_dim else growth(1.0)


def longrope_attention_factor(factor: float, original_context: int) -> float:
    """By what longrope multiplies cosines and sines where nobody says (https://arxiv.org/abs/2402.13753)."""
    return math.sqrt(1 + math.log(factor) / math.log(original_context)) if factor > 1 else 1.0
