"""What the tests of loading share: a small Llama whose files can be changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

TINY_LLAMA = Path(__file__).parents[1] / "data" / "tiny_llama"
Change = Callable[[dict[str, NDArray[Any]], dict[str, Any]], None]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[Change], str]:
    """A copy of tiny_llama whose tensors and config.json have been changed."""

    def make(change: Change) -> str:
        tensors = load_file(TINY_LLAMA / "model.safetensors")
        config = json.loads((TINY_LLAMA / "config.json").read_text())
        change(tensors, config)
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return make
