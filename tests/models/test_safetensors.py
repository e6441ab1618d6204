import json
import os
import pickle
import re
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mixkv.models import limits
from mixkv.models import safetensors as reader
from mixkv.models.errors import ModelError
from mixkv.models.safetensors import open_safetensors

WEIGHTS = {
    "model.embed_tokens.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "model.norm.weight": np.full(4, 0.5, np.float32),
}


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def pack(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def refusal(folder, data=None):
    if data is not None:
        (folder / "model.safetensors").write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        open_safetensors(folder)
    assert time.perf_counter() - start < 1
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert len(message.splitlines()) == 1
    return message


def shard(folder, weight_map, files):
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def link(at, target):
    try:
        os.symlink(target, at)
    except (OSError, NotImplementedError):
        pytest.skip("this system does not let us make symbolic links")


# What works


def test_a_file_is_read_by_folder_and_by_path(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        source = open_safetensors(path)
        assert dict(source.shapes) == {"model.embed_tokens.weight": (3, 4), "model.norm.weight": (4,)}
        assert set(source.stored_types.values()) == {"F32"}
        assert source.nbytes == 64
        for name, array in WEIGHTS.items():
            np.testing.assert_array_equal(source.read(name), array, strict=True)


def test_a_tensor_that_is_read_is_a_copy_of_its_own(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path)
    source.read("model.norm.weight")[:] = 7
    np.testing.assert_array_equal(source.read("model.norm.weight"), WEIGHTS["model.norm.weight"])
    assert source.read("model.norm.weight").flags["C_CONTIGUOUS"]


def test_threads_may_read_from_one_source(tmp_path):
    tensors = {f"w{i}": np.full((100, 100), i, np.float32).astype(ml_dtypes.bfloat16) for i in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        for name, read in zip(8 * [*tensors], pool.map(source.read, 8 * [*tensors]), strict=True):
            np.testing.assert_array_equal(read, tensors[name].astype(np.float32), strict=True)


@pytest.mark.parametrize(("dtype", "most"), [(np.float32, 1.1), (ml_dtypes.bfloat16, 1.6)])
def test_reading_holds_one_tensor_and_never_the_file(tmp_path, dtype, most):
    save_file({f"w{i}": np.ones(500_000, dtype) for i in range(4)}, tmp_path / "model.safetensors")
    tracemalloc.start()
    try:
        source = open_safetensors(tmp_path)
        for name in source.shapes:
            source.read(name)
        assert tracemalloc.get_traced_memory()[1] < most * 2_000_000
    finally:
        tracemalloc.stop()


def test_shards_are_joined(tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    a, b = WEIGHTS
    source = open_safetensors(shard(tmp_path, {a: first, b: second}, {first: {a: WEIGHTS[a]}, second: {b: WEIGHTS[b]}}))
    assert source.nbytes == 64
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(source.read(name), array, strict=True)


@pytest.mark.parametrize(
    ("dtype", "stored", "size"),
    [(ml_dtypes.bfloat16, "BF16", 2), (np.float16, "F16", 2), (np.float32, "F32", 4), (np.float64, "F64", 8)],
)
def test_bf16_f16_f32_and_f64_tensors_work(tmp_path, dtype, stored, size):
    special = [0.0, -0.0, 1.5, -3.0, np.inf, -np.inf, np.nan, 2.0**-14, 2.0**-24, 65280.0]
    array = np.array(special, np.float64).astype(dtype).reshape(2, 5)
    save_file({"w": array}, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path)
    assert source.stored_types["w"] == stored
    assert source.nbytes == 10 * size
    read = source.read("w")
    np.testing.assert_array_equal(read, array.astype(np.float32), strict=True)
    np.testing.assert_array_equal(np.signbit(read), np.signbit(array.astype(np.float32)))


@pytest.mark.fault("bfloat16")
def test_every_bf16_value_becomes_the_same_float32(tmp_path):
    array = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    save_file({"w": array}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(open_safetensors(tmp_path).read("w"), array.astype(np.float32))


@pytest.mark.fault("bfloat16")
def test_bf16_works_where_nobody_else_imported_ml_dtypes(tmp_path):
    save_file({"w": np.array([1.5, -2], ml_dtypes.bfloat16)}, tmp_path / "model.safetensors")
    code = (
        "import sys; from pathlib import Path; from mixkv.models.safetensors import open_safetensors;"
        "print(open_safetensors(Path(sys.argv[1])).read('w').tolist())"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert (ran.stdout.strip(), ran.stderr) == ("[1.5, -2.0]", "")


def test_data_that_is_not_aligned_is_read(tmp_path):
    header = json.dumps({"w": entry(0, 8)}).encode()
    header += b" " * ((3 - len(header)) % 8)
    (tmp_path / "model.safetensors").write_bytes(pack(header, np.array([1, 2], "<f4").tobytes()))
    np.testing.assert_array_equal(open_safetensors(tmp_path).read("w"), np.array([1, 2], np.float32))


def test_scalars_and_empty_tensors_are_read(tmp_path):
    header = {"a": entry(0, 0, [0, 4]), "b": entry(0, 4, []), "c": entry(4, 4, [3, 0], "BF16")}
    (tmp_path / "model.safetensors").write_bytes(pack(header, np.array(3, "<f4").tobytes()))
    source = open_safetensors(tmp_path)
    assert source.read("a").shape == (0, 4)
    assert source.read("b").shape == ()
    assert source.read("b") == 3
    assert source.read("c").shape == (3, 0)


def test_a_type_we_cannot_convert_is_refused_only_when_read(tmp_path):
    save_file({"w": np.ones(2, np.float32), "ids": np.arange(3)}, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path)
    assert source.stored_types["ids"] == "I64"
    assert source.read("w").sum() == 2
    with pytest.raises(ModelError, match="'ids' is I64; supported: F32, F16, BF16, F64"):
        source.read("ids")
    with pytest.raises(ModelError, match="no tensor named 'other'"):
        source.read("other")


def test_float64_beyond_float32_is_refused_not_turned_into_infinity(tmp_path):
    save_file({"w": np.array([1e300])}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="'w' holds F64 values beyond float32"):
        open_safetensors(tmp_path).read("w")


class Broken:
    def get_tensor(self, name):
        raise SafetensorError("no such file\nany more")


def test_a_fault_of_the_library_or_the_disk_is_a_model_error(tmp_path, monkeypatch):
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    source = replace(open_safetensors(tmp_path), _opened={"w": Broken()})
    with pytest.raises(ModelError, match=r"tensor 'w' cannot be read: .*no such file\\nany more"):
        source.read("w")

    def out_of_maps(*_, **__):
        raise OSError("too many maps")

    monkeypatch.setattr(reader, "safe_open", out_of_maps)
    assert "cannot be read (too many maps)" in refusal(tmp_path)


# Row 5


@pytest.mark.fault("weight-map-paths")
@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "/tmp/outside.safetensors",
        "..\\outside.safetensors",
        "C:outside.safetensors",
        "sub/outside.safetensors",
        "pytorch_model.bin",
        "..",
        "",
        "a\0b.safetensors",
        "a\nb.safetensors",
        "\ud800.safetensors",
        7,
        None,
    ],
)
def test_weight_map_that_leaves_the_folder_is_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(WEIGHTS, tmp_path / "outside.safetensors")
    message = refusal(shard(folder, {"model.norm.weight": name}, {}))
    assert "weight_map names" in message
    assert "files of this folder" in message


@pytest.mark.fault("weight-map-paths")
@pytest.mark.parametrize("name", ["model.safetensors", "shard.safetensors", "model.safetensors.index.json"])
def test_symlink_out_of_the_folder_is_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(WEIGHTS, tmp_path / "outside")
    if name.startswith("shard"):
        shard(folder, {"model.norm.weight": name}, {})
    link(folder / name, "../outside")
    assert "outside" in refusal(folder)


def test_symlink_inside_the_folder_is_followed(tmp_path):
    (tmp_path / "data").mkdir()
    save_file(WEIGHTS, tmp_path / "data" / "weights")
    link(tmp_path / "model.safetensors", "data/weights")
    assert open_safetensors(tmp_path).nbytes == 64


def hub_cache(tmp_path, owner="models--acme--tiny"):
    snapshot = tmp_path / owner / "snapshots" / "0a1b"
    blobs = tmp_path / owner / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    return snapshot, blobs


def test_symlink_of_the_hub_cache_to_its_own_blobs_is_allowed(tmp_path):
    snapshot, blobs = hub_cache(tmp_path)
    save_file(WEIGHTS, blobs / "abc")
    link(snapshot / "model.safetensors", "../../blobs/abc")
    assert open_safetensors(snapshot).nbytes == 64
    link(tmp_path / "alias", snapshot)
    assert open_safetensors(tmp_path / "alias").nbytes == 64


def test_sharded_hub_cache_is_allowed(tmp_path):
    snapshot, blobs = hub_cache(tmp_path)
    save_file(WEIGHTS, blobs / "abc")
    (blobs / "def").write_text(json.dumps({"weight_map": dict.fromkeys(WEIGHTS, "a.safetensors")}))
    link(snapshot / "a.safetensors", "../../blobs/abc")
    link(snapshot / "model.safetensors.index.json", "../../blobs/def")
    assert open_safetensors(snapshot).nbytes == 64


@pytest.mark.fault("weight-map-paths")
def test_symlink_of_the_hub_cache_to_another_model_is_refused(tmp_path):
    snapshot, _ = hub_cache(tmp_path)
    _, other = hub_cache(tmp_path, "models--acme--other")
    save_file(WEIGHTS, other / "abc")
    link(snapshot / "model.safetensors", "../../../models--acme--other/blobs/abc")
    assert "outside" in refusal(snapshot)


@pytest.mark.fault("weight-map-paths")
def test_a_folder_that_only_resembles_the_hub_cache_is_refused(tmp_path):
    snapshot, blobs = hub_cache(tmp_path, "acme")
    save_file(WEIGHTS, blobs / "abc")
    link(snapshot / "model.safetensors", "../../blobs/abc")
    assert "outside" in refusal(snapshot)


@pytest.mark.fault("weight-map-paths")
def test_a_loop_of_symlinks_is_refused(tmp_path):
    link(tmp_path / "model.safetensors", "model.safetensors")
    refusal(tmp_path)


# Row 6


@pytest.mark.fault("missing-tensors")
def test_missing_shards_and_absent_tensors_are_all_listed_at_once(tmp_path):
    weight_map = {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors", "d": "1.safetensors"}
    message = refusal(shard(tmp_path, weight_map, {"1.safetensors": {"a": np.ones(2, np.float32)}}))
    assert "2 files missing: '2.safetensors', '3.safetensors'" in message
    assert "1 tensors absent from the file the index names: 'd' (of '1.safetensors')" in message


def test_tensor_in_another_shard_than_the_index_says_is_refused(tmp_path):
    files = {"1.safetensors": {"a": np.ones(2, np.float32)}, "2.safetensors": {"b": np.ones(2, np.float32)}}
    message = refusal(shard(tmp_path, {"a": "2.safetensors", "b": "1.safetensors"}, files))
    assert "'a' (of '2.safetensors'), 'b' (of '1.safetensors')" in message


def test_empty_folder_and_missing_file_are_refused(tmp_path):
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(tmp_path)
    assert "1 files missing: 'x.safetensors'" in refusal(tmp_path / "x.safetensors")


def test_shards_without_an_index_are_named(tmp_path):
    save_file(WEIGHTS, tmp_path / "model-00001-of-00002.safetensors")
    assert "model-00001-of-00002.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    "index", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": null}', "[", ""]
)
def test_damaged_index_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert "index.json" in refusal(tmp_path)


# Row 8: the library's own words, of which each version has others, follow "damaged, or truncated at ... bytes"


@pytest.mark.fault("safetensors-damage")
def test_file_truncated_at_any_byte_is_refused(tmp_path):
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for size in range(len(whole)):
        refusal(tmp_path, whole[:size])


def test_trailing_bytes_are_refused(tmp_path):
    message = refusal(tmp_path, pack({"w": entry(0, 8)}, b"\0" * 9))
    assert re.search("truncated at .*incomplete", message, re.I)


@pytest.mark.fault("safetensors-damage")
@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, r"invalid ?offset.*\bb\b"),
        ({"a": entry(0, 12), "b": entry(4, 8)}, r"invalid ?offset.*\bb\b"),
        ({"a": entry(0, 12), "b": entry(0, 12)}, r"invalid ?offset.*\b[ab]\b"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, r"invalid ?offset.*\bb\b"),
        ({"a": entry(4, 12)}, r"invalid ?offset.*\ba\b"),
        ({"a": entry(0, 16)}, "truncated at .*incomplete"),
    ],
)
def test_overlapping_holed_or_overlong_tensors_are_refused(tmp_path, header, words):
    assert re.search(words, refusal(tmp_path, pack(header, b"\0" * 12)), re.I)


@pytest.mark.fault("safetensors-damage")
@pytest.mark.parametrize("length", [limits.MAX_SAFETENSORS_HEADER_BYTES + 1, 1 << 40, (1 << 63) + 1, (1 << 64) - 1])
def test_huge_header_is_refused_fast(tmp_path, length):
    message = refusal(tmp_path, pack(b"{}", b"\0" * 100, length))
    assert f"a header of {length} bytes" in message


@pytest.mark.fault("safetensors-damage")
def test_header_longer_than_the_file_is_refused_fast(tmp_path):
    assert "truncated at 110 bytes" in refusal(tmp_path, pack(b"{}", b"\0" * 100, 9_000_000))


def test_the_largest_header_allowed_is_read_fast(tmp_path):
    header = json.dumps({"w": entry(0, 8)}).encode().ljust(limits.MAX_SAFETENSORS_HEADER_BYTES)
    (tmp_path / "model.safetensors").write_bytes(pack(header, b"\0" * 8))
    start = time.perf_counter()
    assert open_safetensors(tmp_path).nbytes == 8
    assert time.perf_counter() - start < 1
    assert "at most" in refusal(tmp_path, pack(header + b" ", b"\0" * 8))


@pytest.mark.parametrize(
    "bad",
    [
        {"shape": [3]},
        {"shape": [1]},
        {"shape": [-2]},
        {"shape": [2.0]},
        {"shape": [True, 2]},
        {"shape": None},
        {"shape": "2"},
        {"shape": [1] * 9 + [2]},
        {"shape": [1 << 62, 4, 2]},
        {"shape": [0, 1 << 62, 1 << 62]},
        {"shape": [10**4000]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0]},
        {"data_offsets": [0, 4, 8]},
        {"data_offsets": [-8, 0]},
        {"data_offsets": [0.0, 8.0]},
        {"data_offsets": [10**4000, 10**4000 + 8]},
        {"data_offsets": [1 << 64, (1 << 64) + 8]},
        {"data_offsets": None},
        {"dtype": "F33"},
        {"dtype": None},
        {"dtype": "a\nb" + "X" * 5000},
        {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]},
    ],
)
def test_header_entry_that_makes_no_sense_is_refused(tmp_path, bad):
    message = refusal(tmp_path, pack({"w": {**entry(0, 8), **bad}}, b"\0" * 8))
    assert ("tensor 'w'" if "dimensions" in message else "truncated at") in message
    assert len(message) < 1000


@pytest.mark.parametrize("shape", [[1] * 8 + [0], [0, 1 << 62], [1 << 40, 0, 1 << 40], [0, 1 << 63]])
def test_shape_that_numpy_cannot_hold_is_refused_with_both_limits(tmp_path, shape):
    message = refusal(tmp_path, pack({"w": entry(0, 0, shape)}))
    assert "model.safetensors: shape of tensor 'w' is [" in message
    assert f"at most 8 dimensions, of product {1 << 60}, allowed" in message


@pytest.mark.parametrize(
    "header", [b"{", b"{} x", b'{"w": 5}', b'{"w": []}', b'{"w": {}}', b'{"__metadata__": 3}', b'{"\xff": 1}', b"[]"]
)
def test_damaged_header_is_refused(tmp_path, header):
    refusal(tmp_path, pack(header))


def test_header_of_nested_brackets_is_refused_fast(tmp_path):
    assert "nested too deeply" in refusal(tmp_path, pack(b'{"a":' + b"[" * 1_000_000))


names = st.sampled_from(["", "a", "b", "a\nb", "\ud800", "__metadata__"])
numbers = st.integers(-2, 20) | st.sampled_from([1 << 31, 1 << 63, 1 << 64])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "I8", "X", 1]),
        "shape": st.lists(numbers, max_size=3) | st.none(),
        "data_offsets": st.lists(numbers, min_size=1, max_size=3),
    }
)


@settings(max_examples=200)
@given(st.dictionaries(names, entries | st.none(), max_size=3), st.integers(0, 40))
def test_any_header_is_opened_or_refused_and_what_opens_can_be_read(tmp_path_factory, header, size):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(pack(header, bytes(size)))
    try:
        source = open_safetensors(path)
    except ModelError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert source.nbytes == size
    for name, shape in source.shapes.items():
        if source.stored_types[name] in ("F32", "BF16"):
            assert source.read(name).shape == shape


# Row 9


@pytest.mark.fault("duplicate-tensor")
@pytest.mark.parametrize("begin", [0, 4])  # the library accepts the first, which describes the data twice
def test_duplicate_tensor_name_in_a_header_is_refused(tmp_path, begin):
    first, second = json.dumps(entry(0, 4)), json.dumps(entry(begin, 8))
    header = f'{{"w": {first}, "\\u0077": {second}}}'.encode()
    assert "'w' appears twice" in refusal(tmp_path, pack(header, b"\0" * 8))


@pytest.mark.fault("duplicate-tensor")
def test_same_tensor_in_two_shards_is_refused(tmp_path):
    files = dict.fromkeys(("1.safetensors", "2.safetensors"), {"w": np.ones(2, np.float32)})
    weight_map = {"w": "1.safetensors", "v": "2.safetensors"}
    assert "'w' is in both 1.safetensors and 2.safetensors" in refusal(shard(tmp_path, weight_map, files))


# Row 10


@pytest.mark.fault("not-weights")
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git-LFS pointer"),
        (b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", "HTML or XML page"),
        (b"\n\n  <HTML><body>404</body></HTML>", "HTML or XML page"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><Error/>", "HTML or XML page"),
        (b"<html>", "HTML or XML page"),
        (b"PK\x03\x04\x00\x00\x08\x08" + b"\0" * 60, "PyTorch pickle or a ZIP"),
        (pickle.dumps({"w": [1.0]}, protocol=4), "pickle"),
        (b"GGUF\x03\x00\x00\x00" + b"\0" * 60, "GGUF file"),
        (b"Entry not found", "not safetensors"),
        (b"", "0 bytes"),
    ],
)
def test_lfs_pointer_or_html_page_instead_of_weights_is_said_in_words(tmp_path, data, words):
    assert words in refusal(tmp_path, data)


def test_a_header_whose_length_looks_like_a_pickle_is_still_read(tmp_path):
    header = json.dumps({"w": entry(0, 8)}).encode().ljust(0x280)
    (tmp_path / "model.safetensors").write_bytes(pack(header, b"\0" * 8))
    assert (tmp_path / "model.safetensors").read_bytes().startswith(b"\x80\x02")
    assert open_safetensors(tmp_path).nbytes == 8


# Row 11


@pytest.mark.fault("pickles")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def test_pickle_only_folder_is_refused_and_why(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({}))
    for path in (tmp_path, tmp_path / name):
        message = refusal(path)
        assert name in message
        assert "can run any code" in message
        assert "convert the model to safetensors" in message


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert open_safetensors(tmp_path).nbytes == 64
