"""What loading refuses, in one line that names the file, what was found and what is allowed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mixkv import CachePolicy, Session
from mixkv.models.errors import ModelError, UsageError
from mixkv.models.folder import TEXT_FILES
from mixkv.models.load import Model, load
from mixkv.models.toy import CONFIG

from .test_gguf_architectures import write as write_gguf
from .test_safetensors import hub_cache, link
from .tiny_models import FOLDER as TINY_MODELS

TINY_LLAMA = Path(__file__).parents[1] / "data" / "tiny_llama"
IDS = np.random.default_rng(3).integers(0, 97, 60)
Tensors = dict[str, NDArray[Any]]
Change = Callable[[Tensors, dict[str, Any]], None]


def logits(model: Model) -> NDArray[np.float32]:
    found = Session(model, CachePolicy.full()).forward(IDS)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def expected() -> NDArray[np.float32]:
    return logits(load(str(TINY_LLAMA)))


def refusal(error: type[Exception], name: str, **options: Any) -> str:
    with pytest.raises(error) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    for name in ("smollm3", str(tmp_path / "nothing")):
        message = refusal(UsageError, name)
        assert (
            repr(name) in message
            and "smollm2, gemma3-270m, toy" in message
            and "hf:org/name" in message
            and "folder" in message
        )


def test_a_file_that_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    assert refusal(ModelError, str(path)).startswith(f"{path}: a model is a folder with config.json")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    shutil.copy(TINY_LLAMA / "model.safetensors", tmp_path)
    message = refusal(ModelError, str(tmp_path))
    assert str(tmp_path / "config.json") in message and "no such file" in message


@pytest.mark.fault("weight-map-paths")
@pytest.mark.parametrize("name", TEXT_FILES)
def test_a_link_out_of_the_folder_is_refused_whatever_it_stands_for(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY_LLAMA, folder)
    file, outside = folder / name, tmp_path / "outside"
    outside.write_bytes(file.read_bytes() if file.exists() else b"{}")
    file.unlink(missing_ok=True)
    link(file, "../outside")
    message = refusal(ModelError, str(folder))
    assert str(file) in message and "a link to" in message and "put the file itself there" in message


def test_texts_of_the_hub_s_own_cache_are_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot, blobs = hub_cache(tmp_path)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY_LLAMA / name, blobs / name)
        link(snapshot / name, f"../../blobs/{name}")
    assert load(str(snapshot)).config == load(str(TINY_LLAMA)).config


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    shutil.copy(TINY_LLAMA / "config.json", tmp_path)
    message = refusal(ModelError, str(tmp_path))
    assert str(tmp_path) in message and "safetensors" in message


@pytest.mark.fault("missing-tensors")
def test_all_missing_tensors_are_listed_at_once(folder: Callable[[Change], str]) -> None:
    gone = ["model.norm.weight", "model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.bias"]

    def remove(tensors: Tensors, _: dict[str, Any]) -> None:
        for name in gone:
            del tensors[name]

    path = folder(remove)
    message = refusal(ModelError, path)
    assert message.startswith(path) and "3 of " in message and "missing" in message
    assert all(name in message for name in gone)


@pytest.mark.fault("tensor-shapes")
def test_tensors_unlike_the_config_are_listed_with_both_shapes(folder: Callable[[Change], str]) -> None:
    def reshape(tensors: Tensors, _: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"] = np.zeros((80, 48), np.float32)
        tensors["model.norm.weight"] = np.zeros(47, np.float32)
        del tensors["model.layers.0.input_layernorm.weight"]

    message = refusal(ModelError, folder(reshape))
    assert "model.layers.1.mlp.down_proj.weight is [80, 48] and should be [48, 80]" in message
    assert "model.norm.weight is [47] and should be [48]" in message
    assert "model.layers.0.input_layernorm.weight" in message, "and what is missing is said in the same line"


@pytest.mark.fault("config-dimensions")
def test_a_config_unlike_the_tensors_is_refused_before_anything_is_read(folder: Callable[[Change], str]) -> None:
    def enlarge(_: Tensors, config: dict[str, Any]) -> None:
        config["intermediate_size"] = 1 << 22

    message = refusal(ModelError, folder(enlarge))
    assert "model.layers.0.mlp.gate_proj.weight is [80, 48] and should be [4194304, 48]" in message


def write_tokenizer(folder: Path, size: int) -> None:
    vocab = {f"<{i}>": i for i in range(size - 94)} | {chr(33 + i): size - 94 + i for i in range(94)}
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": True,
                },
                "post_processor": None,
                "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
                "model": {"type": "BPE", "vocab": vocab, "merges": []},
            }
        )
    )


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_with_both_numbers(
    tmp_path: Path, expected: NDArray[np.float32]
) -> None:
    path = tmp_path / "model"
    shutil.copytree(TINY_LLAMA, path)
    write_tokenizer(path, 97)
    assert load(str(path)).encode("!~") == [3, 96]
    write_tokenizer(path, 95)  # a smaller one is normal: many embeddings are padded
    assert np.array_equal(logits(load(str(path))), expected)
    write_tokenizer(path, 98)
    message = refusal(ModelError, str(path))
    assert message == f"{path}: the tokenizer has 98 tokens, the model only 97"


@pytest.mark.fault("nan-weights")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.2.post_attention_layernorm.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.v_proj.bias",
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.2.mlp.down_proj.weight",
    ],
)
def test_nan_and_infinite_weights_are_named_when_asked_for(
    folder: Callable[[Change], str], name: str, value: float
) -> None:
    """Fault row 13, for every kind of tensor; without the check, loading is as fast as it can be."""

    def spoil(tensors: Tensors, _: dict[str, Any]) -> None:
        tensors[name].flat[5] = value

    path = folder(spoil)
    message = refusal(ModelError, path, check_weights=True)
    assert message.startswith(f"{path}: tensor {name} holds ")
    assert ("1 NaN" if np.isnan(value) else "1 infinite") in message
    load(path)


def test_sound_weights_pass_the_check(expected: NDArray[np.float32]) -> None:
    assert np.array_equal(logits(load(str(TINY_LLAMA), check_weights=True)), expected)
    load("toy", check_weights=True)


@pytest.mark.parametrize("weights", ["q5", "Q4_1", "f16", "F32", "", None, 4])
def test_a_weight_format_that_is_not_supported_is_refused_with_the_list(weights: Any) -> None:
    message = refusal(UsageError, "toy", weights=weights)
    assert message == f"weights must be one of auto, f32, bf16, q8, q4, found {weights!r}"


def test_a_weight_format_is_refused_before_a_model_is_looked_for() -> None:
    assert refusal(UsageError, "no-such-model", weights="q5").startswith("weights must be")


@pytest.mark.parametrize("weights", ["auto", "f32", "bf16", "q8", "q4"])
def test_supported_weight_formats_load(weights: str) -> None:
    assert load("toy", weights).config == CONFIG


@pytest.mark.fault("duplicate-tensor")
@pytest.mark.parametrize(
    ("model", "one", "other"),
    [
        ("mixtral", "block_sparse_moe.gate.weight", "mlp.gate.weight"),
        ("mixtral", "block_sparse_moe.experts.0.w1.weight", "mlp.experts.0.gate_proj.weight"),
        ("gpt_oss", "mlp.router.bias", "mlp.gate.bias"),
    ],
)
def test_two_tensors_that_are_one_are_refused(model: str, one: str, other: str, tmp_path: Path) -> None:
    shutil.copy(TINY_MODELS / model / "config.json", tmp_path)
    held = load_file(TINY_MODELS / model / "model.safetensors")
    layer = "model.layers.1."
    save_file(held | {layer + other: held[layer + one].copy()}, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelError, match=f"{layer}{one}' and '{layer}{other}' are both|{other}' and '{layer}{one}' are"
    ):
        load(str(tmp_path))


@pytest.mark.fault("duplicate-tensor")
def test_two_tensors_of_a_gguf_file_that_are_one_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = gguf.GGUFWriter.write_header_to_file

    def with_bias(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_sinks.bias", np.ones(4, np.float32))
        original(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_bias)
    write_gguf("gpt_oss", tmp_path / "tiny.gguf")
    with pytest.raises(
        ModelError, match=r"tiny.gguf: 'blk.0.attn_sinks.weight' and 'blk.0.attn_sinks.bias' are both model"
    ):
        load(str(tmp_path / "tiny.gguf"))
