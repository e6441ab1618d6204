"""Where compiled kernels are kept: safe for two processes at once, and never stale."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mixkv.kernels import compiled, jit

from .other_process import ROOT, finish, run_process, start_process

MERGED = {"out": [3.0] * 16, "state": [0.5, 3.0]}


@pytest.mark.fault("two-processes")
def test_two_processes_that_compile_at_once_both_finish(tmp_path: Path) -> None:
    """And a third one, later, loads what they left."""
    environment = {"MIXKV_CACHE": str(tmp_path)}
    processes = [start_process("merge", environment) for _ in range(2)]
    for found in [finish(process) for process in processes]:
        assert {name: found[name] for name in MERGED} == MERGED
        assert Path(found["folder"]).is_relative_to(tmp_path)
        assert Path(found["used"]).is_relative_to(found["folder"])
    later = run_process("merge", environment)
    assert {name: later[name] for name in MERGED} == MERGED
    assert later["hits"] == 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted({path.suffix for path in files}) == [".nbc", ".nbi"]  # no temporary file is left


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """A folder to put first on PYTHONPATH, with a copy of the package's kernels that may be edited."""
    package = tmp_path / "path" / "mixkv"
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "__init__.py", package)
    return package.parent


def test_an_edited_helper_is_not_run_from_the_cache(tmp_path: Path, copied_package: Path) -> None:
    """Numba looks only at the file of the kernel itself, state.py; what is edited is a file that it uses."""
    environment = {"MIXKV_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(copied_package)}
    before = run_process("merge", environment)
    assert {name: before[name] for name in MERGED} == MERGED
    source = copied_package / "mixkv" / "kernels" / "simd.py"
    text = source.read_text()
    assert text.count("return builder.fmul(a, b)\n") == 1
    source.write_text(text.replace("return builder.fmul(a, b)\n", "return builder.fadd(a, b)\n"))
    after = run_process("merge", environment)
    assert after["folder"] != before["folder"]
    assert after["out"] != before["out"]
    source.write_text(text)
    again = run_process("merge", environment)
    assert (again["folder"], again["out"], again["hits"]) == (before["folder"], before["out"], 1)


def test_the_cache_folder_is_below_MIXKV_CACHE_where_that_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXKV_CACHE", str(tmp_path))
    folder = jit.cache_folder()
    assert folder.is_relative_to(tmp_path)
    monkeypatch.delenv("MIXKV_CACHE")
    assert jit.cache_folder().name == folder.name and not jit.cache_folder().is_relative_to(tmp_path)


def test_a_cache_folder_of_Numba_itself_is_respected(tmp_path: Path) -> None:
    found = run_process("merge", {"MIXKV_CACHE": "", "NUMBA_CACHE_DIR": str(tmp_path)})
    assert Path(found["used"]).is_relative_to(tmp_path)
    assert {name: found[name] for name in MERGED} == MERGED


@pytest.fixture
def obstructed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder among temporary files that stands in for one that cannot be written; not there yet."""
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("MIXKV_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(compiled, "_for_this_process", compiled._for_this_process.__wrapped__)
    return compiled._temporary()


def test_kernels_among_temporary_files_are_of_this_user_alone(obstructed: Path) -> None:
    assert compiled.cache_folder() == compiled.cache_folder() == obstructed / compiled.wanted_folder().name
    assert obstructed.stat().st_mode & 0o777 == 0o700


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def open_to_a_group(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o770)


def linked(folder: Path) -> None:
    (folder.parent / "other").mkdir()
    folder.symlink_to("other")


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has a temporary folder for each user")
@pytest.mark.parametrize("made", [open_to_all, open_to_a_group, linked, Path.touch, lambda folder: None])
def test_a_folder_that_others_can_write_to_is_not_used(
    obstructed: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[[Path], None]
) -> None:
    made(obstructed)
    if not os.path.lexists(obstructed):  # one of another user
        obstructed.mkdir(mode=0o700)
        monkeypatch.setattr(os, "getuid", lambda: obstructed.stat().st_uid + 1)
        monkeypatch.setattr(compiled, "_temporary", lambda: obstructed)
    elif obstructed.is_dir():
        (obstructed / ("0" * 16)).mkdir()
    with pytest.warns(RuntimeWarning, match=f"{obstructed.name} is no folder that only you"):
        used = compiled.cache_folder()
    assert not used.is_relative_to(obstructed) and used.parent.stat().st_mode & 0o777 == 0o700
    assert compiled.others() == []


def test_an_unwritable_cache_folder_is_no_obstacle(tmp_path: Path) -> None:
    """Root may write anywhere, so the folder's place is taken by a file."""
    obstacle = tmp_path / "file"
    obstacle.write_text("")
    found = run_process("merge", {"MIXKV_CACHE": os.fspath(obstacle)})
    assert {name: found[name] for name in MERGED} == MERGED
