"""A golden file: what a model was, and what it decoded, as JSON that people can read and version control can compare.

    format      "mixkv golden 1"
    about       model (its name), weights (the format asked for, or null), policy (canonical line), chat (whether the
                template was applied), config, tensors {name: "format digest"}, and versions, cpu, code: what else bits
                depend on
    prompts     of each: text (null where ids were given) and prompt_ids; generated (null without a tokenizer), the text of
                token_ids, the likeliest at each step, and logprobs, theirs; alternatives: of each step the likeliest
                tokens and their log-probabilities, the one taken first

Log-probabilities are natural, and written so that the same float64 is read back. A token of probability 0 is left out.
"""

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...engine.policy import CachePolicy
from ...models.check import parse_json_object, shown
from ...models.errors import GoldenFileError, ModelError, UsageError
from ...models.hub.files import write_whole
from ...models.limits import MAX_GOLDEN_BYTES
from .fields import about_of, prompts_of

FORMAT = "mixkv golden 1"

Alternatives = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class About:
    """What a model is, and what else decides over its bits: see the module's text."""

    model: str
    weights: str | None
    policy: CachePolicy
    chat: bool
    config: dict[str, Any]
    tensors: dict[str, str]
    versions: dict[str, str]
    cpu: dict[str, str]
    code: dict[str, str]


@dataclass(frozen=True, slots=True)
class Recorded:
    """One prompt, and what was decoded behind it; see the module's text."""

    text: str | None
    prompt_ids: list[int]
    generated: str | None
    token_ids: list[int]
    logprobs: list[float]
    alternatives: list[Alternatives]


@dataclass(frozen=True, slots=True)
class Golden:
    """A golden file's contents."""

    about: About
    prompts: list[Recorded]


def read(path: Path) -> Golden:
    """The contents of a golden file, every field of them checked.

    Raises:
        GoldenFileError: a file that cannot be read, is none, or is damaged; it names the field, what was found and what is
            allowed.

    """
    try:
        if not path.is_file():  # also keeps pipes and devices, which never end, from being opened
            raise OSError(0, "no such file")
        with path.open("rb") as file:
            data = file.read(MAX_GOLDEN_BYTES + 1)
    except (OSError, ValueError) as error:
        raise GoldenFileError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse(data, str(path))


def parse(data: bytes, where: str) -> Golden:
    """The contents of a golden file's bytes; ``where`` names it in errors, which are those of ``read``."""
    try:
        if len(data) > MAX_GOLDEN_BYTES:
            raise UsageError(f"more than the {MAX_GOLDEN_BYTES} bytes that a golden file may have")
        found = parse_json_object(data, "no golden file")
        kind = found.get("format")
        if kind != FORMAT:
            raise UsageError(f"format must be {FORMAT!r}, found {shown(kind)}")
        if found.keys() != {"format", "about", "prompts"}:
            raise UsageError(f"it must have format, about and prompts, found {', '.join(map(shown, found))}")
        about = about_of(found["about"])
        policy = CachePolicy.parse(line := about.pop("policy"))
        if str(policy) != line:
            raise UsageError(f"policy must be in its canonical form, {str(policy)!r}, found {shown(line)}")
        prompts = [Recorded(**fields) for fields in prompts_of(found["prompts"])]
    except (UsageError, ModelError) as error:
        raise GoldenFileError(f"{where}: {error}") from None
    return Golden(About(**about, policy=policy), prompts)


def text_of(golden: Golden) -> str:
    """The JSON of a golden file: fields and steps on lines of their own."""
    about = {name: getattr(golden.about, name) for name in About.__dataclass_fields__}
    about["policy"] = str(golden.about.policy)
    return _laid_out({"format": FORMAT, "about": about, "prompts": [asdict(x) for x in golden.prompts]}) + "\n"


def _laid_out(value: Any, indent: str = "") -> str:
    """JSON in which a dictionary, and a list of lists or dictionaries, has a line for each item."""
    inside = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(name, ensure_ascii=False)}: {_laid_out(x, inside)}" for name, x in value.items()]
        return _block("{", lines, "}", indent)
    if isinstance(value, list) and value and isinstance(value[0], list | dict):
        deep = isinstance(value[0], dict)
        return _block("[", [_laid_out(x, inside) if deep else _line(x) for x in value], "]", indent)
    return _line(value)


def _block(opening: str, lines: Iterable[str], closing: str, indent: str) -> str:
    return f"{opening}\n{indent}  " + f",\n{indent}  ".join(lines) + f"\n{indent}{closing}"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def check_place(path: Path, *, force: bool) -> None:
    """Whether a golden file can be written there: before hours of work, since it is written last.

    Raises:
        UsageError: a file that is there already, without ``force``.
        GoldenFileError: a place where none can be.

    """
    try:
        place = Path(os.path.realpath(path))
        is_there, folder = place.exists(), place.parent
        if is_there and not stat.S_ISREG(place.stat().st_mode):
            raise OSError(0, "it is no file")
        if not folder.is_dir():
            raise OSError(0, f"there is no folder {folder}")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(0, f"{folder} cannot be written to")
    except (OSError, ValueError) as error:
        raise GoldenFileError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    if is_there and not force:
        raise UsageError(f"{path} is there already: --force replaces it")


def write(path: Path, golden: Golden) -> None:
    """Write a golden file beside its place, make it safe on disk and rename it: there is the old one or the new one.

    Raises:
        GoldenFileError: it cannot be written. What was there before is as it was.

    """
    data = text_of(golden).encode()
    parse(data, str(path))  # what cannot be read back is not written
    try:
        write_whole(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise GoldenFileError(f"{path}: cannot be written: {error.strerror}") from None
