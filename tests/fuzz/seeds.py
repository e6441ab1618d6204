"""Small valid files to begin with, one function for each reader: (suffix of the file's name, its bytes)."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.numpy import save

from mixkv.engine.policy import CachePolicy
from mixkv.engine.session import Session
from mixkv.experiments.golden.file import text_of
from mixkv.models.config import ModelConfig
from mixkv.models.load import Model
from mixkv.models.names import expected_tensors

from ..experiments.golden.test_golden_file import GOLDEN
from ..experiments.report.make_results import make
from ..models.small_gguf import file_name
from ..models.test_gguf_architectures import WITHOUT, write
from ..models.tiny_models import FOLDER, NAMES

DATA = Path(__file__).parents[1] / "data"
TEMPLATES = sorted((DATA / "chat_templates").glob("*.jinja"))
TINY_LLAMA = DATA / "tiny_llama"
SHAPE = ModelConfig(
    architecture="llama", vocab_size=14, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
)  # fmt: skip
POLICIES = [
    "k4v4:window=8", "sinks=2 recent=0:f32 tile=32 old=k2c/v2t rollback=40", "bf16", "full",
    "sinks=1 recent=4:f16 tile=32 old=40:k8t/v8c old=k3c/v16 rot=none scales=range",
    "sinks=3 recent=20:bf16 old=k2t/v4c layers=1..2[old=k8c/v32]",
]  # fmt: skip


def _model(path: Path, kind: str, template: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(SHAPE.max_position_embeddings)
    writer.add_embedding_length(SHAPE.hidden_size)
    writer.add_block_count(SHAPE.num_hidden_layers)
    writer.add_feed_forward_length(SHAPE.intermediate_size)
    writer.add_head_count(SHAPE.num_attention_heads)
    writer.add_head_count_kv(SHAPE.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(
        ["<unk>", "<s>", "</s>", "h", "e", "l", "o", "1", "\u0120", "he", "ll", "hell", "<0x0A>", "<im>"]
    )
    writer.add_token_types([2, 3, 3, *[1] * 9, 6, 4])
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(template)
    writer.add_array("numbers", [0.5, 2.0])
    rng = np.random.default_rng(3)
    for name, shape in expected_tensors(SHAPE).items():
        values = rng.standard_normal(shape, np.float32)
        one = GGMLQuantizationType[kind if len(shape) == 2 else "F32"]
        writer.add_tensor(file_name(name), quantize(values, one) if len(shape) == 2 else values, raw_dtype=one)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_files() -> Iterator[bytes]:
    """Whole models of one layer, their matrices in one stored type each; and one of every architecture."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        for i, kind in enumerate(("Q8_0", "Q4_0", "Q4_1", "Q5_0", "F16", "BF16", "F32")):
            _model(path, kind, TEMPLATES[i].read_text())
            yield path.read_bytes()
        for name in NAMES:
            if name not in WITHOUT:
                write(name, path)
                yield path.read_bytes()


def session_files(model: Model) -> Iterator[bytes]:
    """Sessions of toy with codes of all kinds, wide scales, tiers, overrides; chats and raw texts."""
    ids = np.random.default_rng(1).integers(0, 256, 120)
    messages = json.dumps([{"role": "user", "content": "é"}, {"role": "assistant", "content": "yes"}])
    added = [
        {"mode": "raw"}, {"mode": "chat", "messages": messages}, {"mode": "raw", "text": '{"read":3,"rest":[1,2]}'}, {},
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        for i, policy in enumerate(POLICIES):
            session = Session(model, CachePolicy.parse(policy), context=256)
            session.forward(ids[: (120, 70, 3, 40, 110, 90)[i]], None)
            session.save(path, added[i % 4])
            yield path.read_bytes()
            if i in (1, 4):  # as if numbers beyond float16 had come
                layer, tier = session.cache.layers[2], session.cache.layers[0].tiers[0]
                layer.widen_dense()
                tier.widen(tier.first, 0)
                for scales in tier.wide_scales().values():
                    scales[:] = 0.5
                session.save(path)
                yield path.read_bytes()


def safetensors_files() -> Iterator[bytes]:
    """One file of each type that is read, and the tensors of a tiny model."""
    for dtype in (np.float32, np.float16, np.float64, ml_dtypes.bfloat16):
        yield save({"a": np.arange(6).reshape(2, 3).astype(dtype), "b": np.zeros((0, 4), dtype)}, {"format": "pt"})


def configs() -> Iterator[bytes]:
    """config.json of a tiny model of every architecture, and one with what else it may say."""
    for name in NAMES:
        yield (FOLDER / name / "config.json").read_bytes()
    plain = json.loads((TINY_LLAMA / "config.json").read_text())
    more = {"head_dim": 16, "rope_scaling": None, "attention_bias": True, "eos_token_id": [1, 2]}
    yield json.dumps({**plain, **more}).encode()


def tokenizers() -> Iterator[bytes]:
    """tokenizer.json: byte-level BPE, and one in SentencePiece's manner."""
    vocab = {"<s>": 0, "</s>": 1, "he": 2, "\u2581": 3}
    for token in [*map(chr, range(33, 324)), *(f"<0x{byte:02X}>" for byte in range(256))]:
        vocab.setdefault(token, len(vocab))
    model = {"type": "BPE", "vocab": vocab, "merges": [["h", "e"]], "byte_fallback": False, "unk_token": None}
    added = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for i, text in enumerate(("<s>", "</s>"))
    ]  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": False}
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None, "decoder": level,
        "model": model,
    }  # fmt: skip
    yield json.dumps(whole).encode()
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }  # fmt: skip
    pieces = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}  # fmt: skip
    prepend = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}  # fmt: skip
    yield json.dumps({
        **whole, "normalizer": prepend, "pre_tokenizer": None, "post_processor": template, "decoder": pieces,
        "model": {**model, "byte_fallback": True, "fuse_unk": True},
    }).encode()  # fmt: skip


def templates() -> Iterator[bytes]:
    """Published chat templates, and expressions that use much of the language."""
    for path in TEMPLATES:
        yield path.read_bytes()
    yield (
        b"{% macro f(x, y=2) %}{{ x ~ y }}{% endmacro %}{% for m in messages if m.role == 'user' %}{{ f(m.content|trim) }}"
        b"{% endfor %}"
    )
    yield b"{% set n = namespace(a=[1, 2]) %}{% set n.a = n.a + [3] %}{{ n.a|join(',') }}{{ '%s' % messages[0].role[:3] }}"
    yield b"{{ messages|tojson }}{{ messages|map(attribute='role')|list|length }}{{ range(3)|sum }}{{ 2 ** 9 // 3 }}"


def policies() -> Iterator[bytes]:
    """Policies in a line, by name and as TOML."""
    for text in POLICIES:
        yield text.encode()
        yield CachePolicy.parse(text).to_toml().encode()


def golden_files() -> Iterator[bytes]:
    """One golden file with everything in it."""
    yield text_of(GOLDEN).encode()


def results() -> Iterator[bytes]:
    """A row of each kind."""
    kinds = {row.get("kind", "bench"): row for row in make(1)}
    yield from (json.dumps(row).encode() + b"\n" for row in kinds.values())
    yield b"".join(json.dumps(row).encode() + b"\n" for row in kinds.values())
