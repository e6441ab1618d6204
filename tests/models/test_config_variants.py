"""Configs that are almost those of the tiny models: what transformers computes of them, or a refusal."""

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mixkv import CachePolicy, Session
from mixkv.models.architectures import FAMILIES
from mixkv.models.errors import MixkvError, ModelError
from mixkv.models.hf_config import config_from_hf
from mixkv.models.hf_write import hf_config
from mixkv.models.load import load

from .tiny_models import FOLDER, reference

RECORD = json.loads((FOLDER.parent / "config_variants.json").read_text())
POSITION = 77
BOUND = 2e-4
# Of what transformers computes, what is refused, by the key that the refusal names: families do not have such a thing here,
# two keys contradict each other, of which transformers believes one, or a size is missing that is not to be guessed
REFUSED = {
    "hidden_act": 39, "hidden_activation": 4, "partial_rotary_factor": 15, "swiglu_limit": 1, "attn_logit_softcapping": 1,
    "use_bidirectional_attention": 1,
    "layer_types": 27, "_sliding_window_pattern": 2, "rope_theta": 21, "rope_local_base_freq": 1,
    "original_max_position_embeddings": 7, "rope_parameters": 43, "rope_parameters.full_attention": 1,
    "missing": 42, "num_experts_per_tok": 2,
}  # fmt: skip
# Only transformers refuses a null here; it means that the number stands elsewhere
ACCEPTED = [("phi3", {"original_max_position_embeddings": None})]


def last_logits(folder: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    model = load(str(folder), "f32")
    dynamic = model.config.rope.rope_type == "dynamic"  # transformers stretches it by the text's length
    session = Session(model, CachePolicy.full(), context=len(ids) if dynamic else None)
    found = session.forward(ids[: POSITION + 1], "last")
    assert found is not None
    return found


def test_a_config_is_what_transformers_makes_of_it_or_refused(tmp_path: Path) -> None:
    refused: Counter[str] = Counter()
    before = ""
    for name, removed, changed, result in RECORD["variants"]:
        if name != before:
            shutil.copy(FOLDER / name / "model.safetensors", tmp_path)
            published, before, ids = json.loads((FOLDER / name / "config.json").read_text()), name, reference(name)[0]
        if name == "llama_dynamic" and {"rope_parameters", "rope_scaling"} & {*removed, *changed}:
            continue  # no longer dynamic, and the text longer than its context
        keys = {key: value for key, value in {**published, **changed}.items() if key not in removed}
        (tmp_path / "config.json").write_text(json.dumps(keys))
        try:
            found = last_logits(tmp_path, ids)
        except MixkvError as error:
            if result >= 0:
                refused[str(error).removeprefix(f"{tmp_path}/config.json: ").split()[0]] += 1
            continue
        if result < 0:
            assert (published["model_type"], changed) in ACCEPTED, (name, removed, changed)
            continue
        assert np.abs(found - RECORD["logits"][result]).max() < BOUND, (name, removed, changed)
    assert refused == REFUSED


def test_what_is_read_of_a_config_is_written_again(tmp_path: Path) -> None:
    """All that a variant says, windows and embeddings by kind of layer among it; or there is no word for it."""
    wordless = 0
    for name, removed, changed, _ in RECORD["variants"]:
        if name == "gpt_oss":
            continue
        published = json.loads((FOLDER / name / "config.json").read_text())
        keys = {key: value for key, value in {**published, **changed}.items() if key not in removed}
        (tmp_path / "config.json").write_text(json.dumps(keys))
        with contextlib.suppress(ModelError):
            config = config_from_hf(tmp_path)
            try:
                written = hf_config(config)
            except ModelError:
                wordless += 1  # Mistral with windows in some layers
                continue
            (tmp_path / "config.json").write_text(json.dumps(written))
            assert config_from_hf(tmp_path) == config, (name, removed, changed)
    assert wordless == 4


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_absent_key_is_what_transformers_takes_it_for(model_type: str, tmp_path: Path) -> None:
    """Written out, all at once and one by one, the defaults of its config classes change nothing."""
    needed = {"num_experts_per_tok", "moe_intermediate_size", "num_experts", "num_local_experts"}
    defaults = RECORD["defaults"][model_type]
    sizes = RECORD["defaults"]["sizes"] | {key: defaults[key] for key in needed & defaults.keys()}
    ids = ("bos_token_id", "eos_token_id")  # are the tokenizer's unless said
    defaults = {key: value for key, value in defaults.items() if key not in ids}

    def read(more: dict[str, Any]) -> object:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **sizes, **more}))
        return config_from_hf(tmp_path)

    plain = read({})
    assert read(defaults) == plain
    for key, value in defaults.items():
        if (key, value) != ("sliding_window", None):  # which Qwen's classes make of it without use_sliding_window
            assert read({key: value}) == plain, key


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x[::-1].copy()])
def test_an_output_head_of_its_own_counts_in_a_tied_model(
    change: Callable[[NDArray[Any]], NDArray[Any]], tmp_path: Path
) -> None:
    """As in transformers; a copy of the embedding is none."""
    tensors = load_file(FOLDER / "gemma2" / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": change(embedding)}, tmp_path / "model.safetensors")
    shutil.copy(FOLDER / "gemma2" / "config.json", tmp_path)
    ids, positions, expected = reference("gemma2")
    found = last_logits(tmp_path, ids)
    assert load(str(tmp_path)).config.tie_word_embeddings == (change(embedding) is embedding)
    assert np.abs(change(expected[positions == POSITION][0]) - found).max() < BOUND
