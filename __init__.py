"""mixkv: a mixed-precision KV-cache decoding engine for language models on CPUs.

Names are resolved on first use, so that ``import mixkv`` costs nothing and never imports Numba.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.generate import Token, generate
    from .engine.policy import CachePolicy, Override, Tier
    from .engine.sampler import SamplingParams
    from .engine.session import Session
    from .models.errors import MixkvError
    from .models.load import Model, load

__version__ = "0.1.0"

_HOME = {
    "CachePolicy": "engine.policy",
    "MixkvError": "models.errors",
    "Model": "models.load",
    "Override": "engine.policy",
    "SamplingParams": "engine.sampler",
    "Session": "engine.session",
    "Tier": "engine.policy",
    "Token": "engine.generate",
    "generate": "engine.generate",
    "load": "models.load",
}
__all__ = [
    "CachePolicy", "MixkvError", "Model", "Override", "SamplingParams", "Session", "Tier", "Token", "generate", "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mixkv' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
