"""A session that predicts what it is told."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixkv import Session
from mixkv.models.load import Model

Float32 = NDArray[np.float32]


class Told(Session):
    """A session that predicts what it is told: logits (T, V), or a function that makes the rows at positions (n,)."""

    def __init__(self, model: Model, logits: Float32 | Callable[[NDArray[np.int64]], Float32], vocab: int) -> None:
        config = replace(model.config, vocab_size=vocab, bos_token_id=None, eos_token_ids=())
        super().__init__(replace(model, config=config))
        self._logits = logits if callable(logits) else logits.__getitem__
        self.rows_asked_for: list[int] = []

    def forward(self, token_ids: Any, logits: Any = "all", *, progress: Any = None) -> Any:
        ids = self.check_fits(token_ids)
        first, self.position = self.position, self.position + len(ids)
        if logits is None:
            return None
        if logits == "last":
            return self._logits(np.array([self.position - 1]))[0]
        assert logits == "all"
        self.rows_asked_for.append(len(ids))
        return self._logits(np.arange(first, self.position))
