"""Chat templates of the supported families: the text of transformers' apply_chat_template, tools and variables included."""

import hashlib
import importlib.util
import json
from datetime import datetime
from pathlib import Path

import pytest

from mixkv.models import chat_methods
from mixkv.models.chat import ChatTemplate
from mixkv.models.errors import PromptError

FOLDER = Path(__file__).parent.parent / "data" / "chat_templates"
SPEC = importlib.util.spec_from_file_location("conversations", FOLDER / "conversations.py")
CASES = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(CASES)
RECORDED = json.loads((FOLDER / "reference.json").read_text("utf-8"))
TEMPLATES = {path.stem: path.read_bytes().decode() for path in sorted((FOLDER / "models").glob("*.jinja"))}


class Fixed(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(*CASES.NOW)


@pytest.fixture
def standing_clock(monkeypatch):
    monkeypatch.setattr(chat_methods, "datetime", Fixed)


def rendered(template, case):
    name, tools, ask, variables = case
    try:
        return template.render(
            CASES.CONVERSATIONS[name],
            tools=CASES.TOOLS if tools else None,
            add_generation_prompt=ask,
            variables=CASES.VARIABLES[variables],
        )
    except PromptError as error:
        assert str(error).startswith("chat template: ")
        return None


def test_every_recorded_template_is_there():
    assert set(RECORDED) == set(TEMPLATES)
    assert len(TEMPLATES) >= 24


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_templates_of_all_families_say_what_transformers_makes_them_say(name, standing_clock):
    template = ChatTemplate(TEMPLATES[name], **CASES.TOKENS)
    recorded = RECORDED[name]
    assert len(recorded["digests"]) == len(CASES.cases())
    assert sum(digest is not None for digest in recorded["digests"]) >= 8
    for case, digest in zip(CASES.cases(), recorded["digests"], strict=True):
        text = rendered(template, case)
        if case == ("several with system", True, True, ""):
            assert text == recorded["shown"]
        assert (None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]) == digest, case
