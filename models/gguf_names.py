"""A GGUF file of the Llama architecture as the transformer sees it: its configuration and Hugging Face's tensor names.

Keys and names of the file: docs/gguf.md of the ggml project. The order of rotary rows: see `unpermute_heads`.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..kernels.weights import Stored
from .check import listed, shown
from .config import ARCHITECTURES, ModelConfig
from .errors import ModelError
from .gguf import GGUFFile, GGUFTensor

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.([a-z_]+)\.(weight|bias)")
_EMBEDDING = "token_embd.weight"
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")

# Keys that change the computation in ways we do not follow, with the values that leave it as it is.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (1.0,),
}


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """The dimensions and choices of the model in ``file``; the architecture must be "llama".

    Raises ModelError, naming the file, the key, what was found and what is allowed.
    """
    architecture = file.expect("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{file.path}: general.architecture is {shown(architecture)}, supported: {', '.join(ARCHITECTURES)}"
        )
    _refuse_unsupported(file)
    heads = file.expect("llama.attention.head_count", int)
    kv_heads = file.optional("llama.attention.head_count_kv", int)
    rope_theta = file.optional("llama.rope.freq_base", float)
    end_ids = [file.optional(f"tokenizer.ggml.{key}", int) for key in _END_IDS]
    fields: dict[str, Any] = {
        "vocab_size": _vocab_size(file),
        "hidden_size": file.expect("llama.embedding_length", int),
        "intermediate_size": file.expect("llama.feed_forward_length", int),
        "num_hidden_layers": file.expect("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": _head_dim(file, heads),
        "max_position_embeddings": file.expect("llama.context_length", int),
        "rms_norm_eps": file.expect("llama.attention.layer_norm_rms_epsilon", float),
        "rope_theta": 10_000.0 if rope_theta is None else rope_theta,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "bos_token_id": file.optional("tokenizer.ggml.bos_token_id", int),
        "eos_token_ids": tuple(dict.fromkeys(token for token in end_ids if token is not None)),
    }
    try:
        return ModelConfig(architecture=architecture, **fields)
    except ModelError as error:
        raise ModelError(f"{file.path}: {error}") from None


class GGUFSource:
    """The tensors of a GGUF file under Hugging Face's Llama names, their rows in Hugging Face's order.

    ``shapes`` and ``stored_types`` ("Q4_1", ...) are by those names; ``nbytes`` counts all tensors as stored.
    """

    shapes: Mapping[str, tuple[int, ...]]
    stored_types: Mapping[str, str]
    nbytes: int

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        """Raises ModelError for tensors without a role in a Llama model, or rotary ones unlike ``config``."""
        self._file = file
        self._stored, unknown = _renamed(file.tensors, config.num_hidden_layers)
        if unknown:
            raise ModelError(f"{file.path}: tensors that a Llama model does not have: {listed(map(shown, unknown))}")
        self._heads: dict[str, int] = {}
        for name, tensor in self._stored.items():
            heads = _rotary_heads(name, config)
            if heads and tensor.shape[0] != heads * config.head_dim:
                raise ModelError(
                    f"{file.path}: {tensor.name} has the shape {tensor.shape}, "
                    f"expected {heads * config.head_dim} rows: {heads} heads of {config.head_dim}"
                )
            self._heads[name] = heads
        self.shapes = MappingProxyType({name: tensor.shape for name, tensor in self._stored.items()})
        self.stored_types = MappingProxyType({name: tensor.type_name for name, tensor in self._stored.items()})
        self.nbytes = sum(tensor.nbytes for tensor in self._stored.values())

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """The values of tensor ``name``: float32, C order, of the shape in ``shapes``, owned by the caller.

        Safe to call from several threads. Raises ModelError if there is no such tensor.
        """
        if name not in self._stored:
            raise ModelError(f"{self._file.path}: there is no tensor for {shown(name)}")
        values = self._file.read(self._stored[name].name)
        heads = self._heads[name]
        return unpermute_heads(values, heads) if heads else values

    def stored(self, name: str) -> Stored:
        """Tensor ``name`` as the file holds it, where the kernels know the format; else float32."""
        tensor = self._stored[name]
        coded = self._file.blocks(tensor.name)
        if coded is None:
            values = self.read(name)
            dtype = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}.get(tensor.type_name)
            with np.errstate(invalid="ignore"):  # NaN stays NaN
                return values if dtype is None else values.astype(dtype)
        if self._heads[name]:
            order = unpermute_heads(np.arange(tensor.shape[0]), self._heads[name])
            coded = coded.take(order)
        return coded

    def forget(self, name: str) -> None:
        """Give back the memory that reading a tensor took up."""
        self._file.forget(self._stored[name].name)


def unpermute_heads(values: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows (heads * head_dim, ...) from llama.cpp's rotary order to Hugging Face's.

    Rotary embedding turns pairs of rows of a head. llama.cpp keeps the two of a pair next to each other, Hugging Face
    half a head apart; llama.cpp's convert_hf_to_gguf.py goes from the second to the first, and this goes back.
    """
    pairs = values.reshape(
        heads, values.shape[0] // heads // 2, 2, *values.shape[1:]
    )  # (heads, pair, which of it, ...)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _renamed(tensors: Mapping[str, GGUFTensor], layers: int) -> tuple[dict[str, GGUFTensor], list[str]]:
    """The tensors under Hugging Face's names, and the names that have none."""
    stored: dict[str, GGUFTensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        new_name = _NAMES.get(name)
        match = _BLOCK_NAME.fullmatch(name)
        if match and int(match[1]) < layers and match[2] in _BLOCK_NAMES:
            new_name = f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"
        if new_name is None:
            unknown.append(name)
        else:
            stored[new_name] = tensor
    return stored, unknown


def _rotary_heads(name: str, config: ModelConfig) -> int:
    """How many heads the rows of tensor ``name`` are, or 0 if rotary embedding does not turn them."""
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else 0


def _refuse_unsupported(file: GGUFFile) -> None:
    for key, neutral in _NEUTRAL.items():
        value: Any = file.metadata.get(f"llama.{key}", neutral[0])
        if value not in neutral:
            allowed = " or ".join(map(repr, neutral))
            raise ModelError(f"{file.path}: llama.{key} is {shown(value)}, supported: {allowed}")
    if "rope_freqs.weight" in file.tensors:
        raise ModelError(f"{file.path}: rope_freqs.weight scales the rotary frequencies, supported: files without it")
    parts = file.optional("split.count", int)
    if parts is not None and parts > 1:
        raise ModelError(f"{file.path}: split.count is {parts}, supported: 1; join the parts with llama-gguf-split")


def _vocab_size(file: GGUFFile) -> int:
    embedding = file.tensors.get(_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        found = "there is none" if embedding is None else f"its shape is {embedding.shape}"
        raise ModelError(f"{file.path}: {_EMBEDDING} must be a matrix with a row for each token, but {found}")
    rows = embedding.shape[0]
    tokens = file.optional("tokenizer.ggml.tokens", list[str])
    if tokens is not None:
        size, where = len(tokens), "tokenizer.ggml.tokens has"
    else:
        declared = file.optional("llama.vocab_size", int)
        size, where = rows if declared is None else declared, "llama.vocab_size says"
    if size != rows:
        raise ModelError(f"{file.path}: {where} {size} tokens, but {_EMBEDDING} has {rows} rows; they must agree")
    return size


def _head_dim(file: GGUFFile, heads: int) -> int:
    """The size of a head: stated, or the hidden size by the heads; queries, values and rotation must share it."""
    hidden = file.expect("llama.embedding_length", int)
    head_dim = file.optional("llama.attention.key_length", int)
    if head_dim is None:
        if heads < 1 or hidden % heads:
            raise ModelError(
                f"{file.path}: llama.embedding_length is {hidden} and llama.attention.head_count is {heads}; without "
                f"llama.attention.key_length the first must be a multiple of the second"
            )
        head_dim = hidden // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        other = file.optional(f"llama.{key}", int)
        if other is not None and other != head_dim:
            raise ModelError(f"{file.path}: llama.{key} is {other}, supported: the size of a head, {head_dim}")
    return head_dim
