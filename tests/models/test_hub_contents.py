"""What the cache has, and removing it: by name, all, and what stopped downloads have left."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from mixkv.models import hub
from mixkv.models.errors import DownloadError, ModelError, UsageError
from mixkv.models.hub.contents import remove_partial
from mixkv.models.hub.registry import RegistryEntry, Wheel

from .fake_hub import FakeHub
from .pulls import GGUF, sha256
from .test_hub_registry import CONTENT


@dataclass
class Cache:
    """A cache with a model of the registry and three of a repository, two of them in one commit."""

    folder: Path
    server: FakeHub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    entry = RegistryEntry("tiny", "", "MIT", (Wheel("t", "1", "", 0, ""),), "tiny.gguf", sha256(CONTENT), len(CONTENT))
    for module in ("mixkv.models.hub.registry", "mixkv.models.hub"):
        monkeypatch.setattr(f"{module}.REGISTRY", {"tiny": entry})
    monkeypatch.setenv("MIXKV_CACHE", str(tmp_path / "cache"))
    folder = hub.cache_folder()
    with FakeHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.publish("org/tiny", {"a.gguf": GGUF, "sub/b.gguf": GGUF + b"b"})
        server.publish("org/other", {"c.gguf": GGUF})
        for name in ("hf:org/tiny:a.gguf", "hf:org/tiny:sub/b.gguf", "hf:org/other"):
            hub.pull(name)
        (folder / "tiny.gguf").write_bytes(CONTENT)
        yield Cache(folder, server)


NAMES = {"tiny", "hf:org/tiny:a.gguf", "hf:org/tiny:sub/b.gguf", "hf:org/other:c.gguf"}


def names() -> set[str]:
    return {model.name for model in hub.cached_models()}


def test_every_name_in_the_list_finds_its_model(cache: Cache) -> None:
    assert names() == NAMES
    for model in hub.cached_models():
        assert hub.pull(model.name) == model.path and model.path.is_file()
        assert model.nbytes == model.path.stat().st_size


@pytest.mark.parametrize("name", sorted(NAMES))
def test_removing_one_leaves_the_others(cache: Cache, name: str) -> None:
    (model,) = [model for model in hub.cached_models() if model.name == name]
    freed = hub.remove_model(name)
    assert freed >= model.nbytes and not model.path.exists()
    assert names() == NAMES - {name}
    assert all(other.path.is_file() for other in hub.cached_models())
    with pytest.raises(UsageError, match="the cache has no model"):
        hub.remove_model(name)


def test_nothing_of_a_repository_stays_when_its_last_model_goes(cache: Cache) -> None:
    hub.remove_model("hf:org/tiny:a.gguf")
    hub.remove_model("hf:org/tiny:sub/b.gguf")
    left = {path.name for path in (cache.folder / "hf" / "org--tiny").iterdir()}
    assert left <= {".lock.lock"}


@pytest.mark.parametrize(
    "name",
    ["", "..", "../tiny", "/", "tiny.gguf", "hf:org/none", "pypi:none", "toy", "hf:org/tiny@main:a.gguf"],
)
def test_unknown_names_are_refused_with_the_list(cache: Cache, name: str) -> None:
    with pytest.raises(UsageError, match=r"the cache has no model.*tiny, hf:org/other:c.gguf, hf:org/tiny:a.gguf"):
        hub.remove_model(name)
    assert names() == NAMES


@pytest.mark.parametrize("name", ["hf:../../x", "hf:org/..", "pypi:../x", "hf:org/tiny:../../x.gguf"])
def test_names_that_lead_out_are_refused(cache: Cache, name: str) -> None:
    with pytest.raises(UsageError, match="model '"):
        hub.remove_model(name)


def test_a_name_that_stands_for_none_of_several_is_refused_with_them(cache: Cache) -> None:
    with pytest.raises(UsageError, match="hf:org/tiny:a.gguf, hf:org/tiny:sub/b.gguf"):
        hub.remove_model("hf:org/tiny")
    assert names() == NAMES


def stop_downloads(folder: Path) -> int:
    """What two stopped downloads leave; the bytes of it."""
    part = folder / "hf" / "org--tiny" / ("0" * 40) / "model.safetensors.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 1_000)
    wheels = folder / ".download-tiny"
    wheels.mkdir()
    (wheels / "some.whl").write_bytes(b"y" * 500)
    return 1_500


def test_what_stopped_downloads_have_left_is_found_and_removed(cache: Cache) -> None:
    nbytes = stop_downloads(cache.folder)
    assert {path.name for path in hub.partial_downloads()} == {".download-tiny", "model.safetensors.part"}
    assert remove_partial() == nbytes
    assert hub.partial_downloads() == [] and names() == NAMES


def stop_shards(folder: Path) -> int:
    """What a stopped download of a folder leaves: whole files, and one that is not; the bytes of it."""
    place = folder / "hf" / "org--shards" / ("1" * 40)
    place.mkdir(parents=True)
    (place / "config.json").write_bytes(b"{}")
    (place / "model-00001-of-00002.safetensors").write_bytes(b"x" * 3_000)
    (place / "model-00002-of-00002.safetensors.part").write_bytes(b"x" * 200)
    return 3_202


REMOVALS = {
    "partial": remove_partial,
    "all": hub.remove_all,
    "name": lambda: hub.remove_model("hf:org/shards"),
    "commit": lambda: hub.remove_model(f"hf:org/shards@{'1' * 40}"),
}


@pytest.mark.parametrize("way", sorted(REMOVALS))
def test_whole_files_of_a_stopped_download_are_remains_too(cache: Cache, way: str) -> None:
    nbytes = stop_shards(cache.folder)
    assert sum(map(hub.disk_nbytes, hub.partial_downloads())) == nbytes
    assert REMOVALS[way]() >= nbytes
    assert hub.partial_downloads() == [] and names() == (set() if way == "all" else NAMES)
    assert {path.name for path in (cache.folder / "hf" / "org--shards").iterdir()} == {".lock.lock"}


def test_a_name_that_is_not_there_leaves_what_downloads_of_others_have_left(cache: Cache) -> None:
    stop_downloads(cache.folder)
    stop_shards(cache.folder)
    for name in ("hf:org/tiny", "hf:org/tiny@typo", "hf:org/tiny:c.gguf", "hf:org/shards@typo", "hf:org/shards:a.gguf"):
        with pytest.raises(UsageError, match="the cache has no model .* stopped downloads .* `mixkv rm --partial`"):
            hub.remove_model(name)
    assert hub.remove_model("hf:org/tiny:a.gguf") == len(GGUF)
    assert len(hub.partial_downloads()) == 5 and names() == NAMES - {"hf:org/tiny:a.gguf"}


def test_the_file_of_a_stopped_download_is_removed_by_its_name(cache: Cache) -> None:
    stop_downloads(cache.folder)
    (cache.folder / "hf" / "org--tiny" / ("0" * 40) / "d.gguf.part").write_bytes(b"x" * 30)
    assert hub.remove_model("hf:org/tiny:d.gguf") == 30
    assert [path.name for path in hub.partial_downloads()] == [".download-tiny", "model.safetensors.part"]


def test_a_model_whose_files_are_gone_can_be_removed(cache: Cache) -> None:
    (model,) = [model for model in hub.cached_models() if model.name == "hf:org/tiny:a.gguf"]
    model.path.unlink()
    assert hub.remove_model(model.name) == 0
    assert names() == NAMES - {model.name}


def test_what_is_fetched_now_is_no_remains(cache: Cache) -> None:
    stop_shards(cache.folder)
    with FileLock(cache.folder / "hf" / "org--shards" / ".lock.lock", is_singleton=False):
        for remove in REMOVALS.values():
            with pytest.raises(DownloadError, match="another process is fetching it"):
                remove()
    assert len(hub.partial_downloads()) == 3


def test_removing_a_model_takes_what_its_stopped_download_has_left(cache: Cache) -> None:
    stop_downloads(cache.folder)
    assert hub.remove_model("tiny") >= len(CONTENT) + 500
    assert [path.name for path in hub.partial_downloads()] == ["model.safetensors.part"]


def test_what_another_process_is_fetching_stays(cache: Cache) -> None:
    stop_downloads(cache.folder)
    with FileLock(cache.folder / ".tiny.lock", is_singleton=False):
        for remove in (lambda: hub.remove_model("tiny"), remove_partial, hub.remove_all):
            with pytest.raises(DownloadError, match="another process is fetching it"):
                remove()
    assert (cache.folder / "tiny.gguf").is_file()


def test_all_means_all(cache: Cache) -> None:
    nbytes = sum(model.nbytes for model in hub.cached_models()) + stop_downloads(cache.folder)
    assert hub.remove_all() >= nbytes
    assert names() == set() and hub.partial_downloads() == []
    left = [path for path in cache.folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    assert left == []
    assert hub.remove_all() == 0


def test_a_damaged_index_is_reported_and_is_no_obstacle_to_others(cache: Cache) -> None:
    index = cache.folder / "hf" / "org--other" / "index.json"
    for damage in ("{", '{"name": "org/tiny"}'):
        index.write_text(damage)
        assert names() == NAMES - {"hf:org/other:c.gguf"}
        (damaged,) = hub.damaged_shelves()
        assert (damaged.name, damaged.folder) == ("hf:org/other", index.parent)
        assert str(index) in damaged.problem and "remove its folder" in damaged.problem
        with pytest.raises(UsageError, match="the cache has no model"):
            hub.remove_model("pypi:nothing")
        with pytest.raises(ModelError, match="remove its folder"):
            hub.remove_model("hf:org/other")
    index.unlink()
    index.mkdir()
    assert hub.remove_model("hf:org/tiny:a.gguf") == len(GGUF)
    assert hub.remove_partial() == 0
    assert hub.remove_all() > 0 and names() == set()
    assert next(index.parent.rglob("c.gguf")).read_bytes() == GGUF  # nobody knows whether it is in use


def test_a_link_goes_and_what_it_leads_to_stays(cache: Cache, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(CONTENT)
    (cache.folder / "tiny.gguf").unlink()
    (cache.folder / "tiny.gguf").symlink_to(outside)
    hub.remove_model("tiny")
    assert outside.read_bytes() == CONTENT and not (cache.folder / "tiny.gguf").is_symlink()


LINKED = {  # what is replaced by a link to a folder elsewhere, and a file of that folder that removing would have met
    "kind": ("hf", f"org--tiny/{'0' * 40}/model.gguf.part"),
    "shelf": ("hf/org--tiny", f"{'0' * 40}/model.gguf.part"),
    "new shelf": ("hf/c--d", f"{'0' * 40}/model.gguf.part"),
    "version": ("hf/org--other/COMMIT", "model.safetensors.part"),  # of a model's own files, too
    "wheels": (".download-tiny", "model.gguf.part"),
}


@pytest.mark.fault("linked-cache")
@pytest.mark.parametrize("way", ["partial", "all", "hf:org/tiny:a.gguf", "hf:org/other:c.gguf", "hf:c/d", "tiny"])
@pytest.mark.parametrize("place", sorted(LINKED))
def test_nothing_is_removed_through_a_link_to_a_folder(cache: Cache, tmp_path: Path, place: str, way: str) -> None:
    (commit,) = (cache.folder / "hf" / "org--other").glob("?" * 40)
    link = cache.folder / LINKED[place][0].replace("COMMIT", commit.name)
    inside = tmp_path / "elsewhere" / LINKED[place][1]
    inside.parent.mkdir(parents=True)
    if link.exists():
        link.rename(tmp_path / "was")
        for path in (tmp_path / "was").rglob("*"):  # so that a model's own files lie behind the link, too
            if path.is_file() and not path.name.startswith("."):
                target = tmp_path / "elsewhere" / path.relative_to(tmp_path / "was")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    inside.write_bytes(CONTENT)
    link.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    before = {path: path.read_bytes() for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()}
    refusals = []
    try:
        {"partial": remove_partial, "all": hub.remove_all}.get(way, lambda: hub.remove_model(way))()
    except (ModelError, UsageError) as error:
        refusals.append(str(error))
    assert {path: path.read_bytes() for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()} == before
    if place != "wheels":  # of which the link itself may go
        assert link.is_symlink() and any(str(link) in shelf.problem for shelf in hub.damaged_shelves())
        assert all("is a link" in text or "the cache has no model" in text for text in refusals)


@pytest.mark.fault("linked-cache")
def test_a_file_behind_a_link_deep_in_a_model_stays_and_so_does_the_model(cache: Cache, tmp_path: Path) -> None:
    (model,) = [model for model in hub.cached_models() if model.name == "hf:org/tiny:sub/b.gguf"]
    elsewhere = tmp_path / "elsewhere"
    model.path.parent.rename(elsewhere)
    model.path.parent.symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(ModelError, match="sub is a link, and the cache follows none .* MIXKV_CACHE"):
        hub.remove_model(model.name)
    assert names() == NAMES
    with pytest.raises(ModelError, match="sub is a link, .*; all else is removed, [0-9,]+ bytes came free"):
        hub.remove_all()
    assert (elsewhere / "b.gguf").read_bytes() == GGUF + b"b" and names() == {model.name}


@pytest.mark.fault("linked-cache")
def test_nothing_is_fetched_through_a_link(cache: Cache, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (cache.folder / "hf" / "org--new").symlink_to(elsewhere, target_is_directory=True)
    cache.server.publish("org/new", {"d.gguf": GGUF})
    with pytest.raises(ModelError, match="org--new is a link"):
        hub.pull("hf:org/new")
    assert list(elsewhere.iterdir()) == []
    cache.folder.joinpath(".download-tiny").symlink_to(elsewhere, target_is_directory=True)
    (cache.folder / "tiny.gguf").unlink()
    with pytest.raises(ModelError, match=".download-tiny is a link"):
        hub.pull("tiny")
    (commit,) = (cache.folder / "hf" / "org--tiny").glob("?" * 40)
    (commit / "sub" / "b.gguf").unlink()
    (commit / "sub").rmdir()
    (commit / "sub").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(ModelError, match="sub is a link"):
        hub.pull("hf:org/tiny:sub/b.gguf")
    assert list(elsewhere.iterdir()) == []


@pytest.mark.fault("linked-cache")
def test_what_no_download_has_written_stays(cache: Cache) -> None:
    commit = "0" * 40
    strangers = [
        "hf/notes/thesis.txt", "hf/org--tiny/thesis.txt", "hf/org--tiny/drafts/thesis.txt", "pypi/x/work/a.txt",
        f"hf/org--tiny/{commit}/thesis.txt", f"hf/org--tiny/{commit}/sub/config.json", "pypi/x/2024-notes/thesis.txt",
        ".download-thesis/thesis.txt",
    ]  # fmt: skip
    for name in strangers:
        (cache.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (cache.folder / name).write_bytes(CONTENT)
    (cache.folder / "hf" / "org--tiny" / "empty").mkdir()
    assert hub.partial_downloads() == []
    hub.remove_partial()
    hub.remove_all()
    assert [(cache.folder / name).read_bytes() for name in strangers] == [CONTENT] * len(strangers)
    assert (cache.folder / "hf" / "org--tiny" / "empty").is_dir()


@pytest.mark.fault("linked-cache")
def test_a_folder_in_the_place_of_a_file_stays(cache: Cache) -> None:
    (model,) = [model for model in hub.cached_models() if model.name == "hf:org/other:c.gguf"]
    places = {"tiny": cache.folder / "tiny.gguf", model.name: model.path}
    for name, path in places.items():
        path.unlink()
        path.mkdir()
        (path / "thesis.txt").write_bytes(CONTENT)
        with pytest.raises(ModelError, match="is a folder, where a file of the cache is to be"):
            hub.remove_model(name)
    with pytest.raises(ModelError, match="tiny.gguf is a folder, .*c.gguf is a folder, .*all else is removed"):
        hub.remove_all()
    assert [(path / "thesis.txt").read_bytes() for path in places.values()] == [CONTENT] * 2


@pytest.mark.fault("linked-cache")
def test_links_in_the_place_of_files_are_replaced_or_refused(cache: Cache, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(CONTENT)
    marker = cache.folder / "tiny.gguf.verified"
    marker.unlink(missing_ok=True)
    marker.symlink_to(outside)
    assert "tiny" in names() and not marker.is_symlink()  # hashed, and noted anew
    (commit,) = (cache.folder / "hf" / "org--other").glob("?" * 40)
    (commit / "c.gguf").unlink()
    (commit / "c.gguf.part").symlink_to(outside)
    assert hub.pull("hf:org/other").read_bytes() == GGUF
    lock = cache.folder / "hf" / "org--tiny" / ".lock.lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(outside)
    with pytest.raises(ModelError, match=".lock.lock is a link"):
        hub.remove_model("hf:org/tiny:a.gguf")
    assert outside.read_bytes() == CONTENT


def test_the_folder_of_models_itself_may_be_a_link(cache: Cache, tmp_path: Path) -> None:
    cache.folder.rename(tmp_path / "disk")
    cache.folder.symlink_to(tmp_path / "disk", target_is_directory=True)
    assert names() == NAMES
    hub.remove_all()
    assert names() == set() and not list((tmp_path / "disk").rglob("*.gguf"))
