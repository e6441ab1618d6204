"""What several tests of the cache share: random queries, keys and values, and feeding them in pieces."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import threadpoolctl
from numpy.typing import NDArray

from mixkv.models.transformer import Softmax

Float32 = NDArray[np.float32]
QKV = tuple[Float32, Float32, Float32]


@pytest.fixture(scope="module", autouse=True)
def one_blas_thread() -> Iterator[None]:
    """Products of tiny models are not worth a second thread; on a busy machine they wait for it ten times as long."""
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture(scope="session")
def draw_qkv() -> Callable[..., QKV]:
    """q (n, kv_heads * n_rep, head_dim), k and v (n, kv_heads, head_dim); some channels of k are large, as in models."""

    def draw(seed: int, n: int, kv_heads: int = 2, n_rep: int = 2, head_dim: int = 32) -> QKV:
        generator = np.random.default_rng(seed)
        q = generator.standard_normal((n, kv_heads * n_rep, head_dim), np.float32)
        k, v = (generator.standard_normal((n, kv_heads, head_dim), np.float32) for _ in range(2))
        return q, k * (1 + 3 * (np.arange(head_dim) % 5 == 0)).astype(np.float32), v + np.float32(0.25)

    return draw


@pytest.fixture(scope="session")
def feed() -> Callable[..., Float32]:
    """Attend to and commit rows of q, k, v in one LayerCache, cut at the given positions; the outputs in a row."""

    def feed(cache: object, qkv: QKV, cuts: Sequence[int]) -> Float32:
        outs = []
        for start, stop in zip(cuts, cuts[1:], strict=False):
            rows = np.concatenate([x[start:stop] for x in qkv], axis=1)
            outs.append(cache.attend(rows, start, Softmax(rows.shape[2] ** -0.5)))  # type: ignore[attr-defined]
            cache.commit(stop)  # type: ignore[attr-defined]
        return np.concatenate(outs)

    return feed
