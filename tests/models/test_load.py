"""Loading: every kind of model gives the logits it should, and what does not fit together is refused by name."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import mixkv
from mixkv import CachePolicy, Session
from mixkv.engine.generate import generate
from mixkv.kernels.weights import WBF16
from mixkv.models.bpe import BPETokenizer
from mixkv.models.errors import ModelError, UsageError
from mixkv.models.hf_tokenizer import hf_tokenizer
from mixkv.models.load import Model, load, open_model
from mixkv.models.names import expected_tensors
from mixkv.models.toy import CONFIG

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


# --- what loads ---------------------------------------------------------------------------------------------------


def test_a_folder_without_a_tokenizer_takes_and_gives_ids(expected: NDArray[np.float32]) -> None:
    model = load(str(TINY_LLAMA))
    assert model.tokenizer is None and not model.has_chat_template
    assert expected.shape == (60, 97)
    for call in (lambda: model.encode("text"), lambda: model.encode_chat([{"role": "user", "content": "text"}])):
        with pytest.raises(UsageError, match=r"has no (tokenizer|chat template)"):
            call()
    assert len(list(mixkv.generate(Session(model), [5, 6], max_tokens=3))) >= 1


def test_the_toy_model_is_the_same_every_time() -> None:
    one, two = mixkv.load("toy"), mixkv.load("toy")
    ids = one.encode("Hello")
    assert ids == list(b"Hello")
    assert np.array_equal(Session(one).forward(ids), Session(two).forward(ids))
    assert one.config == CONFIG and one.name == "toy"


def test_progress_counts_the_layers_and_reaches_the_end() -> None:
    done: list[tuple[int, int]] = []
    load(str(TINY_LLAMA), progress=lambda *step: done.append(step))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_folder_is_found_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(TINY_LLAMA, tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert load("~/model").config.vocab_size == 97


@pytest.mark.fault("bfloat16")
def test_a_bfloat16_folder_gives_the_logits_of_its_rounded_weights(folder: Callable[[Change], str]) -> None:
    """Fault row 12. The same weights, rounded beforehand and stored as float32, must give the same bits in float32.

    Kept in bfloat16, they are multiplied by other kernels, which round otherwise.
    """

    def narrow(tensors: Tensors, config: dict[str, Any]) -> None:
        config["dtype"] = "bfloat16"
        tensors |= {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}

    def rounded(tensors: Tensors, _: dict[str, Any]) -> None:
        tensors |= {name: x.astype(ml_dtypes.bfloat16).astype(np.float32) for name, x in tensors.items()}

    path = folder(narrow)
    model = load(path, "f32")
    assert all(x.weight.dtype == np.float32 for x in model.transformer.weights.linears())
    found = logits(model)
    packed = load(path)
    assert {part.kind for x in packed.transformer.weights.linears() for part in x.parts} == {WBF16}
    np.testing.assert_allclose(logits(packed), found, rtol=0, atol=1e-4)
    assert np.array_equal(found, logits(load(folder(rounded))))


@pytest.mark.fault("bfloat16")
def test_bfloat16_is_read_where_ml_dtypes_has_not_been_imported(
    folder: Callable[[Change], str], clean_env: dict[str, str]
) -> None:
    """In a process of its own: nothing but the reader may have registered the dtype."""

    def narrow(tensors: Tensors, _: dict[str, Any]) -> None:
        tensors |= {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}

    taken = "mixkv.load(sys.argv[1]).transformer.weights.embedding.take(np.arange(3))"
    program = f"import mixkv, numpy as np, sys; print({taken}.dtype)"
    done = subprocess.run(
        [sys.executable, "-c", program, folder(narrow)], env=clean_env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "float32\n"


def test_a_tied_head_is_the_embedding_and_is_held_once(folder: Callable[[Change], str]) -> None:
    def tie(tensors: Tensors, config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = True
        del tensors["lm_head.weight"]

    def copy(tensors: Tensors, _: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    tied = load(folder(tie))
    assert tied.transformer.weights.head.weight is tied.transformer.weights.embedding.weight
    found = logits(tied)
    untied = load(folder(copy))
    assert untied.transformer.weights.head.weight is not untied.transformer.weights.embedding.weight
    assert np.array_equal(found, logits(untied))


@pytest.mark.parametrize("times", [1, 2])
def test_a_head_in_the_file_of_a_tied_model_counts_if_it_is_no_copy(
    times: int, folder: Callable[[Change], str]
) -> None:
    """As transformers 5 does; before that, it took the embedding."""

    def tie(tensors: Tensors, config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = True
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * times

    model = load(folder(tie))
    assert (model.transformer.weights.head.weight is model.transformer.weights.embedding.weight) == (times == 1)


def test_an_untied_head_is_read(expected: NDArray[np.float32], folder: Callable[[Change], str]) -> None:
    def double(tensors: Tensors, _: dict[str, Any]) -> None:
        tensors["lm_head.weight"] *= 2

    assert np.array_equal(logits(load(folder(double))), 2 * expected)


@pytest.mark.parametrize("kind", ["q", "k", "v", "o"])
def test_biases_take_part_where_the_config_says_so(
    expected: NDArray[np.float32], folder: Callable[[Change], str], kind: str
) -> None:
    name = f"model.layers.1.self_attn.{kind}_proj.bias"

    def without(tensors: Tensors, _: dict[str, Any]) -> None:
        assert tensors[name].any()
        tensors[name][:] = 0

    assert np.abs(logits(load(folder(without))) - expected).max() > 0.01


def test_a_tensor_that_the_config_has_no_role_for_is_refused(folder: Callable[[Change], str]) -> None:
    """Leaving it out would silently compute something else: a bias without the config's word, a norm of another family."""

    def unasked(_: Tensors, config: dict[str, Any]) -> None:
        config["attention_bias"] = False

    def foreign(tensors: Tensors, _: dict[str, Any]) -> None:
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(16, np.float32)

    for change, name in ((unasked, "model.layers.2.self_attn.o_proj.bias"), (foreign, "q_norm")):
        with pytest.raises(ModelError, match=f"without a role in this config: .*{name}"):
            load(folder(change))


def test_biases_of_the_mlp_take_part_where_the_config_says_so(
    expected: NDArray[np.float32], folder: Callable[[Change], str]
) -> None:
    def biased(tensors: Tensors, config: dict[str, Any]) -> None:
        config["mlp_bias"] = True
        for layer in range(3):
            for name, rows in (("gate", 80), ("up", 80), ("down", 48)):
                tensors[f"model.layers.{layer}.mlp.{name}_proj.bias"] = np.zeros(rows, np.float32)

    path = folder(biased)
    assert np.array_equal(logits(load(path)), expected)
    tensors = load_file(Path(path) / "model.safetensors")
    for name in ("gate", "up", "down"):
        changed = {
            **tensors,
            f"model.layers.2.mlp.{name}_proj.bias": tensors[f"model.layers.2.mlp.{name}_proj.bias"] + 1,
        }
        save_file(changed, Path(path) / "model.safetensors")
        assert np.abs(logits(load(path)) - expected).max() > 0.01


def test_every_expected_tensor_is_in_the_file_and_nothing_else() -> None:
    opened = open_model(str(TINY_LLAMA))
    assert expected_tensors(opened.config) == dict(opened.source.shapes)
    assert opened.config.num_attention_heads * opened.config.head_dim != opened.config.hidden_size


# --- GGUF ---------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def permuted(x: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a rotary projection as llama.cpp wants them: row j and row j + half of a head become neighbours."""
    half = len(x) // heads // 2
    order = [
        head * 2 * half + pair + second * half for head in range(heads) for pair in range(half) for second in (0, 1)
    ]
    return x[order]


def write_gguf(path: Path, tied: bool = False, special: Sequence[str] = ()) -> None:
    """tiny_llama as a GGUF file in float32, with a byte-level vocabulary of 97 tokens; ``special`` ones from id 3 on."""
    config = json.loads((TINY_LLAMA / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(97)
    letters = [*special, *(chr(code) for code in range(33, 126 - len(special)))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, "AB"])
    writer.add_token_types([3] * (3 + len(special)) + [1] * (94 - len(special)))
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, x in load_file(TINY_LLAMA / "model.safetensors").items():
        if tied and name == "lm_head.weight":
            continue
        heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}.get(
            name.rpartition("_proj.")[0][-1:] if "self_attn" in name else ""
        )
        writer.add_tensor(gguf_name(name), permuted(x, heads) if heads else x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_tiny_llama_as_a_gguf_file_gives_the_same_logits(tmp_path: Path, expected: NDArray[np.float32]) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    model = load(str(path))
    theirs = load(str(TINY_LLAMA))
    assert model.config.eos_token_ids == (2,) and model.config.rope.theta == 5000
    assert model.tokenizer is not None and model.encode("BAAB") == [36, 35, 96]
    for ours, other in zip(model.transformer.weights.linears(), theirs.transformer.weights.linears(), strict=True):
        assert np.array_equal(ours.weight, other.weight)
        assert (ours.bias is None) == (other.bias is None)
        assert ours.bias is None or np.array_equal(ours.bias, other.bias)
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-5)


def test_an_answer_ends_at_a_token_of_the_file_that_only_its_name_tells(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", special=["<end_of_turn>", "<|endoftext|>", "<|other|>"])
    model = load(str(tmp_path / "tiny.gguf"))
    assert model.config.eos_token_ids == (2, 3, 4)

    class Ends(Session):
        def forward(self, *arguments: Any, **options: Any) -> NDArray[np.float32]:
            super().forward(*arguments, **options)
            return np.eye(97, dtype=np.float32)[3]

    assert [(t.id, t.text, t.finish_reason) for t in generate(Ends(model), [40])] == [(3, "", "stop")]


def test_the_ends_that_a_folder_names_are_all_of_its_files(tmp_path: Path) -> None:
    shutil.copytree(TINY_LLAMA, tmp_path / "folder")
    write_gguf(tmp_path / "tiny.gguf")
    tokenizer = open_model(str(tmp_path / "tiny.gguf")).read_tokenizer()
    assert isinstance(tokenizer, BPETokenizer)
    for name, content in hf_tokenizer(tokenizer, 64).items():
        (tmp_path / "folder" / name).write_text(json.dumps(content))
    config = json.loads((TINY_LLAMA / "config.json").read_text()) | {"eos_token_id": 7}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    (tmp_path / "folder" / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load(str(tmp_path / "folder")).config.eos_token_ids == (7, 5, 6, 2)


def test_a_gguf_file_without_a_head_is_tied(tmp_path: Path) -> None:
    path = tmp_path / "tied.gguf"
    write_gguf(path, tied=True)
    model = load(str(path))
    assert model.config.tie_word_embeddings
    assert model.transformer.weights.head.weight is model.transformer.weights.embedding.weight
