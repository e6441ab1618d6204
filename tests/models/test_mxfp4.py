"""gpt-oss as it is published, with experts in MXFP4: from a folder and from GGUF, beside what transformers makes of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mixkv import CachePolicy, Session
from mixkv.kernels.weights import W8, CodedRows, empty_matrix, store_coded
from mixkv.models import mxfp4
from mixkv.models.errors import ModelError
from mixkv.models.gguf_blocks import codes_of_rows, dequantize
from mixkv.models.linear import PackedLinear
from mixkv.models.load import Model, kept, load, open_model

from . import test_gguf_architectures as as_gguf

FOLDER = Path(__file__).parents[1] / "data" / "tiny_gpt_oss_mxfp4"
REFERENCE = dict(np.load(FOLDER / "reference.npz"))
EXPERTS = "model.layers.0.mlp.experts."
VALUES = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
)  # E2M1, as the specification lists them

Bytes = NDArray[np.uint8]


def test_experts_are_the_numbers_that_transformers_makes_of_them() -> None:
    source = open_model(str(FOLDER)).source
    for i in range(4):
        gate, up, down = (source.read(f"{EXPERTS}{i}.{name}_proj.weight") for name in ("gate", "up", "down"))
        np.testing.assert_array_equal(gate.T, REFERENCE["gate_up"][i][:, 0::2])
        np.testing.assert_array_equal(up.T, REFERENCE["gate_up"][i][:, 1::2])
        np.testing.assert_array_equal(down.T, REFERENCE["down"][i])


def logits(model: Model, pieces: int) -> NDArray[np.float32]:
    """Of the recorded positions; the text in pieces of so many tokens."""
    session, ids = Session(model, CachePolicy.full()), REFERENCE["ids"]
    rows = [session.forward(ids[i : i + pieces]) for i in range(0, len(ids), pieces)]
    return np.concatenate(rows)[REFERENCE["positions"]]


def converted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model as a GGUF file whose experts are MXFP4, made of their numbers by the gguf package."""

    def floats(_: str) -> dict[str, NDArray[np.float32]]:
        held: dict[str, Any] = load_file(FOLDER / "model.safetensors")
        for name in [name for name in held if name.endswith("_blocks")]:
            blocks, stem = held.pop(name), name.removesuffix("_blocks")
            codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:3], 32)
            numbers = VALUES[codes] * 2.0 ** (held.pop(f"{stem}_scales").astype(float) - 127)[..., None]
            held[stem] = numbers.reshape(*numbers.shape[:2], -1).swapaxes(1, 2)
        return {name: x.astype(np.float32) for name, x in held.items()}

    add = gguf.GGUFWriter.add_tensor

    def add_blocks(writer: gguf.GGUFWriter, name: str, x: NDArray[np.float32]) -> None:
        if not name.endswith("_exps.weight"):
            return add(writer, name, x)
        stored = gguf.quants.quantize(x, GGMLQuantizationType.MXFP4)
        np.testing.assert_array_equal(gguf.quants.dequantize(stored, GGMLQuantizationType.MXFP4), x)
        return add(writer, name, stored, raw_dtype=GGMLQuantizationType.MXFP4)

    monkeypatch.setattr(as_gguf, "FOLDER", FOLDER.parent)
    monkeypatch.setattr(as_gguf, "tensors", floats)
    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_blocks)
    as_gguf.write(FOLDER.name, path)


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_logits_are_those_of_transformers(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FOLDER if form == "folder" else tmp_path / "tiny.gguf"
    if form == "gguf":
        converted(path, monkeypatch)
    assert "MXFP4" in kept(open_model(str(path)), "auto")[0]
    exact, packed = load(str(path), "f32"), load(str(path), "auto")
    for pieces in (len(REFERENCE["ids"]), 1, 7):
        assert np.abs(logits(exact, pieces) - REFERENCE["logits"]).max() < 2e-4
    # Weights lose nothing as codes (see below); activations are rounded to 8 bits before they meet them
    found = logits(packed, 1)
    assert np.abs(found - REFERENCE["logits"]).mean() < 0.02 * REFERENCE["logits"].std()
    if form == "folder":  # all else than the experts is bfloat16 there, and float32 in the file: NumPy's products
        assert found.tobytes() == logits(packed, len(REFERENCE["ids"])).tobytes()


def numbers_of(coded: CodedRows) -> NDArray[np.float32]:
    """What the kernels hold, as float32."""
    rows, groups = coded.scales.shape
    matrix = empty_matrix(coded.kind, rows, groups * 32)
    store_coded(matrix, 0, coded)
    return PackedLinear([matrix]).take(np.arange(rows))


def plain(codes: Bytes, exponents: Bytes) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        numbers = (VALUES[codes] * 2.0 ** (exponents.astype(float) - 127)[..., None]).astype(np.float32)
    return numbers.reshape(len(codes), -1)


CODES = arrays(np.uint8, (2, 3, 32), elements=st.integers(0, 15))


@settings(deadline=None)
@given(codes=CODES, exponents=arrays(np.uint8, (2, 3), elements=st.integers(0, 255)))
def test_numbers_are_those_of_the_format(codes: Bytes, exponents: Bytes) -> None:
    want = plain(codes, exponents)
    np.testing.assert_array_equal(mxfp4.as_numbers(codes, exponents), want)
    stored = np.concatenate([exponents[..., None], codes[..., :16] | codes[..., 16:] << 4], axis=2)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(dequantize(stored.reshape(-1), "MXFP4").reshape(want.shape), want)


@settings(deadline=None)
@given(codes=CODES, exponents=arrays(np.uint8, (2, 3), elements=st.integers(104, 143)))
def test_codes_that_the_kernels_hold_are_the_same_numbers(codes: Bytes, exponents: Bytes) -> None:
    coded, want = mxfp4.as_coded_rows(codes, exponents), plain(codes, exponents)
    assert coded is not None and coded.kind == W8
    np.testing.assert_array_equal(numbers_of(coded), want)
    stored = np.concatenate([exponents[..., None], codes[..., :16] | codes[..., 16:] << 4], axis=2)
    again = codes_of_rows(stored.reshape(2, -1), "MXFP4")
    assert again is not None
    np.testing.assert_array_equal(numbers_of(again), want)


@pytest.mark.parametrize("exponent", [0, 103, 144, 255])
def test_a_scale_that_float16_cannot_hold_makes_no_codes_unless_its_group_is_zero(exponent: int) -> None:
    codes, exponents = np.full((1, 2, 32), 3, np.uint8), np.array([[120, exponent]], np.uint8)
    assert mxfp4.as_coded_rows(codes, exponents) is None
    codes[0, 1] = 8  # minus zero
    coded = mxfp4.as_coded_rows(codes, exponents)
    assert coded is not None
    np.testing.assert_array_equal(numbers_of(coded), plain(codes, exponents))


def test_such_a_model_is_loaded_all_the_same(tmp_path: Path) -> None:
    """Its matrices are rounded to 8 bits with scales of their own then."""

    def change(held: dict[str, Any]) -> None:
        held[f"{EXPERTS}down_proj_scales"][0, 0, 0] = 90

    path = changed(tmp_path, change)
    assert isinstance(open_model(path).source.stored(f"{EXPERTS}0.down_proj.weight"), np.ndarray)
    exact = logits(load(path, "f32"), 1)
    assert np.abs(logits(load(path), 1) - exact).mean() < 0.02 * exact.std()


def changed(folder: Path, change: Any) -> str:
    shutil.copy(FOLDER / "config.json", folder)
    held = load_file(FOLDER / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors")
    return str(folder)


REFUSED = {
    "without scales": (lambda x: x.pop(f"{EXPERTS}down_proj_scales"), "down_proj_blocks' without '.*down_proj_scales'"),
    "without blocks": (lambda x: x.pop(f"{EXPERTS}down_proj_blocks"), "down_proj"),
    "too few experts": (
        lambda x: x.update({f"{EXPERTS}down_proj_blocks": x[f"{EXPERTS}down_proj_blocks"][:3].copy()}),
        r"shape of '.*down_proj_blocks' is \(3, 64, 3, 16\); expected 4 experts",
    ),
    "no blocks of 32": (
        lambda x: x.update({f"{EXPERTS}down_proj_blocks": x[f"{EXPERTS}down_proj_blocks"].reshape(4, 64, 6, 8)}),
        "blocks of 32 columns, 16 bytes",
    ),
    "other scales": (
        lambda x: x.update({f"{EXPERTS}down_proj_scales": np.zeros((4, 64, 2), np.uint8)}),
        r"shape of '.*down_proj_scales' is \(4, 64, 2\); expected \(4, 64, 3\)",
    ),
    "other rows": (
        lambda x: [
            x.update({f"{EXPERTS}down_proj_{part}": x[f"{EXPERTS}down_proj_{part}"][:, :32].copy()})
            for part in ("blocks", "scales")
        ],
        r"down_proj.weight",
    ),
    "another type": (
        lambda x: x.update({f"{EXPERTS}down_proj_scales": x[f"{EXPERTS}down_proj_scales"].astype(np.int8)}),
        "down_proj_scales' is I8; of mxfp4 it is U8",
    ),
    "both forms": (
        lambda x: x.update({f"{EXPERTS}down_proj": np.zeros((4, 96, 64), np.float32)}),
        "are both model.layers.0.mlp.experts.0.down_proj.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_are_no_mxfp4_are_refused(case: str, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        load(changed(tmp_path, change))


@pytest.mark.parametrize(
    ("model", "method"), [("gpt_oss", "gptq"), ("gpt_oss", None), ("gpt_oss", ["mxfp4"]), ("mixtral", "mxfp4")]
)
def test_other_ways_to_quantize_are_refused(model: str, method: object, tmp_path: Path) -> None:
    keys = json.loads((FOLDER.parent / "tiny_models" / model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(keys | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(ModelError, match="only weights that are not quantized, and mxfp4 of gpt_oss, are supported"):
        load(str(tmp_path))
