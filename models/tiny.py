"""Tiny random models of every supported architecture, for tests: made on the fly, the same on every machine."""

from dataclasses import fields, replace
from typing import Any

from . import toy
from .check import shown
from .config import ARCHITECTURES, ModelConfig
from .errors import UsageError
from .limits import MAX_TINY_SEED
from .load import Model, read_weights
from .names import expected_tensors
from .pack import check_weights_option
from .tokenizer import ByteTokenizer
from .transformer import Transformer


def tiny_model(
    architecture: str = "llama", seed: int = 0, *, weights: str = "q8", key_bias: float = 0, **config: Any
) -> Model:
    """A tiny random model: three layers, 64 wide, unless ``config`` says otherwise.

    Its tokenizer knows bytes, beginning and end of text, and so it has 258 tokens; with a smaller ``vocab_size`` it has no
    tokenizer and no such tokens. Every argument that differs makes other numbers.

    Args:
        architecture: one of models/config.py ``ARCHITECTURES``.
        seed: of the weights, from 0 to 2^32 - 1.
        weights: how they are kept, as for ``load``. With codes, bits depend neither on threads nor on chunks.
        key_bias: what is added to the biases of four channels of each layer's keys, where keys have biases; those of Qwen 2
            have such channels, beside which codes of few bits cannot hold the others.
        config: fields of ``ModelConfig``: num_hidden_layers=1, rope=Rope(theta=50_000.0), ...

    Raises:
        UsageError: an architecture, a seed, a weight format or a field that there is not.
        ModelError: a field out of its range.

    """
    if architecture not in ARCHITECTURES:
        raise UsageError(f"architecture must be one of {', '.join(ARCHITECTURES)}, found {shown(architecture)}")
    if type(seed) is not int or not 0 <= seed <= MAX_TINY_SEED:
        raise UsageError(f"seed must be a whole number from 0 to {MAX_TINY_SEED}, found {shown(seed)}")
    known = {field.name for field in fields(ModelConfig)} - {"architecture"}
    if strange := config.keys() - known:
        raise UsageError(f"a field of the config must be one of {', '.join(sorted(known))}, found {min(strange)}")
    check_weights_option(weights)
    size = config.get("vocab_size", toy.VOCAB)
    has_text = not isinstance(size, int) or size >= toy.VOCAB  # what is no number, the config refuses
    textless: dict[str, Any] = {} if has_text else {"bos_token_id": None, "eos_token_ids": ()}
    made = replace(toy.CONFIG, architecture=architecture, **(textless | config))
    source = toy.ToySource(expected_tensors(made), seed, key_bias=key_bias)
    transformer = Transformer(made, read_weights(made, source, weights))
    return Model(f"tiny {architecture}", made, transformer, ByteTokenizer(made.vocab_size) if has_text else None)
