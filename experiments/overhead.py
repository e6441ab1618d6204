"""What a decode step costs besides its arithmetic: Python, and handing work to the threads.

Measured on a model with as many layers whose matrices are so small that there is next to nothing to compute.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..engine.session import Session
from ..kernels.activations import PLAIN
from ..kernels.chain import Projection, chain_addresses, chain_table
from ..kernels.project import OWN_BUFFERS, run_chain
from ..kernels.weights import W8, empty_matrix
from ..models.config import ModelConfig
from ..models.load import Model, read_weights
from ..models.names import expected_tensors
from ..models.toy import ToySource
from ..models.transformer import Transformer

STEPS = 100
LINKS = 100


@dataclass(frozen=True, slots=True)
class Overhead:
    """Of one decode step.

    Attributes:
        python_seconds: in Python, and of entering its parallel region.
        handover_seconds: of handing work from all threads to all threads within them.
        handovers_per_layer: how often a layer does that.

    """

    python_seconds: float
    handover_seconds: float
    handovers_per_layer: int


def overhead(n_layers: int, threads: int, *, clock: Callable[[], float] = time.perf_counter) -> Overhead:
    """Measure it, medians of many steps. The threads are those in force."""
    model = _small_model(n_layers)
    a_layer = 2 + sum(chain.handovers for chain in model.transformer.chains) // n_layers  # 2: storing, attending
    handovers = a_layer * n_layers + 1  # 1: the output head
    session = Session(model)
    session.forward([1, 2, 3], None)
    step = _median(lambda: session.forward([1], "last"), STEPS, clock)
    handover = handovers * _link(threads, clock)
    return Overhead(max(step - handover, 0.0), handover, a_layer)


def _small_model(n_layers: int) -> Model:
    config = ModelConfig(
        architecture="llama", vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=n_layers,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16, max_position_embeddings=4 * STEPS,
    )  # fmt: skip
    source = ToySource(expected_tensors(config))
    return Model("small", config, Transformer(config, read_weights(config, source, "q8")), None)


def _link(threads: int, clock: Callable[[], float]) -> float:
    """Seconds of a handover: what a link more costs a chain whose products are of 16 x 32 numbers."""
    layer = Projection([empty_matrix(W8, 16, 32)], None, PLAIN, None, 0.0)
    x, out = np.ones((1, 32), np.float32), np.empty((1, 16), np.float32)
    tasks, addresses = chain_addresses(1 + LINKS, np.empty(0, np.uint8), [x, out])
    link = layer.link(OWN_BUFFERS, OWN_BUFFERS + 1)
    times = []
    for links in (1, 1 + LINKS):
        table = chain_table([link] * links)
        call = lambda table=table: run_chain(table, 0, addresses, 1, threads)  # noqa: E731
        times.append(_median(call, STEPS, clock))
    del tasks  # in use until here
    return max(times[1] - times[0], 0.0) / LINKS


def _median(call: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    """Median seconds of so many calls, after some that do not count."""
    for _ in range(count // 5):
        call()
    times = []
    for _ in range(count):
        begun = clock()
        call()
        times.append(clock() - begun)
    return statistics.median(times)
