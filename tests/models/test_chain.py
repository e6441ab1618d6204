"""What chains of a model look like to the kernels."""

import numpy as np
import pytest

from mixkv.kernels.activations import SILU
from mixkv.kernels.project import GATE, HOW
from mixkv.models.load import load


@pytest.mark.parametrize(("weights", "gates"), [("q4", 3), ("q8", 3), ("bf16", 0)])
def test_each_mlp_of_codes_is_gated_where_gate_and_up_end(weights: str, gates: int) -> None:
    """In every layer of the toy model; the link behind still says how, for the one row of a decode step."""
    table = load("toy", weights).transformer._whole.table
    assert table is not None
    assert (table[:, GATE] != 0).sum() == gates and (table[:, HOW] == SILU).sum() == 3
    np.testing.assert_array_equal(np.flatnonzero(table[:, GATE]) + 1, np.flatnonzero(table[:, HOW] == SILU)[:gates])
