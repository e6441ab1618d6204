"""``toy``: a tiny random transformer with a byte tokenizer. It needs no file, and every command runs on it offline."""

import zlib

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig

Float32 = NDArray[np.float32]

VOCAB = 258  # 256 bytes, beginning and end of text
BOS, EOS = 256, 257
CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=16_384,
    bos_token_id=BOS,
    eos_token_ids=(EOS,),
)


class ToySource:
    """Weights drawn from a generator seeded by each tensor's name: the same on every machine and in every order.

    With a ``seed`` of its own a source draws others than toy's, and norms from 0.5 to 1.5 instead of ones. ``key_bias`` is
    added to four biases of the keys of each layer.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int | None = None, *, key_bias: float = 0) -> None:
        self.shapes, self._seed, self._key_bias = shapes, seed, key_bias
        self.stored_types = dict.fromkeys(shapes, "F32")
        self.nbytes = sum(4 * int(np.prod(shape)) for shape in shapes.values())

    def read(self, name: str) -> Float32:
        """One tensor. Rows of the output head that are not printable ASCII are zero, so that what it says can be read."""
        shape, own = self.shapes[name], zlib.crc32(name.encode())
        generator = np.random.default_rng(own if self._seed is None else [own, self._seed])
        if name.endswith("norm.weight"):
            return np.ones(shape, np.float32) if self._seed is None else generator.uniform(0.5, 1.5, shape).astype("f4")
        weight = generator.standard_normal(shape, np.float32) * np.float32(1.5 * shape[-1] ** -0.5)
        if self._key_bias and name.endswith("k_proj.bias"):
            weight[generator.choice(len(weight), 4, replace=False)] += np.float32(self._key_bias)
        if name == "lm_head.weight":
            weight[:32] = weight[127:] = 0
        if name == "model.embed_tokens.weight":
            weight *= np.float32(8)  # no layer drowns out the token itself
        return weight

    def stored(self, name: str) -> Float32:
        """One tensor, as ``read`` gives it."""
        return self.read(name)

    def forget(self, name: str) -> None:
        """Nothing to do: what was read is made on the fly."""
