"""The GGUF reader: what it reads equals what the gguf package writes, and what is damaged is refused quickly."""

import random
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixkv.models import gguf_blocks
from mixkv.models.errors import ModelError
from mixkv.models.gguf import open_gguf
from mixkv.models.gguf_blocks import TENSOR_TYPES
from mixkv.models.gguf_config import config_from_gguf
from mixkv.models.gguf_names import GGUFSource, unpermute_heads

UINT8, UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 6, 7, 8, 9, 10
F32, Q8_0 = 0, 8


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def tensor(name: str, dims: tuple[int, ...], kind: int = F32, offset: int = 0, dim_count: int | None = None) -> bytes:
    count = len(dims) if dim_count is None else dim_count
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def build(keys: list[bytes], tensors: list[bytes], data: bytes = b"", version: int = 3) -> bytes:
    """A whole file, its tensor data padded to 32 bytes."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def refusal(tmp_path: Path, content: bytes) -> str:
    """The message that opening a file of these bytes is refused with: one line that begins with the path, and fast."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        open_gguf(path)
    assert time.perf_counter() - start < 1
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.count(str(path)) == 1 and "\n" not in message
    return message.removeprefix(f"{path}: ")


VALID = build(
    [
        key("general.name", STRING, text("tiny")),
        key("words", ARRAY, array(STRING, 3, text("a") + text("") + text("ü"))),
        key("flags", ARRAY, array(BOOL, 2, b"\1\0")),
        key("small", UINT8, b"\7"),
    ],
    [tensor("one", (4, 2)), tensor("two", (32,), Q8_0, 32)],
    np.arange(8, dtype="<f4").tobytes() + struct.pack("<e", 0.5) + bytes(range(32)),
)


def test_values_and_shapes_of_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(VALID)
    file = open_gguf(path)
    assert file.path == path
    assert dict(file.metadata) == {"general.name": "tiny", "words": ["a", "", "ü"], "flags": [True, False], "small": 7}
    assert [(t.name, t.shape, t.type_name, t.nbytes) for t in file.tensors.values()] == [
        ("one", (2, 4), "F32", 32),
        ("two", (32,), "Q8_0", 34),
    ]
    np.testing.assert_array_equal(file.read("one"), np.arange(8, dtype=np.float32).reshape(2, 4))
    np.testing.assert_array_equal(file.read("two"), np.arange(32, dtype=np.float32) / 2)
    with pytest.raises(ModelError, match="no tensor 'three'"):
        file.read("three")


def test_version_2_is_read_like_version_3(tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    path.write_bytes(VALID[:4] + struct.pack("<I", 2) + VALID[8:])
    assert list(open_gguf(path).tensors) == ["one", "two"]


def test_every_number_type_and_its_extremes(tmp_path: Path) -> None:
    limits = [np.iinfo(t) for t in (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64)]
    writer = gguf.GGUFWriter(tmp_path / "numbers.gguf", "llama")
    adders = [getattr(writer, f"add_{info.dtype.name}") for info in limits]
    for info, add in zip(limits, adders, strict=True):
        add(f"{info.dtype.name}.min", int(info.min))
        add(f"{info.dtype.name}.max", int(info.max))
    writer.add_float32("float32", 1.5)
    writer.add_float64("float64", 0.1)
    writer.add_bool("bool", True)
    writer.add_array("floats", [0.25, -2.0])
    writer.add_array("ints", [-1, 2])
    write(writer)
    file = open_gguf(tmp_path / "numbers.gguf")
    for info in limits:
        assert file.expect(f"{info.dtype.name}.min", int) == info.min
        assert file.expect(f"{info.dtype.name}.max", int) == info.max
    assert type(file.expect("uint8.max", float)) is float
    assert file.expect("float32", float) == 1.5 and file.expect("float64", float) == 0.1
    assert file.expect("bool", bool) is True
    assert file.expect("floats", list[float]) == [0.25, -2.0] and file.expect("ints", list[int]) == [-1, 2]


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- dequantizing ---


def test_table_of_tensor_types_agrees_with_the_gguf_package() -> None:
    for number, blocks in TENSOR_TYPES.items():
        kind = GGMLQuantizationType(number)
        assert (kind.name, *GGML_QUANT_SIZES[kind]) == tuple(blocks)


@pytest.mark.parametrize("kind", list(map(GGMLQuantizationType, TENSOR_TYPES)), ids=lambda kind: kind.name)
def test_each_type_reads_as_the_gguf_package_dequantizes_it(
    tmp_path: Path, kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_blocks, "_VALUES_AT_ONCE", 2048)  # several chunks, the last one shorter
    values, nbytes = GGML_QUANT_SIZES[kind]
    rows, columns = 19, 512
    stored = np.random.default_rng(1).integers(0, 256, (rows, columns // values * nbytes), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("weight", stored, raw_shape=stored.shape, raw_dtype=kind)
    write(writer)
    file = open_gguf(tmp_path / "one.gguf")
    result = file.read("weight")
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(stored, kind)
    assert file.tensors["weight"].type_name == kind.name
    assert result.dtype == np.float32 and result.shape == (rows, columns)
    assert result.flags.c_contiguous and result.flags.writeable
    np.testing.assert_array_equal(result, expected)  # NaN, which random scales make, equals NaN here


def test_not_a_number_in_a_scale_passes_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "nan.gguf"
    path.write_bytes(build([], [tensor("w", (32,), Q8_0)], struct.pack("<e", float("inf")) + bytes(32)))
    assert np.isnan(open_gguf(path).read("w")).all() and not recwarn


def test_opening_does_not_import_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(VALID)
    code = (
        "import sys; from mixkv.models.gguf import open_gguf; import mixkv.models.gguf_names; "
        f"f = open_gguf({str(path)!r}); assert 'gguf' not in sys.modules; f.read('one')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# --- faults ---


@pytest.mark.fault("not-weights")
def test_git_lfs_pointer_and_html_page_are_named(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 98362432\n"
    assert re.search("Git.LFS pointer", refusal(tmp_path, pointer))
    assert "HTML" in refusal(tmp_path, b"\n  <!DOCTYPE html><html><body>404</body></html>")


def test_other_content_empty_file_folder_and_missing_file(tmp_path: Path) -> None:
    assert "not a GGUF file" in refusal(tmp_path, b"lmgg" + bytes(40))
    assert "empty" in refusal(tmp_path, b"")
    for path in (tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(ModelError, match=f"^{re.escape(str(path))}: no such file$"):
            open_gguf(path)


@pytest.mark.fault("gguf-lengths")
def test_array_of_length_2_to_the_63_in_49_bytes(tmp_path: Path) -> None:
    content = build([key("a", ARRAY, array(UINT8, 1 << 63, b""))], [])[:49]
    assert "claims 9223372036854775808 items" in refusal(tmp_path, content)


@pytest.mark.fault("gguf-lengths")
@pytest.mark.parametrize("item", [STRING, UINT64, BOOL])
def test_arrays_with_more_items_than_the_file_or_the_limit(tmp_path: Path, item: int) -> None:
    for count in ((1 << 64) - 1, 1 << 40, 99):
        assert "'many'" in refusal(tmp_path, build([key("many", ARRAY, array(item, count, bytes(16)))], []))
    content = key("many", ARRAY, array(UINT8, (1 << 24) + 1, bytes((1 << 24) + 1)))
    assert "16777216" in refusal(tmp_path, build([content], []))


@pytest.mark.fault("gguf-lengths")
def test_counts_of_keys_and_tensors_beyond_the_limits(tmp_path: Path) -> None:
    assert "tensors" in refusal(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, (1 << 64) - 1, 0))
    assert "keys" in refusal(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 63))
    assert "ends" in refusal(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 1000, 1000))
    for length in range(5, 24):
        assert "ends" in refusal(tmp_path, VALID[:length])


@pytest.mark.fault("gguf-tensors")
@pytest.mark.parametrize("count", [0, 5, 4_000_000_000])
def test_number_of_dimensions_out_of_range(tmp_path: Path, count: int) -> None:
    assert "dimensions, expected 1 to 4" in refusal(tmp_path, build([], [tensor("w", (4,), dim_count=count)]))


@pytest.mark.fault("gguf-tensors")
@pytest.mark.parametrize("dims", [(1 << 32, 1 << 32), (1 << 62, 4), (1 << 16,) * 4, (1 << 63, 2)])
def test_product_of_dimensions_that_wraps(tmp_path: Path, dims: tuple[int, ...]) -> None:
    assert "should end at byte" in refusal(tmp_path, build([], [tensor("w", dims)], bytes(64)))


def test_dimension_of_zero(tmp_path: Path) -> None:
    assert "(0, 4)" in refusal(tmp_path, build([], [tensor("w", (4, 0))]))


@pytest.mark.fault("gguf-tensors")
def test_offset_past_the_end_and_offset_off_the_alignment(tmp_path: Path) -> None:
    for offset in (32, 1 << 40, (1 << 64) - 32):
        assert "should end at byte" in refusal(tmp_path, build([], [tensor("w", (4,), offset=offset)], bytes(32)))
    assert "offset 8" in refusal(tmp_path, build([], [tensor("w", (4,), offset=8)], bytes(64)))


@pytest.mark.fault("gguf-lengths")
def test_string_past_the_end_of_the_file(tmp_path: Path) -> None:
    for length in (5, 1 << 20, (1 << 64) - 1):
        assert "'s'" in refusal(tmp_path, build([key("s", STRING, struct.pack("<Q", length) + b"abc")], [])[:48])
        items = array(STRING, 1, struct.pack("<Q", length) + b"abc")
        assert "item 0 of" in refusal(tmp_path, build([key("s", ARRAY, items)], [])[:60])


@pytest.mark.fault("gguf-tensors")
def test_overlapping_tensors(tmp_path: Path) -> None:
    content = build([], [tensor("a", (16,)), tensor("b", (16,), offset=32)], bytes(128))
    assert "'a' and 'b' overlap" in refusal(tmp_path, content)
    assert "overlap" in refusal(tmp_path, build([], [tensor("a", (16,)), tensor("b", (16,))], bytes(128)))


@pytest.mark.fault("gguf-tensors")
def test_truncated_tensor_data(tmp_path: Path) -> None:
    assert "'two' should end at byte" in refusal(tmp_path, VALID[:-1])


@pytest.mark.fault("gguf-tensors")
@pytest.mark.parametrize("alignment", [0, 1, 4, 24, 33, 1 << 30])
def test_alignment_zero_not_a_power_of_two_or_a_gibibyte(tmp_path: Path, alignment: int) -> None:
    content = build([key("general.alignment", UINT32, struct.pack("<I", alignment))], [])
    assert f"general.alignment is {alignment}" in refusal(tmp_path, content)


def test_alignment_of_a_wrong_type(tmp_path: Path) -> None:
    content = build([key("general.alignment", STRING, text("32"))], [])
    assert "'general.alignment' is '32', expected an integer" in refusal(tmp_path, content)


def test_alignment_of_64_moves_the_tensor_data(tmp_path: Path) -> None:
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    for name in "ab":
        writer.add_tensor(name, np.full(3, ord(name), np.float32))
    write(writer)
    assert open_gguf(path).read("b").tolist() == [98.0] * 3


def test_duplicate_tensor_name_and_duplicate_key(tmp_path: Path) -> None:
    content = build([], [tensor("w", (4,)), tensor("w", (4,), offset=32)], bytes(64))
    assert "tensor 'w' appears twice" in refusal(tmp_path, content)
    assert "key 'k' appears twice" in refusal(tmp_path, build([key("k", UINT8, b"\1")] * 2, []))


@pytest.mark.fault("gguf-types")
@pytest.mark.parametrize("number", [4, 9, 15, 24, 28, 31, 99, 0xFFFFFFFF])
def test_unknown_tensor_type_lists_the_supported_ones(tmp_path: Path, number: int) -> None:
    message = refusal(tmp_path, build([], [tensor("w", (256,), number)], bytes(2048)))
    assert f"number {number}," in message and "F32, F16, Q4_0, Q4_1" in message


@pytest.mark.fault("gguf-types")
def test_big_endian_file(tmp_path: Path) -> None:
    message = refusal(tmp_path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    assert "big-endian" in message and "little-endian files of version 2 or 3" in message


@pytest.mark.fault("gguf-types")
@pytest.mark.parametrize("version", [0, 1, 4, 70_000])
def test_old_and_future_versions_name_the_supported_ones(tmp_path: Path, version: int) -> None:
    message = refusal(tmp_path, build([], [], version=version))
    assert f"version {version};" in message and "2 or 3" in message


@pytest.mark.fault("gguf-types")
def test_nested_arrays_and_unknown_value_types(tmp_path: Path) -> None:
    nested = array(ARRAY, 1, array(UINT8, 1, b"\1"))
    assert "array of arrays" in refusal(tmp_path, build([key("k", ARRAY, nested)], []))
    assert "unknown type 13" in refusal(tmp_path, build([key("k", 13, bytes(8))], []))
    assert "unknown type 77" in refusal(tmp_path, build([key("k", ARRAY, array(77, 1, bytes(8)))], []))


def test_booleans_other_than_0_and_1(tmp_path: Path) -> None:
    assert "stored as 2" in refusal(tmp_path, build([key("k", BOOL, b"\2")], []))
    assert "stored as 255" in refusal(tmp_path, build([key("k", ARRAY, array(BOOL, 2, b"\1\xff"))], []))


def test_empty_names_long_names_and_names_that_are_not_utf_8(tmp_path: Path) -> None:
    assert "is empty" in refusal(tmp_path, build([key("", UINT8, b"\1")], []))
    assert "is empty" in refusal(tmp_path, build([], [tensor("", (4,))], bytes(32)))
    assert "65535" in refusal(tmp_path, build([key("k" * 65_536, UINT8, b"\1")], []))
    assert "UTF-8" in refusal(tmp_path, build([key(b"\xff", UINT8, b"\1")], []))
    assert "UTF-8" in refusal(tmp_path, build([key("k", ARRAY, array(STRING, 1, text(b"\xc3")))], []))
    assert "\\n" in refusal(tmp_path, build([key("two\nlines", BOOL, b"\2")], []))


def test_columns_that_are_not_a_multiple_of_the_block_size(tmp_path: Path) -> None:
    message = refusal(tmp_path, build([], [tensor("w", (48, 2), Q8_0)], bytes(128)))
    assert "48 columns, Q8_0 needs a multiple of 32" in message


@pytest.mark.fault("gguf-lengths")
def test_metadata_longer_than_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixkv.models.gguf_metadata.MAX_GGUF_METADATA_BYTES", 64)
    assert "beyond the first 64 bytes" in refusal(tmp_path, VALID)


@pytest.mark.fault("gguf-lengths")
def test_string_longer_than_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixkv.models.gguf_metadata.MAX_GGUF_STRING_BYTES", 8)
    assert "'k' has 9 bytes, at most 8" in refusal(tmp_path, build([key("k", STRING, text("x" * 9))], []))


@pytest.mark.fault("gguf-types")
def test_tokenizer_array_of_a_wrong_type_and_missing_keys(tmp_path: Path) -> None:
    path = tmp_path / "types.gguf"
    numbers = array(UINT32, 2, struct.pack("<2I", 1, 2))
    flags, empty = array(BOOL, 1, b"\1"), array(UINT8, 0, b"")
    kinds = {"numbers": numbers, "flags": flags, "empty": empty}
    path.write_bytes(build([key(name, ARRAY, value) for name, value in kinds.items()] + [key("one", BOOL, b"\1")], []))
    file = open_gguf(path)
    assert file.expect("numbers", list[int]) == [1, 2] and file.expect("empty", list[str]) == []
    with pytest.raises(ModelError, match=r"'numbers' is an array of integers, expected an array of strings"):
        file.expect("numbers", list[str])
    with pytest.raises(ModelError, match=r"'flags' is an array of booleans, expected an array of integers"):
        file.expect("flags", list[int])
    with pytest.raises(ModelError, match=r"'one' is True, expected an array of strings"):
        file.expect("one", list[str])
    with pytest.raises(ModelError, match=r"'one' is True, expected an integer"):
        file.expect("one", int)
    with pytest.raises(ModelError, match=r"types\.gguf: the metadata has no missing, expected a string"):
        file.expect("missing", str)
    assert file.optional("missing", str) is None


@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=6),
    cut=st.one_of(st.none(), st.integers(0, len(VALID))),
)
def test_random_damage_is_survived_or_refused(tmp_path: Path, flips: list[tuple[int, int]], cut: int | None) -> None:
    content = bytearray(VALID)
    for position, value in flips:
        content[position] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content[:cut])
    try:
        file = open_gguf(path)
    except ModelError:
        return
    for name, item in file.tensors.items():
        assert file.read(name).shape == item.shape


def test_damage_of_every_byte_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    refused = 0
    for position in range(len(VALID)):
        for value in (0, 1, 0x80, 0xFF):
            path.write_bytes(VALID[:position] + bytes([value]) + VALID[position + 1 :])
            try:
                open_gguf(path)
            except ModelError:
                refused += 1
    assert refused > len(VALID)


# --- the model ---

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, LAYERS, VOCAB = 4, 2, 8, 32, 64, 2, 10
LLAMA: dict[str, object] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 0.5,
    "tokenizer.ggml.eos_token_id": 2,
}


def weights() -> dict[str, np.ndarray]:
    """Random weights of a tiny model by Hugging Face's names."""
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        place = f"model.layers.{layer}."
        shapes |= {f"{place}{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{place}self_attn.{name}_proj.weight"] = (heads * HEAD_DIM, HIDDEN)
            shapes[f"{place}self_attn.{name}_proj.bias"] = (heads * HEAD_DIM,)
        shapes[f"{place}self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes |= {f"{place}mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{place}mlp.down_proj.weight"] = (HIDDEN, INNER)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def file_name(name: str) -> str:
    """llama.cpp's name for a tensor, by the gguf package's own table."""
    stem, kind = name.rsplit(".", 1)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    return f"{table.get_name(stem)}.{kind}"


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """Row by row what llama.cpp's converter does: row (half, i) of a head becomes row (i, half)."""
    result = np.empty_like(values)
    half = values.shape[0] // heads // 2
    for row in range(values.shape[0]):
        head, inside = divmod(row, 2 * half)
        which, i = divmod(inside, half)
        result[head * 2 * half + 2 * i + which] = values[row]
    return result


def write_model(
    path: Path, changes: dict[str, object | None] | None = None, extra: dict[str, np.ndarray] | None = None
) -> Path:
    """A tiny Llama GGUF; ``changes`` to its keys (None removes one) and ``extra`` tensors by the file's names."""
    keys = {**LLAMA, **(changes or {})}
    writer = gguf.GGUFWriter(path, str(keys.pop("general.architecture", "llama")))
    for name, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_int64(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    tensors = {}
    for name, values in weights().items():
        heads = HEADS if ".q_proj" in name else KV_HEADS if ".k_proj" in name else 0
        tensors[file_name(name)] = permuted(values, heads) if heads else values
    for name, values in {**tensors, **(extra or {})}.items():
        writer.add_tensor(name, values)
    write(writer)
    return path


def test_unpermuting_inverts_the_permutation() -> None:
    rng = np.random.default_rng(3)
    for heads, shape in ((3, (3 * 8, 5)), (2, (2 * 64,)), (1, (2, 1))):
        values = rng.random(shape, np.float32)
        np.testing.assert_array_equal(unpermute_heads(permuted(values, heads), heads), values)
    rows = np.arange(8)
    converted = rows.reshape(1, 2, 4).swapaxes(1, 2).reshape(8)  # the converter's own words
    np.testing.assert_array_equal(converted, permuted(rows, 1))


def test_source_gives_every_tensor_by_its_hugging_face_name(tmp_path: Path) -> None:
    file = open_gguf(write_model(tmp_path / "llama.gguf"))
    source = GGUFSource(file, config_from_gguf(file))
    expected = weights()
    assert dict(source.shapes) == {name: values.shape for name, values in expected.items()}
    assert set(source.stored_types.values()) == {"F32"} and source.stored_types.keys() == expected.keys()
    assert source.nbytes == sum(values.nbytes for values in expected.values())
    for name, values in expected.items():
        result = source.read(name)
        assert result.flags.c_contiguous and result.dtype == np.float32
        np.testing.assert_array_equal(result, values, err_msg=name)
    with pytest.raises(ModelError, match="no tensor for 'lm_head.weight'"):
        source.read("lm_head.weight")


def test_configuration_with_defaults(tmp_path: Path) -> None:
    changes: dict[str, object | None] = {"llama.attention.head_count_kv": None, "tokenizer.ggml.eot_token_id": 2}
    config = config_from_gguf(open_gguf(write_model(tmp_path / "llama.gguf", changes)))
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (VOCAB, HIDDEN, INNER)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (LAYERS, 128)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (HEADS, HEADS, HEAD_DIM)
    assert (config.rms_norm_eps, config.rope.theta) == (0.5, 10_000.0)
    assert config.tie_word_embeddings and config.attention_bias and not config.mlp_bias
    assert (config.bos_token_id, config.eos_token_ids) == (None, (2,))


def test_configuration_with_everything_stated(tmp_path: Path) -> None:
    changes: dict[str, object | None] = {
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 500_000.0,
        "llama.rope.scaling.type": "none",
        "llama.vocab_size": VOCAB,
        "tokenizer.ggml.tokens": [str(i) for i in range(VOCAB)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.eom_token_id": 7,
    }
    head = np.ones((VOCAB, HIDDEN), np.float32)
    config = config_from_gguf(open_gguf(write_model(tmp_path / "llama.gguf", changes, {"output.weight": head})))
    assert (config.head_dim, config.rope.theta, config.tie_word_embeddings) == (16, 500_000.0, False)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 5, 7))


@pytest.mark.fault("unsupported-architecture")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gemma"}, "'gemma', supported: llama"),
        ({"llama.block_count": None}, "no llama.block_count, expected an integer"),
        ({"llama.block_count": "2"}, "'llama.block_count' is '2', expected an integer"),
        ({"llama.feed_forward_length": [64, 64]}, "array of integers, expected an integer"),
        ({"llama.block_count": 0}, "num_hidden_layers is 0"),
        ({"llama.block_count": -5}, "num_hidden_layers is -5"),
        ({"llama.context_length": 1 << 60}, "max_position_embeddings is 1152921504606846976"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0"),
        ({"llama.attention.head_count": 5}, "llama.embedding_length is 32 and llama.attention.head_count is 5"),
        ({"llama.attention.head_count_kv": 0}, "num_key_value_heads is 0"),
        ({"llama.attention.head_count_kv": 3}, "multiple of"),
        ({"llama.attention.key_length": 1 << 40}, "head_dim is"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps is nan"),
        ({"llama.attention.value_length": 4}, "value_length is 4, supported: the size of a head, 8"),
        ({"llama.rope.dimension_count": 4}, "dimension_count is 4, supported: the size of a head, 8"),
        ({"llama.rope.scaling.type": "yarn"}, "no llama.rope.scaling.factor"),
        (
            {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0},
            "is 'longrope', supported: none, linear, yarn",
        ),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.5}, "rope factor is 0.5"),
        ({"llama.rope.scale_linear": 2.0}, "rope.scale_linear is 2.0, supported: 1.0"),
        ({"llama.attention.causal": False}, "attention.causal is False, supported: True"),
        ({"llama.expert_count": 8}, "no llama.expert_used_count"),
        (
            {"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.attn_factor": 1.5},
            "attn_factor is 1.5, supported: 1.0",
        ),
        ({"llama.a_key_of_the_future": [0, 3]}, "llama.a_key_of_the_future is [0, 3], supported: 0"),
        ({"llama.pooling_type": 3, "llama.full_attention_interval": 4}, "llama.full_attention_interval is 4"),
        ({"split.count": 3}, "split.count is 3"),
        ({"llama.vocab_size": 11}, "llama.vocab_size says 11 tokens, but token_embd.weight has 10 rows"),
        ({"tokenizer.ggml.tokens": ["a"] * 9}, "has 9 tokens, but token_embd.weight has 10 rows"),
        ({"tokenizer.ggml.tokens": [1] * 10}, "array of integers, expected an array of strings"),
        ({"tokenizer.ggml.eos_token_id": 10}, "eos_token_id is 10"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_unsupported_and_absurd_metadata_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object | None], message: str
) -> None:
    file = open_gguf(write_model(tmp_path / "llama.gguf", changes))
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        config_from_gguf(file)
    assert str(caught.value).count("llama.gguf: ") == 1 and str(caught.value).startswith(str(file.path))


@pytest.mark.parametrize(
    "changes",
    [
        {"llama.attention.clamp_kqv": 0.0, "llama.expert_count": 0, "llama.expert_used_count": 0},
        {"llama.logit_scale": 1.0, "llama.residual_scale": 1.0, "llama.attention.scale": 0.0},
        {"llama.use_parallel_residual": False, "llama.tensor_data_layout": "Meta AI original pth"},
        {"llama.rope.scaling.finetuned": True, "llama.rope.scaling.yarn_beta_fast": 32.0},
        {
            "llama.attention.key_length_swa": 8,
            "llama.rope.dimension_count_swa": 8,
            "llama.rope.freq_base_swa": 10_000.0,
        },
        {"llama.rope.dimension_sections": [0, 0, 0, 0], "llama.attention.sliding_window": 0},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0},
        {"general.a_key": 3, "a.key": 3, "llamas.key": 3},
    ],
)
def test_keys_that_change_nothing_pass(tmp_path: Path, changes: dict[str, object | None]) -> None:
    plain = config_from_gguf(open_gguf(write_model(tmp_path / "plain.gguf")))
    assert config_from_gguf(open_gguf(write_model(tmp_path / "llama.gguf", changes))) == plain


def test_a_factor_without_a_type_is_linear_and_a_window_is_mistrals(tmp_path: Path) -> None:
    rope = config_from_gguf(open_gguf(write_model(tmp_path / "rope.gguf", {"llama.rope.scaling.factor": 4.0}))).rope
    assert (rope.rope_type, rope.factor) == ("linear", 4.0)
    config = config_from_gguf(open_gguf(write_model(tmp_path / "window.gguf", {"llama.attention.sliding_window": 20})))
    assert (config.architecture, config.sliding_windows) == ("mistral", (20,) * LAYERS)


def test_rope_frequencies_of_another_length_and_a_missing_embedding_are_refused(tmp_path: Path) -> None:
    ones = np.ones(4, np.float32)
    with pytest.raises(
        ModelError, match=r"rope_freqs.weight must have a number for each of 4 pairs.*its shape is \(3,\)"
    ):
        config_from_gguf(open_gguf(write_model(tmp_path / "rope.gguf", extra={"rope_freqs.weight": ones[:3]})))
    for extra, message in (([], "there is none"), ([tensor("token_embd.weight", (4,))], r"its shape is \(4,\)")):
        path = tmp_path / "vocabulary.gguf"
        keys = [key("general.architecture", STRING, text("llama"))]
        keys += [key(f"llama.{name}", UINT32, struct.pack("<I", 4)) for name in ("attention.head_count",)]
        path.write_bytes(build(keys, extra, bytes(32)))
        with pytest.raises(ModelError, match=message):
            config_from_gguf(open_gguf(path))


@pytest.mark.parametrize("name", ["blk.2.attn_q.weight", "blk.00.attn_v.weight", "blk.0.attn_z.weight", "extra"])
def test_tensors_that_no_llama_has_are_refused(tmp_path: Path, name: str) -> None:
    file = open_gguf(write_model(tmp_path / "llama.gguf", extra={name: np.ones((8, 32), np.float32)}))
    with pytest.raises(ModelError, match=f"does not have: '{name}'"):
        GGUFSource(file, config_from_gguf(file))


def test_rotary_tensor_with_rows_unlike_the_heads_is_refused(tmp_path: Path) -> None:
    short = np.ones((8, HIDDEN), np.float32)
    file = open_gguf(write_model(tmp_path / "llama.gguf", extra={"blk.1.attn_k.weight": short}))
    with pytest.raises(ModelError, match=r"blk.1.attn_k.weight has the shape \(8, 32\), expected 16 rows"):
        GGUFSource(file, config_from_gguf(file))


@settings(max_examples=150, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3))
def test_random_damage_of_a_model_is_survived_or_refused(tmp_path: Path, flips: list[tuple[float, int]]) -> None:
    path = tmp_path / "model.gguf"
    if not path.exists():
        write_model(path)
    content = bytearray(path.read_bytes())
    header = min(t.offset for t in open_gguf(path).tensors.values())
    for position, value in flips:
        content[int(position * header)] = value
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    try:
        file = open_gguf(damaged)
        source = GGUFSource(file, config_from_gguf(file))
    except ModelError:
        return
    for name, shape in source.shapes.items():
        assert source.read(name).shape == shape


@pytest.mark.fault("gguf-lengths")
def test_opening_a_large_vocabulary_is_fast(tmp_path: Path) -> None:
    words = [f"Ġword{random.Random(i).random()}" for i in range(50_000)]
    payload = b"".join(map(text, words))
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(build([key(name, ARRAY, array(STRING, len(words), payload)) for name in ("tokens", "merges")], []))
    start = time.perf_counter()
    file = open_gguf(path)
    assert time.perf_counter() - start < 0.5  # 0.03 s when measured; the package's own reader needs over 2 s
    assert file.metadata["merges"] == words
