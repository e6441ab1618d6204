"""Real models' tokenizers on the corpus of 10,000 texts: the ids that their oracle gave."""

import json
import time

import pytest

from mixkv.models import hub
from mixkv.models.errors import PromptError
from mixkv.models.gguf import open_gguf
from mixkv.models.tokenizer import tokenizer_from_gguf

from .tokenizer_data import FOLDER, script, texts

CORPUS = script("corpus")
RECORDED = json.loads((FOLDER / "corpus_ids.json").read_text("utf-8"))
AVAILABLE = sorted(set(RECORDED) & set(hub.REGISTRY))


def ids_of(tokenizer, text):
    try:
        return tokenizer.encode(text)
    except PromptError as error:
        assert "token for its byte" in str(error)
        return None


@pytest.mark.model
@pytest.mark.parametrize("name", AVAILABLE)
def test_all_texts_have_the_oracle_s_ids(name):
    recorded = RECORDED[name]
    path = hub.pull(name)
    metadata = dict(open_gguf(path).metadata) | {"tokenizer.ggml.add_bos_token": False}
    start = time.process_time()
    tokenizer = tokenizer_from_gguf(metadata, name)
    assert time.process_time() - start < 8  # measured: 0.1 s (49,152 tokens), 2.1 s (262,144)
    ids = [ids_of(tokenizer, text) for text in texts()]
    assert [i for i, each in enumerate(ids) if each is None] == recorded["refused"]
    hundreds = [[str(each or []) for each in ids[i : i + 100]] for i in range(0, len(ids), 100)]
    assert [CORPUS.digest(each)[:16] for each in hundreds] == recorded["digests"]


def test_the_default_model_is_among_them():
    assert "smollm2" in AVAILABLE
    assert all(len(each["digests"]) == 100 for each in RECORDED.values())
