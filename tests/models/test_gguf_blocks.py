"""GGUF blocks as codes: the kernels hold the numbers that the gguf package makes of the same bytes."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from mixkv.kernels.weights import W8, CodedRows, code_rows, empty_matrix, store_coded
from mixkv.models.errors import ModelError
from mixkv.models.gguf import open_gguf
from mixkv.models.gguf_blocks import CODE_KINDS, TENSOR_TYPES, codes_of_rows
from mixkv.models.linear import PackedLinear
from mixkv.models.pack import Packer

ROWS, COLUMNS = 18, 512
BLOCKS = {blocks.name: blocks for blocks in TENSOR_TYPES.values()}
WITH_HALVES = [name for name in CODE_KINDS if name != "MXFP4"]  # that one has powers of two: test_mxfp4.py
# Scales that are normal, subnormal and zero as float16; times 63 they are all below its largest
SCALES = st.floats(-1000, 1000, width=16)


def numbers_of(codes: CodedRows) -> NDArray[np.float32]:
    """What the kernels hold, as float32."""
    matrix = empty_matrix(codes.kind, ROWS, COLUMNS)
    store_coded(matrix, 0, codes)
    return PackedLinear([matrix]).take(np.arange(ROWS))


def stored_rows(name: str, scales: NDArray[np.float16], seed: int = 0) -> NDArray[np.uint8]:
    """Random codes, and the float16 that their blocks begin with: (rows, bytes)."""
    kind = BLOCKS[name]
    count = 2 if name in ("Q4_1", "Q4_K") else 1
    shape = (ROWS, COLUMNS // kind.values, kind.nbytes)
    stored = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    begins = np.resize(scales, (*shape[:2], count)).astype(np.float16)
    stored[..., : 2 * count] = begins.view(np.uint8).reshape(*shape[:2], 2 * count)
    return stored.reshape(ROWS, -1)


@pytest.mark.parametrize("name", WITH_HALVES)
@settings(deadline=None)
@given(scales=arrays(np.float16, st.integers(1, 40), elements=SCALES), seed=st.integers(0, 9))
def test_codes_are_the_numbers_of_the_file(name: str, scales: NDArray[np.float16], seed: int) -> None:
    """Equal; or, for Q4_K, as near as float16 is to the two numbers that it is the product and the sum of."""
    stored = stored_rows(name, scales, seed)
    codes = codes_of_rows(stored, name)
    assert codes is not None and codes.kind == CODE_KINDS[name]
    want, got = dequantize(stored, GGMLQuantizationType[name]), numbers_of(codes)
    if name != "Q4_K":
        np.testing.assert_array_equal(got, want)
        return
    assert codes.minima is not None
    scale, minimum = (np.abs(x.astype(np.float64)).repeat(32, axis=1) for x in (codes.scales, codes.minima))
    step = 2.0**-25  # half of the smallest float16
    assert (np.abs(got - want) <= 15 * (scale * 2**-11 + step) + minimum * 2**-11 + step).all()


def test_codes_of_4_bit_k_types_are_nearer_than_8_bits_of_their_numbers() -> None:
    stored = stored_rows("Q4_K", np.random.default_rng(2).standard_normal(144).astype(np.float16) / 1000)
    codes, want = codes_of_rows(stored, "Q4_K"), dequantize(stored, GGMLQuantizationType.Q4_K)
    assert codes is not None
    kept, rounded = (np.abs(numbers_of(each) - want).mean() for each in (codes, code_rows(want, W8)))
    assert kept < rounded / 8


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("name", WITH_HALVES)
def test_scales_that_are_no_numbers_stay_what_they_are(name: str, number: float) -> None:
    """Looking at weights is a choice of its own, and so it finds them."""
    scales = np.ones(29, np.float16)
    scales[7] = number
    codes = codes_of_rows(stored_rows(name, scales), name)
    assert codes is not None
    bad = ~np.isfinite(codes.scales)
    if codes.minima is not None:
        bad |= ~np.isfinite(codes.minima)
    assert bad.any() and not bad.all()


def test_a_product_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    """Q4_K's largest scale, 63 times 60,000, fits no float16: no codes, and the layer names the tensor."""
    stored = stored_rows("Q4_K", np.full(2, 60000, np.float16))
    assert codes_of_rows(stored, "Q4_K") is None
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("w.weight", stored, raw_shape=stored.shape, raw_dtype=GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "one.gguf")

    class Source:
        read = file.read
        forget = file.forget

        def stored(self, name: str) -> CodedRows | NDArray[np.float32]:
            found = file.codes(name)
            return file.read(name) if found is None else found

    tensor = file.tensors["w.weight"]
    pack = Packer(Source(), lambda _: tensor.type_name, lambda _: tensor.shape, "auto", None)
    with pytest.raises(ModelError, match="'w.weight' cannot be kept in q4 with minima: .*beyond float16"):
        pack.linear(["w"])
