"""What the tests of experiments share."""

from collections.abc import Iterator

import numba
import pytest
import threadpoolctl


@pytest.fixture(scope="module", autouse=True)
def one_blas_thread() -> Iterator[None]:
    """Products of tiny models are not worth a second thread; on a busy machine they wait for it ten times as long."""
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The same for the kernels, in steps of single tokens; afterwards as before, whatever a command has said."""
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(before)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """``--threads`` is for the process, and so for the tests that follow."""
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)
