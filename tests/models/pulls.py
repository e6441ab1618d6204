"""What the tests of ``hub.pull`` share."""

import hashlib
from typing import Any

import pytest

from mixkv.models import hub
from mixkv.models.errors import MixkvError

GGUF = b"GGUF" + bytes(range(256)) * 40


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pull_refused(kind: type[MixkvError], *words: str, name: str, **options: Any) -> str:
    """The one line that pull refuses with."""
    with pytest.raises(kind) as caught:
        hub.pull(name, **options)
    message = str(caught.value)
    assert message.isprintable() and name in message
    for word in words:
        assert word in message, (word, message)
    return message
