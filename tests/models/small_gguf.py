"""A small random Llama in a GGUF file, each matrix in any stored type that the gguf package can write."""

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

# Heads of 8 channels, which the cache fills up; a single KV head, whose rows end amid a block of 16; an odd vocabulary
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 64, 96, 2, 4, 1, 8, 97
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN), "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip


def tensors() -> dict[str, Float32]:
    """All weights, by Hugging Face's names and in its order of rows."""
    rng = np.random.default_rng(41)

    def normal(*shape: int) -> Float32:
        return np.float32(0.3) * rng.standard_normal(shape, np.float32)

    made = {f"{name}.weight": normal(VOCAB, HIDDEN) for name in ("model.embed_tokens", "lm_head")}
    made["model.norm.weight"] = 1 + normal(HIDDEN)
    for i in range(LAYERS):
        place = f"model.layers.{i}."
        made |= {f"{place}{name}_layernorm.weight": 1 + normal(HIDDEN) for name in ("input", "post_attention")}
        for name, shape in SHAPES.items():
            made[f"{place}{name}.weight"] = normal(*shape)
            if name.startswith("self_attn"):
                made[f"{place}{name}.bias"] = normal(shape[0])
    return made


def stored(values: Float32, type_name: str) -> NDArray[np.uint8]:
    """The bytes of rows in a stored type."""
    return quantize(np.ascontiguousarray(values), GGMLQuantizationType[type_name])


def read_back(values: Float32, type_name: str) -> Float32:
    """What a stored type makes of values, by the gguf package."""
    kind = GGMLQuantizationType[type_name]
    return dequantize(quantize(np.ascontiguousarray(values), kind), kind)


def file_name(name: str) -> str:
    """llama.cpp's name of a tensor, by the gguf package's own table."""
    stem, kind = name.rsplit(".", 1)
    return f"{gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS).get_name(stem)}.{kind}"


def rotary_order(rows: int, heads: int) -> list[int]:
    """Which row llama.cpp has at each place: the two rows of a pair, half a head apart, become neighbours."""
    half = rows // heads // 2
    return [
        head * 2 * half + pair + half * second for head in range(heads) for pair in range(half) for second in (0, 1)
    ]


def write_model(
    path: Path,
    types: Mapping[str, str] | str,
    change: Callable[[str, NDArray[np.generic]], None] | None = None,
) -> Path:
    """Write the model. ``types``: of every matrix, or of those whose name ends so; ``change`` may alter stored bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(chr(code) for code in range(33, 126)), "AB"])
    writer.add_token_types([3, 3, 3] + [1] * 94)
    writer.add_token_merges(["A B"])
    writer.add_eos_token_id(2)
    for name, values in tensors().items():
        heads = HEADS if ".q_proj" in name else KV_HEADS if ".k_proj" in name else 0
        raw: NDArray[np.generic] = values[rotary_order(len(values), heads)] if heads else values
        kind = type_of(name, types)
        if raw.ndim == 2:
            raw = stored(raw, kind)
        if change is not None:
            change(name, raw)
        writer.add_tensor(file_name(name), raw, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def type_of(name: str, types: Mapping[str, str] | str) -> str:
    """The stored type of a tensor; what is no matrix is float32."""
    if not name.endswith(".weight") or "norm" in name:
        return "F32"
    if isinstance(types, str):
        return types
    return next(kind for end, kind in types.items() if name.endswith(end))
