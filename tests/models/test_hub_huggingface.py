"""``hf:`` names: fetched from a server on this machine that speaks the hub's endpoints; no network."""

import builtins
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

import mixkv
from mixkv.models import hub
from mixkv.models.errors import DownloadError, ModelError, UsageError
from mixkv.models.hub import files, hf_client
from mixkv.models.hub.shelf import open_shelf

from .fake_hub import FakeHub
from .pulls import GGUF, pull_refused, sha256

TINY_LLAMA = Path(__file__).parents[1] / "data" / "tiny_llama"
REPO, NAME = "org/tiny", "hf:org/tiny"
refused = partial(pull_refused, name=NAME)


@pytest.fixture
def tiny() -> dict[str, bytes]:
    """A repository of safetensors, with files beside them that are no business of ours."""
    names = ("config.json", "model.safetensors")
    found = {name: (TINY_LLAMA / name).read_bytes() for name in names}
    return found | {
        "modeling_tiny.py": b"raise SystemExit('code of a repository was run')",
        "pytorch_model.bin": b"\x80\x04 a pickle",
        "README.md": b"# Tiny",
        ".gitattributes": b"",
        "onnx/model.onnx": b"onnx" * 1000,
    }


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("MIXKV_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's attempts
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1_000)
        yield fake


def parts() -> list[str]:
    return [path.name for path in hub.partial_downloads()]


def test_a_repository_becomes_a_folder_of_safe_files(server: FakeHub, tiny: dict[str, bytes]) -> None:
    commit = server.publish(REPO, tiny)
    calls: list[tuple[int, int]] = []
    path = hub.pull(NAME, progress=lambda done, total: calls.append((done, total)))
    assert path == hub.cache_folder() / "hf" / "org--tiny" / commit
    assert {each.name for each in path.iterdir()} == {"config.json", "model.safetensors"}
    assert all((path / name).read_bytes() == tiny[name] for name in ("config.json", "model.safetensors"))
    assert calls[-1] == (len(tiny["model.safetensors"]),) * 2 and calls == sorted(calls)
    (model,) = hub.cached_models()
    assert (model.name, model.path, model.license, model.version) == (NAME, path, "mit", commit)
    assert model.sha256["model.safetensors"] == sha256(tiny["model.safetensors"])
    assert model.nbytes == len(tiny["config.json"]) + len(tiny["model.safetensors"])


def test_the_second_use_makes_no_request(server: FakeHub, tiny: dict[str, bytes]) -> None:
    commit = server.publish(REPO, tiny)
    path = hub.pull(NAME)
    asked = len(server.requests)
    for name in (NAME, f"{NAME}@{commit}"):
        assert hub.pull(name) == path == hub.find(name)
    assert len(server.requests) == asked
    ours = mixkv.load(NAME, "f32")
    theirs = mixkv.load(str(TINY_LLAMA), "f32")
    for a, b in zip(ours.transformer.weights.linears(), theirs.transformer.weights.linears(), strict=True):
        assert np.array_equal(a.weight, b.weight)
    assert len(server.requests) == asked


def test_shards_are_those_of_the_index(server: FakeHub, tiny: dict[str, bytes], tmp_path: Path) -> None:
    tensors = load_file(TINY_LLAMA / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:7], names[7:])):
        file = f"model-{i}.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        tiny[file] = (tmp_path / file).read_bytes()
        weight_map |= dict.fromkeys(part, file)
    del tiny["model.safetensors"]
    tiny["consolidated.safetensors"] = b"the same once more" * 100
    tiny["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    server.publish(REPO, tiny)
    path = hub.pull(NAME)
    fetched = {each.name for each in path.iterdir()}
    assert fetched == {"config.json", "model.safetensors.index.json", "model-0.safetensors", "model-1.safetensors"}
    assert mixkv.load(NAME).config.vocab_size == mixkv.load(str(TINY_LLAMA)).config.vocab_size


@pytest.mark.parametrize("evil", ["../evil.safetensors", "/etc/evil.safetensors", "other/evil.safetensors", "evil.bin"])
def test_an_index_that_leads_elsewhere_is_refused(server: FakeHub, tiny: dict[str, bytes], evil: str) -> None:
    del tiny["model.safetensors"]
    tiny["model.safetensors.index.json"] = json.dumps({"weight_map": {"model.norm.weight": evil}}).encode()
    tiny["other/evil.safetensors"] = b"x"
    server.publish(REPO, tiny)
    refused(ModelError, "weight_map", repr(evil))
    assert parts() == []
    assert not any("evil" in request for request in server.requests)


@pytest.mark.parametrize("evil", ["../../evil.safetensors", "/tmp/evil.gguf", "a/../../evil.gguf", "..\\evil.gguf"])
def test_a_list_of_files_that_leads_out_is_refused(server: FakeHub, tiny: dict[str, bytes], evil: str) -> None:
    server.publish(REPO, tiny | {evil: b"x"})
    refused(ModelError, "outside of its own folder", repr(evil))
    assert hub.cached_models() == []


def test_pickles_alone_are_refused_with_the_reason(server: FakeHub, tiny: dict[str, bytes]) -> None:
    del tiny["model.safetensors"]
    server.publish(REPO, tiny)
    refused(ModelError, "only pickled weights", "pytorch_model.bin", "can run any code")
    assert len(server.requests) == 1


def test_a_repository_without_a_model_is_refused(server: FakeHub) -> None:
    server.publish(REPO, {"README.md": b"nothing here"})
    refused(ModelError, "nothing in the repository that mixkv opens")


def test_what_cannot_be_run_is_refused_before_its_weights_are_fetched(server: FakeHub, tiny: dict[str, bytes]) -> None:
    config = json.loads(tiny["config.json"]) | {"model_type": "mystery"}
    server.publish(REPO, tiny | {"config.json": json.dumps(config).encode()})
    with pytest.raises(ModelError, match="'mystery'"):
        hub.pull(NAME)
    assert not any("safetensors" in request for request in server.requests) and parts() == []


def test_one_gguf_file_needs_no_name_and_several_do(server: FakeHub) -> None:
    server.publish(REPO, {"tiny.gguf": GGUF, "README.md": b"x"})
    path = hub.pull(NAME)
    assert path.name == "tiny.gguf" and path.read_bytes() == GGUF
    server.publish(REPO, {"a.gguf": GGUF, "sub/b.gguf": GGUF + b"b"}, "two")
    refused(UsageError, "a.gguf (0 MB)", "sub/b.gguf", name=f"{NAME}@two")
    path = hub.pull(f"{NAME}@two:sub/b.gguf")
    assert path.read_bytes() == GGUF + b"b"
    refused(UsageError, "a.gguf (0 MB)", name=f"{NAME}@two")  # also where the cache has only one of them
    hub.pull(f"{NAME}@two:a.gguf")
    refused(UsageError, "no such file", "a.gguf", name=f"{NAME}@two:c.gguf")
    assert {model.name for model in hub.cached_models()} == {
        f"{NAME}:tiny.gguf", f"{NAME}@two:a.gguf", f"{NAME}@two:sub/b.gguf",
    }  # fmt: skip


def test_a_name_without_a_file_is_never_the_gguf_file_beside_a_folder(server: FakeHub, tiny: dict[str, bytes]) -> None:
    server.publish(REPO, tiny | {"tiny.gguf": GGUF})
    file = hub.pull(f"{NAME}:tiny.gguf")
    assert [model.name for model in hub.cached_models()] == [f"{NAME}:tiny.gguf"]
    folder = hub.pull(NAME)
    assert folder == file.parent and (folder / "model.safetensors").is_file() and hub.pull(f"{NAME}:tiny.gguf") == file


def test_a_part_of_a_split_model_is_refused(server: FakeHub) -> None:
    server.publish(REPO, {"m-00001-of-00002.gguf": GGUF, "m-00002-of-00002.gguf": GGUF})
    refused(ModelError, "split", name=f"{NAME}:m-00001-of-00002.gguf")


@pytest.mark.parametrize(
    "name",
    ["hf:", "hf:tiny", "hf:org/", "hf:org/tiny/x", "hf:org/../x", "hf:org/tiny@", "hf:org/tiny:", "hf:org/tiny:x.py",
     "hf:org/tiny:../x.gguf", "hf:org/tiny:/x.gguf", "hf:org--a/tiny", "hf:-org/tiny", "hf:org/tiny@../x", "hf:o/t?x=1"],
)  # fmt: skip
def test_names_of_another_form_are_refused_without_a_request(server: FakeHub, name: str) -> None:
    with pytest.raises(UsageError, match="model '"):
        hub.pull(name)
    assert server.requests == []


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server: FakeHub, tiny: dict[str, bytes]) -> None:
    server.publish(REPO, tiny)
    server.cut["model.safetensors"] = [5_000, 3_000]
    path = hub.pull(NAME)
    assert (path / "model.safetensors").read_bytes() == tiny["model.safetensors"]
    assert server.ranges == ["", "", "bytes=5000-", "bytes=8000-"]  # the first is config.json's


def test_a_download_that_ended_early_is_gone_on_with_by_the_next(server: FakeHub, tiny: dict[str, bytes]) -> None:
    server.publish(REPO, tiny)

    def interrupt(done: int, total: int) -> None:
        if done >= 6_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.pull(NAME, progress=interrupt)
    assert parts() == ["config.json", "model.safetensors.part"]
    assert hub.cached_models() == []
    calls: list[int] = []
    hub.pull(NAME, progress=lambda done, total: calls.append(done))
    assert calls[:2] == [6_000, 7_000] and server.ranges[-1] == "bytes=6000-"
    assert parts() == []


def test_a_server_without_ranges_begins_anew(server: FakeHub, tiny: dict[str, bytes]) -> None:
    server.publish(REPO, tiny)
    server.cut["model.safetensors"], server.no_ranges = [5_000], True
    path = hub.pull(NAME)
    assert (path / "model.safetensors").read_bytes() == tiny["model.safetensors"]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_tampered_file_is_refused_and_removed(server: FakeHub, tiny: dict[str, bytes], file: str) -> None:
    """A large file has a SHA-256, a small one only git's digest: both are checked."""
    server.publish(REPO, tiny)
    server.tampered.add(file)
    found = bytes([tiny[file][0] ^ 1]) + tiny[file][1:]
    refused(DownloadError, file, sha256(found), "it was removed")
    assert not {file, f"{file}.part"}.intersection(parts()) and hub.cached_models() == []
    server.tampered.clear()
    assert (hub.pull(NAME) / file).read_bytes() == tiny[file]


def test_a_damaged_part_of_an_earlier_download_is_not_believed(server: FakeHub, tiny: dict[str, bytes]) -> None:
    commit = server.publish(REPO, tiny)
    folder = hub.cache_folder() / "hf" / "org--tiny" / commit
    folder.mkdir(parents=True)
    (folder / "model.safetensors.part").write_bytes(b"z" * 5_000)
    (folder / "config.json.part").write_bytes(b"z" * 500_000)
    path = hub.pull(NAME)
    assert all((path / name).read_bytes() == tiny[name] for name in ("config.json", "model.safetensors"))


def test_a_server_that_sends_more_than_it_said_is_cut_off(server: FakeHub, tiny: dict[str, bytes]) -> None:
    server.publish(REPO, tiny)
    server.longer = True
    with pytest.raises(DownloadError, match="more than the [0-9,]+ bytes"):
        hub.pull(NAME)
    assert hub.cached_models() == []


def test_a_commit_that_is_none_is_no_folder(server: FakeHub, tiny: dict[str, bytes]) -> None:
    server.publish(REPO, tiny)
    server.sha = "../../somewhere"
    refused(DownloadError, "'../../somewhere'")


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "", ["no such repository", "HF_TOKEN"]),
        (404, "RepoNotFound", ["no such repository", "hf auth login"]),
        (403, "GatedRepo", ["gated", "accept its terms at", "HF_TOKEN"]),
        (401, "GatedRepo", ["gated", "accept its terms at"]),
        (403, "", ["answers 403", "HF_TOKEN"]),
        (500, "", ["answers 500"]),
        (429, "", ["answers 429"]),
    ],
)
@pytest.mark.parametrize("where", ["listing", "model.safetensors"])
def test_what_the_hub_refuses_is_said_in_one_line(
    server: FakeHub, tiny: dict[str, bytes], where: str, status: int, code: str, words: list[str]
) -> None:
    server.publish(REPO, tiny)
    server.status[where] = status, code
    if where == "model.safetensors" and status == 429:
        pytest.skip("the library waits for the server's limit to pass")
    refused(DownloadError, *words)
    assert hub.cached_models() == []


def test_a_repository_or_revision_that_is_not_there(server: FakeHub, tiny: dict[str, bytes]) -> None:
    refused(DownloadError, "no such repository", name="hf:org/other")
    server.publish(REPO, tiny)
    refused(DownloadError, "no revision 'v9'", name=f"{NAME}@v9")


def test_the_users_token_is_sent(server: FakeHub, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    answer = server.answer
    monkeypatch.setattr(server, "answer", lambda h: (seen.append(h.headers.get("Authorization")), answer(h)))
    server.publish(REPO, tiny)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.pull(NAME)
    assert set(seen) == {"Bearer hf_secret"} and len(seen) == 3


def test_no_network_says_what_where_and_how_to_supply_it(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    shelf = str(hub.cache_folder() / "hf" / "org--tiny")
    refused(DownloadError, "could not reach http://127.0.0.1:9", shelf, "by hand", "config.json")
    assert hub.cached_models() == []


def test_offline_mode_of_the_library_is_respected(server: FakeHub, tiny: dict[str, bytes]) -> None:
    server.publish(REPO, tiny)
    program = f"import mixkv\ntry: mixkv.load({NAME!r})\nexcept mixkv.MixkvError as error: print(error)"
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert "could not reach" in done.stdout and "HF_HUB_OFFLINE" in done.stdout, done
    assert server.requests == []


def test_a_branch_that_moved_is_followed_only_with_update(server: FakeHub, tiny: dict[str, bytes]) -> None:
    old = server.publish(REPO, tiny)
    first = hub.pull(NAME)
    new = server.publish(REPO, tiny | {"generation_config.json": b'{"eos_token_id": 7}'})
    assert hub.pull(NAME) == first and old != new
    second = hub.pull(NAME, update=True)
    assert second.name == new and (second / "generation_config.json").is_file()
    assert hub.pull(NAME) == second and hub.pull(f"{NAME}@{old}") == first
    assert {model.name for model in hub.cached_models()} == {NAME, f"{NAME}@{old}"}
    assert hub.pull(NAME, update=True) == second  # nothing new: only the listing is asked
    assert server.requests[-1].startswith("/api/")


def test_a_file_that_was_changed_in_the_cache_is_noticed(server: FakeHub, tiny: dict[str, bytes]) -> None:
    server.publish(REPO, tiny)
    weights = hub.pull(NAME) / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert hub.pull(NAME) == weights.parent  # only touched: hashed again, and right
    assert open_shelf("hf", REPO).models[weights.parent.name, ""]["model.safetensors"].mtime_ns == 1
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(DownloadError, str(weights), sha256(bytes(data)), f"mixkv rm {NAME}")
    weights.write_bytes(data[:-5])
    refused(DownloadError, str(weights), f"{len(data) - 5:,} bytes")
    weights.unlink()
    assert hub.pull(NAME) == weights.parent and weights.read_bytes() == tiny["model.safetensors"]


def test_sha256_is_for_one_file(server: FakeHub, tiny: dict[str, bytes]) -> None:
    server.publish(REPO, tiny | {"tiny.gguf": GGUF})
    refused(UsageError, "folder", sha256=sha256(GGUF))
    one = f"{NAME}:tiny.gguf"
    message = refused(DownloadError, "on the hub", sha256(GGUF), name=one, sha256="0" * 64)
    assert "0" * 64 in message and not any("resolve" in request for request in server.requests)
    assert hub.pull(one, sha256=sha256(GGUF).upper()).read_bytes() == GGUF
    refused(DownloadError, "in the cache", name=one, sha256="0" * 64)
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        hub.pull(one, sha256="beef")


def test_without_the_extra_the_command_is_named(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    refused(UsageError, "pip install 'mixkv[hub]'")
    assert not hub.cache_folder().exists()


def test_a_full_disk_is_said_before_and_while(
    server: FakeHub, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.publish(REPO, tiny)
    with monkeypatch.context() as small:
        small.setattr(files.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10})())
        refused(DownloadError, "room for 10 bytes")

    class Disk:
        """A file that takes 2,000 bytes."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, data: bytes) -> int:
            if self._file.tell() >= 2_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self._file.write(data)

    real = hf_client._Counted
    with monkeypatch.context() as small:
        small.setattr(hf_client, "_Counted", lambda file, *rest: real(Disk(file), *rest))
        refused(DownloadError, "cannot store it in", "No space left on device")
    assert hub.cached_models() == []
    assert hub.pull(NAME).is_dir()


OTHER = "import sys\nfrom mixkv.models import hub\nprint(hub.pull(sys.argv[1]))"


def test_two_processes_at_once_fetch_once(server: FakeHub, tiny: dict[str, bytes]) -> None:
    commit = server.publish(REPO, tiny)
    command = [sys.executable, "-c", OTHER, NAME]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "") and output.strip().endswith(commit)
    assert sum("model.safetensors" in request for request in server.requests) == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda index: index.pop("models"), "models"),
        (lambda index: index.update(name="org/other"), "name"),
        (lambda index: index.update(revisions={"": 3}), "revisions"),
        (lambda index: index.update(models={"../../x": {"": {}}}), "no path below"),
        (lambda index: next(iter(index["models"].values()))[""].update({"../x": {}}), "no path below"),
        (lambda index: next(iter(index["models"].values()))[""]["config.json"].update(sha256="x"), "a file is"),
        (lambda index: index.update(digests={"a": "b"}), "digests"),
    ],
)
def test_a_damaged_index_is_refused_by_its_name(
    server: FakeHub, tiny: dict[str, bytes], change: Any, word: str
) -> None:
    server.publish(REPO, tiny)
    path = hub.pull(NAME).parent / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=word) as caught:
        hub.pull(NAME)
    assert str(path) in str(caught.value)
