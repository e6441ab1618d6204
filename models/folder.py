"""Which files of a model folder are opened, as Hugging Face calls them, and that they are of this folder."""

from pathlib import Path

from .errors import ModelError

TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""What may be there besides weights."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""How weights end that are never opened: reading them can run any code they hold."""


def inside(folder: Path, name: str) -> Path:
    """``folder / name``; ModelError when links lead out of the folder or, for a hub snapshot, out of its model's cache."""
    try:
        home = folder.resolve()
        target = (home / name).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise ModelError(f"{folder / name}: the link cannot be followed") from error
    # The hub's cache is models--owner--name/{snapshots/revision/file -> ../../blobs/hash}.
    for parent in home.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            home = parent.parent
            break
    if not target.is_relative_to(home):
        raise ModelError(f"{folder / name}: a link to {target}, outside {home}; put the file itself there")
    return folder / name
