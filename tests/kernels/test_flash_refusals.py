"""Arguments that ``flash_attention`` refuses: the message names them, and nothing has been written."""

import math

import ml_dtypes
import numpy as np
import pytest

from mixkv.kernels import empty_state, flash_attention, quantize

ARRAY = np.zeros((7, 2, 16), np.float32)
SEGMENT = quantize(ARRAY, ARRAY)
REFUSED = [
    ({"q": np.zeros((3, 4, 16))}, r"^q must be a float32 array \(T, H, D\).*float64 \(3, 4, 16\)"),
    ({"q": np.zeros((3, 16), np.float32)}, r"^q .*\(3, 16\)"),
    ({"q": [[[0.0]]]}, "^q .*list"),
    ({"q": np.zeros((3, 4, 0), np.float32)}, r"^q .*\(3, 4, 0\)"),
    ({"q": np.zeros((3, 4, 32), np.float32)}, "^q and k .*head_dim, found 32 and 16"),
    ({"q": np.zeros((3, 3, 16), np.float32)}, "the 3 query heads must be a multiple of the 2 KV heads"),
    ({"q": np.zeros((3, 0, 16), np.float32)}, "the 0 query heads"),
    ({"k": None}, "^k must be an array.*NoneType"),
    ({"k": ARRAY.astype(np.float64)}, "^k must be float32, float16 or bfloat16, found float64"),
    ({"k": ARRAY.astype(np.int8)}, "^k must be .*int8"),
    ({"k": ARRAY.astype(">f4")}, "^k must be .*>f4"),
    ({"k": ARRAY[0]}, r"^k must be an array \(N, Hkv, D\), found \(2, 16\)"),
    ({"v": ARRAY.astype(ml_dtypes.float8_e4m3fn)}, "^v must be .*float8"),
    ({"v": None}, "^v must be .*NoneType"),
    ({"v": ARRAY[:6]}, r"^k and v .*\(7, 2, 16\) and \(6, 2, 16\)"),
    ({"k": ARRAY[:, :0], "v": ARRAY[:, :0]}, "the 0 KV heads"),
    ({"k": SEGMENT}, "^v must be None"),
    ({"k": SEGMENT, "v": None, "mask": np.zeros((3, 6), np.float32)}, r"^mask .*\(3, 7\).*\(4, 3, 7\).*\(3, 6\)"),
    ({"scale": math.nan}, "^scale must be a finite number.*nan"),
    ({"scale": math.inf}, "^scale .*inf"),
    ({"scale": 1e39}, r"^scale .*1e\+39"),
    ({"scale": "1"}, "^scale .*found 1"),
    ({"softcap": -1}, "^softcap .* 0 or more, found -1"),
    ({"softcap": math.nan}, "^softcap .*nan"),
    ({"softcap": 1e39}, "^softcap"),
    ({"softcap": None}, "^softcap .*None"),
    ({"max_bias": -0.5}, "^max_bias .*-0.5"),
    ({"max_bias": math.inf}, "^max_bias .*inf"),
    ({"max_bias": [8]}, r"^max_bias .*\[8\]"),
    ({"mask": np.zeros((3, 7))}, r"^mask must be float32 .*\(3, 7\).*float64"),
    ({"mask": np.zeros((7, 3), np.float32)}, r"^mask .*found float32 \(7, 3\)"),
    ({"mask": np.zeros((2, 3, 7), np.float32)}, r"^mask .*\(2, 3, 7\)"),
    ({"mask": 0.0}, "^mask .*float"),
    ({"start": [0, 1]}, r"^start must be integers of shape \(3,\).*\(2,\)"),
    ({"start": 0.5}, "^start .*float64"),
    ({"start": True}, "^start .*bool"),
    ({"stop": [[1, 2, 3]]}, r"^stop .*\(1, 3\)"),
    ({"stop": [1, 2, None]}, "^stop .*object"),
    ({"stop": 2**64 - 1}, "^stop must fit into int64, found 18446744073709551615"),
    ({"positions": [0.0, 1.0, 2.0]}, "^positions .*float64"),
    ({"positions": np.zeros(4, np.int64)}, r"^positions .*\(4,\)"),
    ({"k_position": 1.5}, "^k_position .*float64"),
    ({"k_position": None}, "^k_position .*object"),
    ({"k_position": [0, 1]}, r"^k_position .*\(2,\)"),
    ({"sink_logits": np.zeros(4)}, r"^sink_logits .*\(4,\).*float64"),
    ({"sink_logits": np.zeros((4, 1), np.float32)}, r"^sink_logits .*\(4, 1\)"),
    ({"sink_logits": 0.0}, "^sink_logits .*float"),
    ({"sink_logits": np.array([0, 0, 0, np.nan], np.float32)}, "^sink_logits must be numbers or -inf"),
    ({"sink_logits": np.array([0, 0, np.inf, 0], np.float32)}, "^sink_logits must be numbers or -inf"),
    ({"precision": "f64"}, "^precision .*'default', 'f32'.*'f64'"),
    ({"precision": None}, "^precision .*None"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "message"), REFUSED, ids=[f"{'+'.join(bad)}-{i}" for i, (bad, _) in enumerate(REFUSED)]
)
def test_an_argument_that_does_not_fit_is_refused_before_any_write(bad: dict[str, object], message: str) -> None:
    state, out = empty_state(4, 3), np.full((3, 4, 16), 7, np.float32)
    before = state.tobytes(), out.tobytes()
    arguments = {"q": np.ones((3, 4, 16), np.float32), "k": ARRAY, "v": ARRAY, "state": state, "out": out, **bad}
    with pytest.raises(ValueError, match=message):
        flash_attention(**arguments)
    assert (state.tobytes(), out.tobytes()) == before
