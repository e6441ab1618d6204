"""The tensors of a GGUF file under Hugging Face's names, their rows in Hugging Face's order, experts one by one.

Names of the file: constants.py of ggml's ``gguf`` package. The order of rotary rows: see `unpermute_heads`.
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
from .config import ModelConfig
from .errors import ModelError
from .gguf import GGUFFile, GGUFTensor
from .gguf_config import rows_are_permuted
from .names import expert_name, gate_up_names, norm_names

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_FACTORS = {"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"}  # are part of the config
_BLOCK_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.([a-z_]+)\.(weight|bias)")
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}


def _block_names(config: ModelConfig) -> dict[str, str]:
    """What the tensors of a block are called, without the ending."""
    norms = norm_names(config)
    names = {
        "attn_norm": norms.get("attention_in"),
        "ffn_norm": norms.get("mlp_in"),
        "post_attention_norm": norms.get("attention_out", norms.get("mlp_in")),  # gpt-oss has it before its experts
        "post_ffw_norm": norms.get("mlp_out"),
        "attn_output": "self_attn.o_proj",
        "ffn_down": "mlp.down_proj",
    }
    if config.architecture == "gpt_oss":
        del names["ffn_norm"]
    elif not config.post_norms:
        del names["post_attention_norm"]
    if config.fused_projections:
        names |= {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
    else:
        names |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"}
        names |= dict(zip(("ffn_gate", "ffn_up"), gate_up_names(config), strict=True))
    if config.qk_norm != "none":
        names |= {f"attn_{part}_norm": f"self_attn.{part}_norm" for part in "qk"}
    if config.num_experts:
        names["ffn_gate_inp"] = "mlp.gate"
    return {name: own for name, own in names.items() if own is not None}


class GGUFSource:
    """The tensors of a GGUF file under Hugging Face's names, their rows in Hugging Face's order.

    ``shapes`` and ``stored_types`` ("Q4_1", ...) are by those names; ``nbytes`` counts all tensors as stored.
    """

    shapes: Mapping[str, tuple[int, ...]]
    stored_types: Mapping[str, str]
    nbytes: int

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        """Raises ModelError for tensors without a role in such a model, or rotary ones unlike ``config``."""
        self._file = file
        try:
            self._stored, unknown = _renamed(file.tensors, config)
        except ModelError as error:
            raise ModelError(f"{file.path}: {error}") from None
        if unknown:
            raise ModelError(
                f"{file.path}: tensors that a model of the kind {config.architecture} does not have: "
                f"{listed(map(shown, unknown))}"
            )
        self._heads: dict[str, int] = {}
        permuted = rows_are_permuted(file)
        for name, tensor in self._stored.items():
            heads = _rotary_heads(name, config) if permuted else 0
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
        values = self._file.read(self._stored[name])
        heads = self._heads[name]
        return unpermute_heads(values, heads) if heads else values

    def stored(self, name: str) -> Stored:
        """Tensor ``name`` as the file holds it, where the kernels know the format; else float32."""
        tensor = self._stored[name]
        coded = self._file.codes(tensor)
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
        self._file.forget(self._stored[name])


def unpermute_heads(values: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows (heads * head_dim, ...) from llama.cpp's rotary order to Hugging Face's.

    Rotary embedding turns pairs of rows of a head. llama.cpp keeps the two of a pair next to each other, Hugging Face
    half a head apart; llama.cpp's convert_hf_to_gguf.py goes from the second to the first, and this goes back.
    """
    pairs = values.reshape(
        heads, values.shape[0] // heads // 2, 2, *values.shape[1:]
    )  # (heads, pair, which of it, ...)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _renamed(tensors: Mapping[str, GGUFTensor], config: ModelConfig) -> tuple[dict[str, GGUFTensor], list[str]]:
    """The tensors under Hugging Face's names, and the names that have none; ModelError where two have one name."""
    stored: dict[str, GGUFTensor] = {}
    unknown: list[str] = []
    names = _block_names(config)
    for name, tensor in tensors.items():
        match = _BLOCK_NAME.fullmatch(name)
        prefix, part, kind = (f"model.layers.{match[1]}.", match[2], match[3]) if match else ("", "", "")
        within = match is not None and int(match[1]) < config.num_hidden_layers
        found = {}
        if within and part in _EXPERTS and tensor.shape[0] == config.num_experts:
            for i, expert in enumerate(tensor.parts()):
                found[f"{prefix}{expert_name(i, _EXPERTS[part])}.{kind}"] = expert
        elif within and part in names:
            found[f"{prefix}{names[part]}.{kind}"] = tensor
        elif within and part == "attn_sinks" and config.sink_logits:
            found[f"{prefix}self_attn.sinks"] = tensor
        elif name in _NAMES:
            found[_NAMES[name]] = tensor
        elif name not in _FACTORS:
            unknown.append(name)
        if twice := found.keys() & stored.keys():
            raise ModelError(f"{shown(stored[min(twice)].name)} and {shown(name)} are both {min(twice)}")
        stored |= found
    return stored, unknown


def _rotary_heads(name: str, config: ModelConfig) -> int:
    """How many heads the rows of tensor ``name`` are, or 0 if rotary embedding does not turn them."""
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else 0
