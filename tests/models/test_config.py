import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixkv.models import limits
from mixkv.models.check import check_finite, check_tensors, parse_json_object
from mixkv.models.config import ModelConfig
from mixkv.models.errors import ModelError
from mixkv.models.hf_config import config_from_hf

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FIELDS = {
    "architecture": "llama",
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
DIMENSIONS = [field for field in FIELDS if field != "architecture"]
REQUIRED = [key for key in (*DIMENSIONS, "rms_norm_eps") if key not in ("num_key_value_heads", "head_dim")]
ABSENT = object()


def write(folder, changes=None, name="config.json", base=LLAMA):
    keys = {**base, **(changes or {})}
    (folder / name).write_text(json.dumps({k: v for k, v in keys.items() if v is not ABSENT}))
    return folder


def refusal(folder, changes):
    with pytest.raises(ModelError) as caught:
        config_from_hf(write(folder, changes))
    message = str(caught.value)
    assert message.startswith(str(folder / "config.json"))
    assert "\n" not in message
    return message.removeprefix(str(folder / "config.json"))


def test_a_llama_config_is_read_in_full(tmp_path):
    config = config_from_hf(write(tmp_path, {"torch_dtype": "bfloat16", "some_future_key": [1, None]}))
    assert config == ModelConfig(
        **FIELDS, rms_norm_eps=1e-6, tie_word_embeddings=True, bos_token_id=1, eos_token_ids=(2,)
    )
    assert config == config_from_hf(tmp_path / "config.json")


def test_defaults_are_those_of_llama(tmp_path):
    absent = dict.fromkeys(
        ("num_key_value_heads", "hidden_act", "tie_word_embeddings", "bos_token_id", "eos_token_id", "architectures"),
        ABSENT,
    )
    config = config_from_hf(write(tmp_path, absent))
    assert (config.num_key_value_heads, config.head_dim, config.rope.theta) == (6, 16, 10_000.0)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_null_means_default_where_hugging_face_writes_null(tmp_path):
    keys = ("num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters", "quantization_config", "bos_token_id")
    config = config_from_hf(write(tmp_path, dict.fromkeys(keys)))
    assert (config.num_key_value_heads, config.head_dim, config.bos_token_id) == (6, 16, None)


def test_head_dim_may_be_free_of_hidden_size(tmp_path):
    assert config_from_hf(write(tmp_path, {"head_dim": 32})).head_dim == 32


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500_000},
        {"rope_theta": 500_000.0, "rope_scaling": None},
        {"rope_theta": 500_000.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
        {"rope_parameters": {"rope_theta": 500_000, "partial_rotary_factor": 1.0}},
        {"rope_theta": 500_000, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    ],
)
def test_rotary_base_is_read_in_the_old_and_the_new_form(tmp_path, changes):
    theta = config_from_hf(write(tmp_path, changes)).rope.theta
    assert theta == 500_000.0
    assert isinstance(theta, float)


# Row 1


@pytest.mark.fault("config-values")
@pytest.mark.parametrize("value", ["12", None, math.nan, math.inf, 12.0, True, [12], {"a": 1}])
@pytest.mark.parametrize("key", REQUIRED)
def test_wrong_type_null_or_nan_is_refused_by_key(tmp_path, key, value):
    if key == "rms_norm_eps" and value == 12.0:
        return
    assert f"{key} is " in refusal(tmp_path, {key: value})


@pytest.mark.fault("config-values")
@pytest.mark.parametrize("key", [*REQUIRED, "model_type"])
def test_missing_key_is_refused_by_name(tmp_path, key):
    assert key in refusal(tmp_path, {key: ABSENT})


def test_all_missing_keys_are_named_at_once(tmp_path):
    message = refusal(tmp_path, {"vocab_size": ABSENT, "hidden_size": ABSENT})
    assert "missing hidden_size, vocab_size" in message


@pytest.mark.fault("config-values")
@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", [1, "false", None])
def test_a_switch_that_is_not_true_or_false_is_refused(tmp_path, key, value):
    assert f"{key} is {value!r}" in refusal(tmp_path, {key: value})


@pytest.mark.fault("config-values")
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 10**400, 1e39, 1e-39, "1e-5", True, None])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_a_float_that_is_not_finite_and_positive_is_refused(tmp_path, key, value):
    assert f"{key} is " in refusal(tmp_path, {key: value})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not valid JSON"),
        (b'{"vocab_size": 5', "not valid JSON"),
        (b"[1]", "a JSON object was expected"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b'{"a":' + b"[" * 200_000, "nested too deeply"),
        (b'{"hidden_size": 96, "hidden_size": 960}', "'hidden_size' appears twice"),
        (b'{"rope_scaling": {"a": 1, "\\u0061": 2}}', "'a' appears twice"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git-LFS pointer"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_damaged_or_ambiguous_json_is_refused(tmp_path, text, words):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=words):
        config_from_hf(tmp_path)


def test_json_with_a_byte_order_mark_is_read():
    assert parse_json_object(b'\xef\xbb\xbf{"a": 1}', "here") == {"a": 1}


def test_oversized_config_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("mixkv.models.check.MAX_JSON_BYTES", 100)
    with pytest.raises(ModelError, match="larger than the 100 bytes"):
        config_from_hf(write(tmp_path))


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        config_from_hf(tmp_path)


# Row 2


@pytest.mark.fault("config-dimensions")
@pytest.mark.parametrize("field", DIMENSIONS)
@pytest.mark.parametrize("value", [0, -1, 1 << 40, pytest.param(10**5000, id="enormous"), True, 16.0, "16", None])
def test_zero_negative_absurd_or_mistyped_dimension_is_refused(field, value):
    with pytest.raises(ModelError, match=rf"{field} is .*from 1 to \d+$"):
        ModelConfig(**{**FIELDS, field: value})


@pytest.mark.fault("config-dimensions")
@pytest.mark.parametrize(("field", "largest"), [("vocab_size", limits.MAX_VOCAB_SIZE), ("head_dim", 256)])
def test_the_largest_allowed_dimension_passes_and_one_more_does_not(field, largest):
    assert getattr(ModelConfig(**{**FIELDS, field: largest}), field) == largest
    with pytest.raises(ModelError, match=f"{field} is {largest + 1}"):
        ModelConfig(**{**FIELDS, field: largest + 1})


@pytest.mark.fault("config-dimensions")
def test_heads_that_are_no_multiple_of_key_value_heads_are_refused(tmp_path):
    message = refusal(tmp_path, {"num_key_value_heads": 4})
    assert "num_attention_heads is 6" in message
    assert "num_key_value_heads, which is 4" in message


def test_odd_head_dim_is_refused(tmp_path):
    assert "head_dim is 15; it must be even" in refusal(tmp_path, {"head_dim": 15})


def test_hidden_size_that_does_not_divide_into_heads_is_refused(tmp_path):
    assert "hidden_size is 97" in refusal(tmp_path, {"hidden_size": 97})
    assert "num_attention_heads is 0" in refusal(tmp_path, {"num_attention_heads": 0})


@pytest.mark.parametrize("value", [512, -1, True, "2", 2.0])
def test_token_ids_outside_the_vocabulary_are_refused(tmp_path, value):
    assert f"bos_token_id is {value!r}" in refusal(tmp_path, {"bos_token_id": value})
    assert f"eos_token_id is {value!r}" in refusal(tmp_path, {"eos_token_id": value})
    assert f"eos_token_id is {value!r}" in refusal(tmp_path, {"eos_token_id": [2, value]})


def test_a_list_of_end_ids_is_not_a_tuple():
    with pytest.raises(ModelError, match="eos_token_ids"):
        ModelConfig(**FIELDS, eos_token_ids=[2])


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig(**FIELDS).vocab_size = 5


# Row 3


@pytest.mark.fault("unsupported-architecture")
@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mamba"},
        {"model_type": ["llama"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": []},
        {"architectures": "LlamaForCausalLM"},
    ],
)
def test_unknown_architecture_is_refused_with_the_supported_ones(tmp_path, changes):
    message = refusal(tmp_path, changes)
    assert next(iter(changes)) in message
    assert "supported: llama (LlamaForCausalLM)" in message


@pytest.mark.parametrize("value", ["falcon", "", None, ["llama"]])
def test_config_object_of_an_unknown_architecture_is_refused(value):
    with pytest.raises(ModelError, match="architecture is .*; supported: llama"):
        ModelConfig(**{**FIELDS, "architecture": value})


@pytest.mark.fault("unsupported-architecture")
@pytest.mark.parametrize("value", ["gelu", "relu", None, 1])
def test_unknown_activation_is_refused_with_the_supported_one(tmp_path, value):
    assert f"hidden_act is {value!r}; supported: silu" in refusal(tmp_path, {"hidden_act": value})


@pytest.mark.fault("unsupported-architecture")
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "rope",
    [
        {"type": "proportional", "factor": 2.0},
        {"type": "linear"},
        {"type": "linear", "factor": 2.0, "beta_fast": 3},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "default", "type": "yarn"},
        {"rope_type": 3},
        {"factor": 2.0},
        {"full_attention": {"rope_type": "default"}},
    ],
)
def test_unknown_rope_type_is_refused_with_the_supported_one(tmp_path, key, rope):
    message = refusal(tmp_path, {key: rope})
    assert key in message
    assert "supported: default" in message


def test_rope_that_is_no_object_is_refused(tmp_path):
    assert "rope_scaling is 'linear'" in refusal(tmp_path, {"rope_scaling": "linear"})


def test_two_different_rotary_bases_are_refused(tmp_path):
    message = refusal(tmp_path, {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert "rope_theta is 10000.0; rope_parameters.rope_theta is 500000.0" in message


@pytest.mark.parametrize("value", [0.5, "1", True, math.nan])
def test_partial_rotation_is_refused(tmp_path, value):
    assert "partial_rotary_factor is" in refusal(tmp_path, {"partial_rotary_factor": value})
    new = {"rope_type": "default", "partial_rotary_factor": value}
    assert "rope_parameters.partial_rotary_factor is" in refusal(tmp_path, {"rope_parameters": new})


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "gemma2", "smollm3"])
def test_layers_that_slide_without_a_window_are_refused(tmp_path, model_type):
    types = ["full_attention", "sliding_attention", "full_attention"]
    changes = {"model_type": model_type, "architectures": ABSENT, "hidden_act": ABSENT, "layer_types": types}
    message = refusal(tmp_path, {**changes, "sliding_window": None, "use_sliding_window": False})
    assert "layer_types names sliding_attention, but no sliding_window is in use" in message


def test_a_part_of_the_channels_that_is_none_is_refused(tmp_path):
    phi = {"model_type": "phi3", "architectures": ABSENT, "rope_parameters": {"rope_type": "default"}}
    assert config_from_hf(write(tmp_path, {**phi, "partial_rotary_factor": 0.5})).rotary_dim == 8
    assert "no channel would turn" in refusal(tmp_path, {**phi, "partial_rotary_factor": 0.05})


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_quantized_weights_are_refused(tmp_path, key):
    assert "not quantized" in refusal(tmp_path, {key: {"quant_method": "gptq", "bits": 4}})


# Row 4


@pytest.mark.fault("model-folder-code")
def test_auto_map_is_refused_in_a_plain_sentence(tmp_path):
    message = refusal(tmp_path, {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}})
    assert "auto_map asks to run Python code" in message
    assert "never" in message


@pytest.mark.fault("model-folder-code")
@pytest.mark.parametrize("auto_map", [ABSENT, None, {"AutoConfig": "configuration_evil.Evil"}])
def test_custom_code_in_a_model_folder_is_never_imported(tmp_path, auto_map):
    for name in ("__init__", "configuration_evil", "modeling_evil", "tokenization_evil", "conftest"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    write(tmp_path, {"auto_map": auto_map})
    if isinstance(auto_map, dict):
        with pytest.raises(ModelError):
            config_from_hf(tmp_path)
    else:
        config_from_hf(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.fault("model-folder-code")
def test_code_that_is_a_copy_of_what_is_known_is_not_imported_and_not_missed(tmp_path):
    """As the folders of Phi-3, 3.5 and 4 mini have it (https://huggingface.co/microsoft/Phi-4-mini-instruct)."""
    phi = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    for name in ("configuration_phi3", "modeling_phi3"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    named = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    with_it = config_from_hf(write(tmp_path, {**phi, "auto_map": {**named, "AutoTokenizer": "Xenova/gpt-4o"}}))
    assert with_it == config_from_hf(write(tmp_path, phi))
    assert not (tmp_path / "ran").exists()
    for other in (
        {"AutoConfig": "configuration_phi3.OtherConfig"}, {"AutoModelForCausalLM": "modeling_phi3.LlamaForCausalLM"},
        {"AutoModelForCausalLM": ["modeling_phi3.Phi3ForCausalLM"]}, {"AutoModelForCausalLM": None}, "modeling_phi3", 1,
    ):  # fmt: skip
        assert "auto_map asks to run Python code" in refusal(tmp_path, {**phi, "auto_map": other})
    assert "auto_map asks" in refusal(tmp_path, {"model_type": "phi9", "architectures": ABSENT, "auto_map": named})


# generation_config.json


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [(2, 3, (2, 3)), ([2, 5], [5, 7], (2, 5, 7)), (None, [4], (4,)), (2, None, (2,)), ([], ABSENT, ())],
)
def test_generation_config_adds_end_ids(tmp_path, first, second, together):
    write(tmp_path, {"eos_token_id": first})
    write(tmp_path, {"eos_token_id": second}, "generation_config.json", base={})
    assert config_from_hf(tmp_path).eos_token_ids == together


@pytest.mark.parametrize("text", ["", "[2]", '{"eos_token_id": 3'])
def test_generation_config_that_is_not_json_adds_nothing(tmp_path, text):
    (write(tmp_path) / "generation_config.json").write_text(text)
    assert config_from_hf(tmp_path).eos_token_ids == (2,)


@pytest.mark.parametrize("value", [512, "2", [2, None], [[]], {"a": 1}])
def test_generation_config_with_a_wrong_end_id_is_refused(tmp_path, value):
    write(write(tmp_path), {"eos_token_id": value}, "generation_config.json", base={})
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id is"):
        config_from_hf(tmp_path)


words = st.sampled_from(["", "llama", "silu", "default", "rope_type", "rope_theta", "a\nb", "\ud800", "9" * 300])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(words, v, max_size=3))
interesting = st.sampled_from(
    [*LLAMA, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "auto_map"]
)


@pytest.mark.fault("config-values")
@given(st.dictionaries(interesting, values, max_size=3))
def test_any_json_value_anywhere_is_read_or_refused_in_one_line(tmp_path_factory, changes):
    folder = write(tmp_path_factory.getbasetemp(), changes)
    try:
        config = config_from_hf(folder)
    except ModelError as error:
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 2000
    else:
        assert config.num_attention_heads % config.num_key_value_heads == 0


# Rows 6, 7 and 13: the checks that every kind of file shares


@pytest.mark.fault("missing-tensors")
def test_missing_tensors_are_all_listed_at_once():
    expected = {f"layer.{i}": (4, 4) for i in range(30)}
    with pytest.raises(ModelError) as caught:
        check_tensors(expected, {"layer.3": (4, 4)}, "model.safetensors")
    message = str(caught.value)
    assert message.startswith("model.safetensors: 29 of 30 tensors missing: layer.0, layer.1, layer.2, layer.4,")
    assert message.endswith("layer.20 and 9 more")


@pytest.mark.fault("tensor-shapes")
def test_tensor_shape_unlike_the_config_names_both_shapes():
    with pytest.raises(ModelError) as caught:
        check_tensors({"a": (4, 8), "b": (4,), "c": (2,)}, {"a": (8, 4), "b": (4, 1), "c": (2,)}, "file")
    message = str(caught.value)
    assert "a is [8, 4] and should be [4, 8]" in message
    assert "b is [4, 1] and should be [4]" in message
    assert "c is" not in message


def test_missing_and_misshapen_tensors_come_in_one_error():
    with pytest.raises(ModelError, match=r"1 of 2 tensors missing: b; 1 with a shape .*a is \[1\] and should be \[2\]"):
        check_tensors({"a": (2,), "b": (2,)}, {"a": (1,)}, "file")


def test_tensors_that_fit_pass_and_extra_ones_are_ignored():
    check_tensors({"a": (2,)}, {"a": (2,), "rotary_emb.inv_freq": (8,)}, "file")


@pytest.mark.fault("nan-weights")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_nan_or_inf_weights_are_named_with_their_place(bad, dtype):
    array = np.zeros((3, 4), dtype)
    check_finite("w", array, "file")
    array[2, 1] = bad
    counts = "1 NaN and 0 infinite" if np.isnan(bad) else "0 NaN and 1 infinite"
    with pytest.raises(ModelError, match=rf"file: tensor w holds {counts} values, the first at \[2, 1\]"):
        check_finite("w", array, "file")


def test_an_empty_or_scalar_array_is_checked_too():
    check_finite("w", np.zeros((0, 4), np.float32), "file")
    with pytest.raises(ModelError, match=r"first at \[\]"):
        check_finite("w", np.array(np.nan, np.float32), "file")
