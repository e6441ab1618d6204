"""What the tests of experiments share."""

from collections.abc import Iterator

import pytest
import threadpoolctl


@pytest.fixture(scope="module", autouse=True)
def one_blas_thread() -> Iterator[None]:
    """Products of tiny models are not worth a second thread; on a busy machine they wait for it ten times as long."""
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield
