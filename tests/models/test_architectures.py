"""Every architecture says what transformers says, at once and token by token, beyond every sliding window."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mixkv import CachePolicy, Session
from mixkv.models.config import ARCHITECTURES
from mixkv.models.load import Model, load

from .tiny_models import NAMES, in_float32, reference, tiny

BOUND = 2e-4
DYNAMIC = "llama_dynamic"  # transformers stretches it by the text's length, so that is its context here


def session_of(model: Model, name: str, length: int, **options: object) -> Session:
    options.setdefault("context", length if name == DYNAMIC else None)
    return Session(model, CachePolicy.full(), **options)  # type: ignore[arg-type]


def logits_of(model: Model, name: str, pieces: int | None = None) -> NDArray[np.float32]:
    """Of the positions that were recorded; the text in pieces of so many tokens, or at once."""
    ids, positions, _ = reference(name)
    session = session_of(model, name, len(ids))
    pieces = len(ids) if pieces is None else pieces
    rows = [session.forward(ids[i : i + pieces]) for i in range(0, len(ids), pieces)]
    return np.concatenate(rows)[positions]


def test_there_is_a_model_of_every_architecture() -> None:
    assert {tiny(name).config.architecture for name in NAMES} == set(ARCHITECTURES)


@pytest.mark.parametrize("pieces", [None, 1, 7])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str, pieces: int | None) -> None:
    found, expected = logits_of(tiny(name), name, pieces), reference(name)[2]
    assert np.abs(found - expected).max() < BOUND


@pytest.mark.parametrize("name", NAMES)
def test_float32_files_and_bfloat16_in_the_kernels_say_the_same(name: str, tmp_path: Path) -> None:
    stored, packed = load(str(in_float32(name, tmp_path))), tiny(name, "auto")
    assert np.array_equal(logits_of(stored, name), logits_of(tiny(name), name))
    found = logits_of(packed, name)
    assert np.abs(found - reference(name)[2]).max() < BOUND
    assert found.tobytes() == logits_of(packed, name, 1).tobytes() == logits_of(packed, name, 13).tobytes()
