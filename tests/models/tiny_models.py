"""The tiny models of tests/data/make_tiny_models.py: their folders, and what transformers said of them."""

from pathlib import Path

import ml_dtypes  # noqa: F401  safetensors needs it for bfloat16
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mixkv.models.load import Model, load

FOLDER = Path(__file__).parents[1] / "data" / "tiny_models"
NAMES = sorted(path.name for path in FOLDER.iterdir())


def reference(name: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """ids (T,), positions (P,) and logits (P, V) of a model."""
    with np.load(FOLDER / name / "reference.npz") as arrays:
        return arrays["ids"], arrays["positions"], arrays["logits"]


def tensors(name: str) -> dict[str, NDArray[np.float32]]:
    """The weights in float32, by the names of the folder."""
    stored = load_file(FOLDER / name / "model.safetensors")
    return {key: value.astype(np.float32) for key, value in stored.items()}


def in_float32(name: str, folder: Path) -> Path:
    """The same model in a folder of its own, its weights stored as float32."""
    config = (FOLDER / name / "config.json").read_text().replace('"bfloat16"', '"float32"')
    (folder / "config.json").write_text(config)
    save_file(tensors(name), folder / "model.safetensors")
    return folder


def tiny(name: str, weights: str = "f32") -> Model:
    """The model from its folder."""
    return load(str(FOLDER / name), weights)
