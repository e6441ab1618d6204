"""``hf:org/name[@revision][:file.gguf]``: models of the Hugging Face hub, through the package huggingface_hub.

The hub is asked once: a branch becomes the commit that it is at, and this is what the cache keeps and uses from then on.
Only files that hold no code are fetched, at the names that readers know. Each is checked against the digest that the
commit has of it: SHA-256 for large files, git's own for small ones. What a connection that broke has left is gone on with.
"""

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..check import listed, read_json_object, shown
from ..errors import DownloadError, MixkvError, ModelError, UsageError
from ..folder import PICKLES, TEXT_FILES
from ..hf_config import config_from_hf
from ..limits import MAX_JSON_BYTES, MAX_REPO_FILES
from .files import Progress, cannot_store, check_room, is_plain_path
from .hf_client import Client, RepoFile
from .shelf import ModelName, Shelf, open_shelf

_NAME = re.compile(
    r"hf:(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>.+))?", re.ASCII
)
FORM = "hf:org/name[@revision][:file.gguf]"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def parse(name: str) -> ModelName:
    """The parts of a name; UsageError for another form, or a file that is no .gguf file."""
    match = _NAME.fullmatch(name)
    if match is None or "--" in match["repo"] or ".." in name:
        raise UsageError(f"model {shown(name)}: the form is {FORM}")
    file = match["file"] or ""
    if file and not (file.endswith(".gguf") and is_plain_path(file)):
        raise UsageError(f"model {shown(name)}: a file must be a .gguf file of the repository, found {shown(file)}")
    return ModelName(name, match["repo"], match["revision"] or "", file)


def pull(name: ModelName, progress: Progress, *, sha256: str | None = None, update: bool = False) -> Path:
    """The path of the model's folder or file, fetched first if it is not in the cache.

    With ``update`` the hub is asked what the revision is now. Without, a model that the cache has needs no network.

    Raises:
        UsageError: no package huggingface_hub, several .gguf files and none named, or ``sha256`` for a folder.
        ModelError: a repository with nothing in it that mixkv would open, or with names that lead out of it.
        DownloadError: not fetched, not stored, or with other digests than the hub's.

    """
    shelf = open_shelf("hf", name.shelf)
    try:
        found = None if update else shelf.cached(name)
        if found is None:
            client = Client(name.full, name.shelf, shelf.folder)  # refuses without the package, before anything is made
            with shelf.locked(name.full):
                shelf = open_shelf("hf", name.shelf)
                found = None if update else shelf.cached(name)
                found = found or _fetch(name, shelf, client, progress, sha256)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise cannot_store(name.full, shelf.folder, error) from error
    commit, file = found
    if sha256 is not None:
        _check_single(name, file)
        if (digest := shelf.models[found][file].sha256) != sha256:
            raise DownloadError(f"{name.full}: the file in the cache has sha256 {digest}, expected {sha256}")
    return shelf.path(commit, file)


def _check_single(name: ModelName, file: str) -> None:
    if not file:
        raise UsageError(f"{name.full}: --sha256 is for a model of one file, and this is a folder of several")


def _fetch(name: ModelName, shelf: Shelf, client: Client, progress: Progress, sha256: str | None) -> tuple[str, str]:
    listing = client.listing(name.revision)
    files = _checked(name, listing.files)
    file = _chosen(name, files)
    if sha256 is not None:
        _check_single(name, file)
        if files[file].sha256 not in (None, sha256):  # before anything is fetched
            raise DownloadError(f"{name.full}: {file} has sha256 {files[file].sha256} on the hub, expected {sha256}")
    folder = shelf.version_folder(listing.commit)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [file] if file else [small for small in (*TEXT_FILES, _SINGLE, _INDEX) if small in files]
    if not file and _SINGLE in files:
        wanted = [each for each in wanted if each != _INDEX]
    digests: dict[str, str] = {}
    small = [each for each in wanted if each not in (file, _SINGLE)]
    _download(name, client, folder, files, small, digests, lambda done, total: None)
    if not file:
        try:
            config_from_hf(folder)  # what cannot be run is refused before its weights are fetched
            wanted += _shards(name, folder, files) if _INDEX in wanted else []
        except ModelError:
            shelf.remove({folder / each for each in small}.intersection(shelf.remains()))
            raise
    _download(name, client, folder, files, [each for each in wanted if each not in small], digests, progress)
    if sha256 is not None and digests[file] != sha256:
        (folder / file).unlink()
        raise DownloadError(f"{name.full}: {file} has sha256 {digests[file]}, expected {sha256}; it was removed")
    shelf.add(listing.commit, file, digests)
    with suppress(MixkvError):  # a name without a file may stand for none
        shelf.defaults[listing.commit] = _chosen(replace(name, file=""), files)
    shelf.revisions[name.revision or ""] = listing.commit
    shelf.licenses[listing.commit] = listing.license
    shelf.save()
    return listing.commit, file


def _checked(name: ModelName, files: dict[str, RepoFile]) -> dict[str, RepoFile]:
    """The files of the repository, refused where a name leads out of its folder."""
    if len(files) > MAX_REPO_FILES:
        raise ModelError(f"{name.full}: the repository has {len(files)} files, at most {MAX_REPO_FILES} are allowed")
    if strange := [file for file in files if file.startswith("/") or "\\" in file or ".." in file.split("/")]:
        raise ModelError(f"{name.full}: the repository lists {listed(map(shown, strange))}, outside of its own folder")
    return {file: each for file, each in files.items() if is_plain_path(file)}


def _chosen(name: ModelName, files: dict[str, RepoFile]) -> str:
    """Which file is the model, "" for a folder of safetensors files."""
    models = {file: each.nbytes for file, each in files.items() if file.endswith(".gguf")}
    sizes = listed(f"{file} ({nbytes / 1e6:.0f} MB)" for file, nbytes in sorted(models.items()))
    if name.file and name.file not in models:
        raise UsageError(f"{name.full}: no such file in the repository; its .gguf files: {sizes or 'none'}")
    if not name.file and "config.json" in files and (_SINGLE in files or _INDEX in files):
        return ""
    if not name.file and len(models) > 1:
        raise UsageError(f"{name.full}: the repository has several .gguf files; name one of {sizes}")
    if name.file or models:
        file = name.file or next(iter(models))
        if _PART.search(file):
            raise ModelError(f"{name.full}: {file} is a part of a split model; only whole .gguf files are supported")
        return file
    if pickles := sorted(file for file in files if file.endswith(PICKLES)):
        raise ModelError(
            f"{name.full}: only pickled weights ({listed(map(shown, pickles))}); opening a pickle can run any code it "
            "holds, so mixkv never fetches one: look for the model as safetensors or GGUF"
        )
    raise ModelError(
        f"{name.full}: nothing in the repository that mixkv opens: config.json with {_SINGLE} or {_INDEX}, or a .gguf file"
    )


def _shards(name: ModelName, folder: Path, files: dict[str, RepoFile]) -> list[str]:
    """The files that the index names, all of the repository."""
    weight_map = read_json_object(folder / _INDEX).get("weight_map")
    named = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    strange = [each for each in named if "/" in each or not each.endswith(".safetensors") or each not in files]
    if strange or not named:
        found = f"names {listed(map(shown, strange))}" if strange else f"is {shown(weight_map)}"
        raise ModelError(
            f"{name.full}: weight_map of {_INDEX} {found}; only .safetensors files of the repository are allowed"
        )
    return named


def _download(
    name: ModelName,
    client: Client,
    folder: Path,
    files: dict[str, RepoFile],
    wanted: list[str],
    digests: dict[str, str],
    progress: Progress,
) -> None:
    """Fetch files into the folder and note their SHA-256; those that are there whole are only hashed."""
    for file in wanted:
        if file.endswith((".json", ".jinja")) and files[file].nbytes > MAX_JSON_BYTES:
            raise ModelError(
                f"{name.full}: {file} has {files[file].nbytes:,} bytes, at most {MAX_JSON_BYTES:,} are allowed"
            )
    total = sum(files[file].nbytes for file in wanted)
    left = sum(max(0, files[file].nbytes - client.had(folder / file)) for file in wanted)
    check_room(name.full, folder, left)
    before = 0
    for file in wanted:

        def arrived(nbytes: int, before: int = before) -> None:
            progress(before + nbytes, total)

        digests[file] = client.download(file, files[file], folder / file, arrived)
        before += files[file].nbytes
        progress(before, total)
