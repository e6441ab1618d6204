"""Fixtures that several folders of tests share."""

import os
import signal
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_reaches_children() -> None:
    """A shell starts what runs in its background with SIGINT ignored, and processes started from there inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's GGUF file, fetched once per machine; for tests marked ``model``."""
    from mixkv.models.hub import pull

    return pull("smollm2")


@pytest.fixture(scope="session")
def default_model(default_model_path: Path):
    """The default model in float32, loaded once a test run."""
    import mixkv

    return mixkv.load(str(default_model_path), "f32")


@pytest.fixture(scope="session")
def toy():
    """The toy model."""
    import mixkv

    return mixkv.load("toy")


@pytest.fixture(scope="session")
def clean_env() -> dict[str, str]:
    """The environment for tests in a process of their own."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "MIXKV_"))}
