"""The texts that measurements read: the standard library's own, and files."""

from dataclasses import dataclass
from pathlib import Path

from ..models.errors import PromptError
from ..models.limits import MAX_PROMPT_BYTES

DEFAULT = "topics"
"""Names the default text where a file could be named."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its name: "topics", or that of its file."""

    name: str
    text: str


def default_text() -> str:
    """The help texts that Python brings along (pydoc_data.topics), in the order of their names, joined by newlines.

    Some 450 kB of English technical prose with examples. It is a little different in each version of Python.
    """
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def document(name: str) -> Document:
    """The default text for "topics", else the file of that name.

    Raises:
        PromptError: a file that cannot be read, is no UTF-8, or is longer than a prompt may be.

    """
    return Document(name, default_text() if name == DEFAULT else read(Path(name)))


def read(path: Path) -> str:
    """The text of a file in UTF-8; PromptError as in ``document``."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_PROMPT_BYTES + 1)
    except (OSError, ValueError) as error:  # of a name with a null character
        raise PromptError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return decoded(data, str(path))


def decoded(data: bytes, where: str) -> str:
    """Bytes as text; PromptError, which names ``where`` they are from, as in ``document``."""
    if len(data) > MAX_PROMPT_BYTES:
        raise PromptError(f"{where}: more than the {MAX_PROMPT_BYTES} bytes that a prompt may have")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{where}: not UTF-8 at byte {error.start}") from None
