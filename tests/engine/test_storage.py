"""Sessions in files: they go on bit for bit, nothing that was changed is taken, and a save that fails costs nothing."""

import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

import mixkv
from mixkv import CachePolicy, Override, Session, Tier
from mixkv.engine import storage
from mixkv.models.errors import SessionFileError, UsageError
from mixkv.models.linear import FloatLinear
from mixkv.models.load import Model
from mixkv.models.rope import Rope
from mixkv.models.toy import CONFIG
from mixkv.models.transformer import Transformer

TINY = CachePolicy(window=3, sinks=1, tile=32, k_bits=2, v_bits=2)
POLICIES = [
    CachePolicy(),
    CachePolicy(window=20, sinks=2, tile=32, dense="bf16", rotate_k=False, rotate_v=False),
    CachePolicy(window=20, sinks=40, tile=32, k_bits=8, v_bits=3, k_axis="token", v_axis="channel", rollback=50),
    CachePolicy(window=10, tile=32, older=(Tier(60, k_bits=2, v_bits=2), Tier(150, k_bits=3, v_bits=2)), rollback=7),
    CachePolicy(tile=32, overrides=(Override("0", k_bits=8, window=9), Override("-1", k_bits=16, sinks=0))),
    CachePolicy(window=0, sinks=0, tile=128),
    CachePolicy.full(),
]


def ids_for(model: Model, n: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, n)


def read(model: Model, policy: CachePolicy | None, n: int, **options: Any) -> Session:
    session = Session(model, policy, **options)
    if n:
        session.forward(ids_for(model, n), None)
    return session


def go_on(session: Session, count: int) -> tuple[list[int], bytes]:
    """Greedy: the ids, and all logits."""
    ids, rows, fed = [], [], [5, 6, 7]
    for _ in range(count):
        row = session.forward(fed, "last")
        assert row is not None
        rows.append(row.tobytes())
        fed = [int(row.argmax())]
        ids += fed
    return ids, b"".join(rows)


def loud(model: Model) -> Model:
    """The same with keys and values that go beyond what float16 scales can hold."""

    def louder(layer: Any) -> Any:
        weight = layer.qkv.weight.copy()
        weight[6 * 16 :] *= 3e5
        return replace(layer, qkv=FloatLinear(weight, layer.qkv.bias, layer.qkv.before))

    weights = model.transformer.weights
    layers = [louder(layer) if i == 1 else layer for i, layer in enumerate(weights.layers)]
    return replace(model, transformer=Transformer(model.config, replace(weights, layers=layers)))


# --- going on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 63, 64, 300])
def test_a_loaded_session_goes_on_bit_for_bit(toy: Model, policy: CachePolicy, n: int, tmp_path: Path) -> None:
    session = read(toy, policy, n)
    session.save(tmp_path / "s", {"a": "b\ud800\n\u00e9", "": ""})
    loaded = Session.load(toy, tmp_path / "s")
    assert loaded.metadata == {"a": "b\ud800\n\u00e9", "": ""}
    assert (loaded.policy, loaded.position, loaded.context) == (policy, n, session.context)
    assert np.array_equal(loaded.token_ids, session.token_ids) and loaded.cache.lowest == session.cache.lowest
    loaded.save(tmp_path / "again", loaded.metadata)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "s").read_bytes()
    assert go_on(loaded, 70) == go_on(session, 70)


@pytest.mark.parametrize("policy", POLICIES[:4], ids=str)
def test_a_loaded_session_goes_back_as_far_and_forks(toy: Model, policy: CachePolicy, tmp_path: Path) -> None:
    session = read(toy, policy, 333)
    session.save(tmp_path / "s")
    for back in (session.cache.lowest, 333 - policy.rollback, 200):
        expected, loaded = session.fork(), Session.load(toy, tmp_path / "s")
        expected.truncate(back, replay=True)
        fork = loaded.fork()
        for each in (loaded, fork):
            each.truncate(back, replay=True)
        ids = go_on(expected, 40)
        assert go_on(loaded, 40) == ids == go_on(fork, 40)


def test_scales_beyond_float16_are_kept(toy: Model, tmp_path: Path) -> None:
    model = loud(toy)
    policy = CachePolicy(window=20, tile=32, dense="f32", k_bits=4, v_bits=4, older=(Tier(90, k_bits=2, v_bits=2),))
    session = read(model, policy, 200)
    assert any(tier.wide_scales() for layer in session.cache.layers for tier in layer.tiers)
    session.save(tmp_path / "s")
    assert b"wide_k" in (tmp_path / "s").read_bytes()
    assert go_on(Session.load(model, tmp_path / "s"), 70) == go_on(session, 70)


def test_a_session_that_was_interrupted_is_saved_as_it_was_before(toy: Model, tmp_path: Path) -> None:
    session, other = read(toy, TINY, 50), read(toy, TINY, 50)
    original = type(session.cache).attend

    def attend(cache: Any, layer: int, *args: Any) -> Any:
        original(cache, layer, *args)
        if layer == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(session.cache), "attend", attend)
        with pytest.raises(KeyboardInterrupt):
            session.forward(ids_for(toy, 40, 3), None)
    session.save(tmp_path / "s")
    other.save(tmp_path / "other")
    assert (tmp_path / "s").read_bytes() == (tmp_path / "other").read_bytes()


CHILD = """
import sys, time
import numpy as np
import mixkv
session = mixkv.Session(mixkv.load("toy", weights="q8"), mixkv.CachePolicy.parse(sys.argv[2]))
session.forward(np.random.default_rng(0).integers(0, 258, 300), None)
session.save(sys.argv[1])
print("saved", flush=True)
while True:
    session.forward([1], None)
"""


@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[3]], ids=str)
def test_a_process_that_is_killed_after_its_save_is_gone_on_with(
    policy: CachePolicy, tmp_path: Path, clean_env: dict[str, str]
) -> None:
    model = mixkv.load("toy", weights="q8")  # whose bits do not depend on the BLAS that the child has
    environment = clean_env | {name: value for name, value in os.environ.items() if name == "MIXKV_CACHE"}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "s"), str(policy)], env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"saved\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert go_on(Session.load(model, tmp_path / "s"), 50) == go_on(read(model, policy, 300), 50)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_the_safetensors_library_sees_the_same_tensors(toy: Model, tmp_path: Path) -> None:
    model = loud(toy)
    session = read(model, CachePolicy(window=20, tile=32, dense="bf16"), 150)
    session.save(tmp_path / "s", {"note": "x"})
    layer = session.cache.layers[1]
    with safe_open(tmp_path / "s", "np") as file:
        metadata, names = file.metadata(), set(file.keys())
        assert metadata["format"] == storage.FORMAT and metadata["note"] == "x" and metadata["position"] == "150"
        assert np.array_equal(file.get_tensor("token_ids"), ids_for(model, 150))
        spans = [[store.first, store.stop] for store in (layer.recent, layer.old)]
        assert file.get_tensor("layers.1.spans").tolist() == spans
        for side, view in (("k", layer.old.layout.k), ("v", layer.old.layout.v)):
            codes, scales = (file.get_tensor(f"layers.1.old.{side}{part}") for part in ("", "_scales"))
            for t in range(layer.old.first, layer.old.stop):
                page, slot = layer.old.place(t)
                assert np.array_equal(codes[t - layer.old.first], layer.old.layout.codes(page, view)[:, slot])
                assert np.array_equal(scales[t - layer.old.first], layer.old.layout.params(page, view)[:, slot])
        wide = {f"layers.1.old.wide_{'kv'[side]}.{t}": x for (t, side), x in layer.old.wide_scales().items()}
        assert wide and wide.keys() <= names
        assert all(np.array_equal(file.get_tensor(name), x) for name, x in wide.items())


# --- what is refused ----------------------------------------------------------------------------------------------


def refuses(model: Model, path: Path, *words: str) -> None:
    """One line that names the file, from ``load``; and nothing else."""
    with pytest.raises(SessionFileError) as caught:
        Session.load(model, path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < 600, text
    for word in words:
        assert word in text, text


@pytest.fixture(scope="module")
def small(toy: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of few bytes: one layer's worth of a tiny policy."""
    path = tmp_path_factory.mktemp("small") / "s"
    read(toy, CachePolicy(window=0, sinks=0, tile=32, k_bits=2, v_bits=2), 32, context=64).save(path, {"mode": "raw"})
    return path


@pytest.mark.fault("session-file")
def test_a_flip_of_any_bit_is_refused(small: Path) -> None:
    """All bits of the length and the header, and one of every byte behind them."""
    data = bytearray(small.read_bytes())
    length = int.from_bytes(data[:8], "little")
    draw = random.Random(7)
    flips = [(i, bit) for i in range(8 + length) for bit in range(8)]
    flips += [(i, draw.randrange(8)) for i in range(8 + length, len(data))]
    array = np.frombuffer(data, np.uint8)
    for i, bit in flips:
        data[i] ^= 1 << bit
        with pytest.raises(SessionFileError, match="^x: "):
            storage._checked(array, "x")
        data[i] ^= 1 << bit
    storage._checked(array, "x")


@pytest.mark.fault("session-file")
def test_a_flip_in_a_file_on_disk_is_refused_and_the_live_session_goes_on(toy: Model, tmp_path: Path) -> None:
    path, session, twin = tmp_path / "s", read(toy, TINY, 90), read(toy, TINY, 90)
    session.save(path)
    data, draw = path.read_bytes(), random.Random(1)
    for i in [0, 7, 8, 9, len(data) - 1, *draw.choices(range(len(data)), k=50)]:
        path.write_bytes(data[:i] + bytes([data[i] ^ 1 << draw.randrange(8)]) + data[i + 1 :])
        refuses(toy, path)
        with pytest.raises(SessionFileError):
            storage.describe(path)
    assert go_on(session, 20) == go_on(twin, 20)


@pytest.mark.fault("session-file")
def test_a_cut_or_longer_file_is_refused(toy: Model, small: Path, tmp_path: Path) -> None:
    data, path = small.read_bytes(), tmp_path / "s"
    header = 8 + int.from_bytes(data[:8], "little")
    lengths = [*range(12), header // 2, *range(header - 9, header + 10), (header + len(data)) // 2]
    lengths += range(len(data) - 9, len(data))
    for length in lengths:
        path.write_bytes(data[:length])
        refuses(toy, path, "cut off" if length < header else "damaged")
    for more in (b"\0", b"x", b"\0" * 8, data):
        path.write_bytes(data + more)
        refuses(toy, path, "damaged")


def parts(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Header and the bytes of every tensor."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    body = {
        name: data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        for name, entry in header.items() if name != "__metadata__"
    }  # fmt: skip
    return header, body


def digested(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    """A file with this header and body, and the right checksum; the header must hold 64 zeros for it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + body
    return whole.replace(b"0" * 64, hashlib.sha256(whole).hexdigest().encode(), 1)


def forge(path: Path, change: Callable[[dict[str, Any], dict[str, bytes]], object], *, more: bytes = b"") -> None:
    """Change header and tensors of a file, and give it the right checksum. Offsets are made anew where not changed."""
    header, tensors = parts(path)
    before = {name: list(header[name]["data_offsets"]) for name in tensors}
    header["__metadata__"]["sha256"] = "0" * 64
    change(header, tensors)
    at = 0
    for name, data in tensors.items():
        if name in header and isinstance(header[name], dict) and header[name].get("data_offsets") == before.get(name):
            header[name]["data_offsets"] = [at, at + len(data)]
        at += len(data)
    path.write_bytes(digested(header, b"".join(tensors.values()) + more))


@pytest.fixture
def file(toy: Model, tmp_path: Path) -> Path:
    """A file of 90 tokens with sinks, codes and dense tiles."""
    read(toy, TINY, 90).save(tmp_path / "s", {"mode": "raw"})
    return tmp_path / "s"


def test_a_forged_file_without_a_change_is_taken(toy: Model, file: Path) -> None:
    forge(file, lambda header, tensors: None)
    assert Session.load(toy, file).position == 90


def metadata(**changed: Any) -> Callable[..., object]:
    return lambda header, _: header["__metadata__"].update(changed)


def entry(name: str, **changed: Any) -> Callable[..., object]:
    return lambda header, _: header[name].update(changed)


def without(name: str) -> Callable[..., object]:
    return lambda header, tensors: (header.pop(name), tensors.pop(name))


def with_tensor(name: str, dtype: str, shape: list[int], data: bytes) -> Callable[..., object]:
    def change(header: dict[str, Any], tensors: dict[str, bytes]) -> None:
        end = sum(map(len, tensors.values()))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        tensors[name] = data

    return change


def spans(*changed: tuple[int, int]) -> Callable[..., object]:
    return lambda _, tensors: tensors.update({"layers.1.spans": np.array(changed, np.int64).tobytes()})


def ids(*changed: int) -> Callable[..., object]:
    def change(_: dict[str, Any], tensors: dict[str, bytes]) -> None:
        found = np.frombuffer(tensors["token_ids"], np.int64).copy()
        found[: len(changed)] = changed
        tensors["token_ids"] = found.tobytes()

    return change


FORGERIES = {
    "another model": (metadata(model="0" * 32), "another model"),
    "another version": (metadata(format="mixkv session 2"), "of version 'mixkv session 2'; this mixkv reads"),
    "another format": (metadata(format="pt"), "no session file of mixkv"),
    "no model": (lambda h, _: h["__metadata__"].pop("model"), "lack model"),
    "no number": (metadata(position=90), "lack position"),
    "no text": (metadata(mode=["raw"]), "no text"),
    "a policy that is none": (metadata(policy="k5v5"), "k_bits"),
    "another policy": (metadata(policy="k4v4"), ""),
    "an override of layer 7": (metadata(policy="layers=7[sinks=0]"), "layers"),
    "a digest that is none": (metadata(more="0" * 64, sha256="\ud800" * 64), "no checksum"),
    **{f"position {x!r}": (metadata(position=x), "") for x in ("91", "-1", "1e9", "", " 90", "9" * 18, "9" * 5000, "٩٠")},
    **{f"context {x!r}": (metadata(context=x), "") for x in ("89", "0", "-5", "16385", str(1 << 62), "9" * 400, "x")},
    "ids beyond the vocabulary": (ids(1, 258), "ids that the model has not"),
    "ids below 0": (ids(-1), "ids"),
    "ids of the least int64": (ids(1, 2, -(2**63)), "ids"),
    "ids as float32": (entry("token_ids", dtype="F32", shape=[180]), "token_ids"),
    "ids of two axes": (entry("token_ids", shape=[45, 2]), "token_ids"),
    "ids missing": (without("token_ids"), "token_ids"),
    "codes missing": (without("layers.2.old.k"), "layers.2.old.k"),
    "scales missing": (without("layers.0.old.v_scales"), "layers.0.old.v_scales"),
    "spans missing": (without("layers.1.spans"), "layers.1.spans"),
    "sinks missing": (without("layers.1.sink.v"), "layers.1.sink.v"),
    "a tensor too many": (with_tensor("layers.3.spans", "I64", [1], b"\0" * 8), "does not belong"),
    "an empty tensor too many": (with_tensor("x", "U8", [0], b""), "does not belong"),
    "scales of no tile": (with_tensor("layers.0.old.wide_k.77", "F32", [2, 32], b"\0" * 256), "does not belong"),
    "scales of a dense tile": (with_tensor("layers.0.recent.wide_k.2", "F32", [2, 0], b""), "does not belong"),
    "wide scales named otherwise": (with_tensor("layers.0.old.wide_k.01", "F32", [2, 32], b"\0" * 256), ""),
    "wide scales of another shape": (with_tensor("layers.0.old.wide_k.1", "F32", [2, 3], b"\0" * 24), "wide_k.1"),
    "codes of another type": (entry("layers.0.old.k", dtype="F64"), "layers.0.old.k"),
    "codes of a shape with a float": (entry("layers.0.old.k", shape=[2.0, 2, 128]), "layers.0.old.k"),
    "codes of a shape with texts": (entry("layers.0.old.k", shape=["2", "2", "128"]), "layers.0.old.k"),
    "a shape that is none": (entry("layers.0.old.k", shape=None), "layers.0.old.k"),
    "a negative shape": (entry("layers.0.old.k", shape=[-2, -2, 128]), "layers.0.old.k"),
    "an enormous shape": (entry("layers.0.old.k", shape=[1 << 80, 0]), "layers.0.old.k"),
    "a hundred axes": (entry("layers.0.old.k", shape=[1] * 100), "layers.0.old.k"),
    "offsets beyond the end": (entry("layers.0.old.k", data_offsets=[0, 1 << 40]), "layers.0.old.k"),
    "offsets that go back": (entry("layers.0.old.k", data_offsets=[512, 0]), "layers.0.old.k"),
    "three offsets": (entry("layers.0.old.k", data_offsets=[0, 1, 2]), "layers.0.old.k"),
    "offsets of another tensor": (entry("layers.0.old.k", data_offsets=[0, 512]), ""),
    "an entry that is a list": (lambda h, _: h.update({"layers.0.old.k": []}), "layers.0.old.k"),
    "an entry that is null": (lambda h, _: h.update({"layers.0.old.k": None}), "layers.0.old.k"),
    **{f"spans {x}": (spans(*x), "") for x in (
        ((0, 0), (0, 0)), ((2, 3), (0, 1)), ((2, 3), (1, 2)), ((3, 3), (0, 2)), ((2, 4), (0, 2)), ((-1, 3), (0, 2)),
        ((2, 3), (0, 3)), ((2, 3), (-(2**63), 2**63 - 1)), ((2**62, 2**62), (0, 2)), ((2, 2**40), (0, 2**40)),
        ((2, 3), (0, 2), (0, 0)), ((2, 3),), ((2, 3), (2, 1)),
    )},
}  # fmt: skip


@pytest.mark.fault("session-file")
@pytest.mark.parametrize("name", FORGERIES)
def test_a_file_with_a_right_checksum_that_cannot_be_is_refused(toy: Model, file: Path, name: str) -> None:
    change, word = FORGERIES[name]
    forge(file, change)
    started = time.perf_counter()
    refuses(toy, file, word)
    assert time.perf_counter() - started < 5


def test_bytes_behind_the_tensors_are_refused_even_with_a_right_checksum(toy: Model, file: Path) -> None:
    forge(file, lambda header, tensors: None, more=b"\0" * 16)
    refuses(toy, file, "16 bytes more than the tensors have")


@pytest.mark.parametrize("text", [b"{}", b"[]", b"null", b"{", b"\xff\xff", b"[" * 100_000, b'{"__metadata__": 5}',
                                  b'{"a": 1, "a": 2}', b"9" * 5000, b"  "], ids=lambda text: repr(text[:20]))  # fmt: skip
def test_a_header_that_is_none_is_refused(toy: Model, tmp_path: Path, text: bytes) -> None:
    (tmp_path / "s").write_bytes(digested(text, b"\0" * 64))
    refuses(toy, tmp_path / "s")


@pytest.mark.parametrize("length", [0, 1, 1 << 26, 1 << 32, 2**63 - 1, 2**63, 2**64 - 1])
def test_an_absurd_length_of_the_header_is_refused(toy: Model, file: Path, length: int) -> None:
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    refuses(toy, file, "cut off")


@pytest.mark.fault("session-file")
def test_another_model_or_its_weights_in_another_format_is_refused(toy: Model, file: Path) -> None:
    refuses(mixkv.load("toy", "q8"), file, "another model, or with its weights in another format")
    refuses(loud(toy), file, "another model")
    refuses(replace(toy, config=replace(CONFIG, rope=Rope(5.0))), file, "another model")


@pytest.mark.parametrize("make", ["empty", "folder", "null", "zero", "fifo", "none", "loop", "nul", "long"])
def test_what_is_no_file_is_refused_and_does_not_hang(toy: Model, tmp_path: Path, make: str) -> None:
    path = tmp_path / "s"
    if make == "empty":
        path.touch()
    elif make == "folder":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    elif make == "loop":
        path.symlink_to(path)
    else:
        names = {"null": "/dev/null", "zero": "/dev/zero", "nul": f"{path}\0x", "long": str(tmp_path / ("x" * 300))}
        path = Path(names.get(make, path))
    refuses(toy, path, "it is no file" if make in ("null", "zero", "fifo") else "")
    if make in ("folder", "null", "zero", "fifo", "nul", "long"):
        kind = path.lstat().st_mode if make not in ("nul", "long") else 0
        with pytest.raises(SessionFileError, match="cannot be saved"):
            read(toy, TINY, 3).save(path)
        assert not kind or stat.S_IFMT(path.lstat().st_mode) == stat.S_IFMT(kind), "it was replaced"
        assert [x.name for x in tmp_path.iterdir() if x.name.endswith(".tmp")] == []


def test_no_permission_is_said(toy: Model, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything: so the refusal of the system is put in its place."""

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(storage.os, "open", refuse)
    refuses(toy, file, "cannot be read: Permission denied")


def test_limits_out_of_range_are_no_fault_of_the_file(toy: Model, file: Path) -> None:
    for options, word in (({"chunk": 0}, "chunk"), ({"context": 0}, "context"), ({"context": 16385}, "16384"),
                          ({"context": 89}, "90 or more")):  # fmt: skip
        with pytest.raises(UsageError, match=word) as caught:
            Session.load(toy, file, **options)
        assert not isinstance(caught.value, SessionFileError)
    assert Session.load(toy, file, context=90).context == 90


def test_a_context_below_the_sinks_of_an_override_is_refused(toy: Model, tmp_path: Path) -> None:
    """Else it would be saved with fewer sinks than it has, and could not be loaded again."""
    policy = CachePolicy(tile=32, overrides=(Override("1", sinks=50),))
    read(toy, policy, 10, context=100).save(tmp_path / "s")
    with pytest.raises(UsageError, match="50 or more"):
        Session.load(toy, tmp_path / "s", context=20)
    shorter = Session.load(toy, tmp_path / "s", context=60)
    shorter.save(tmp_path / "t")
    assert go_on(Session.load(toy, tmp_path / "t"), 20) == go_on(shorter, 20)
    read(toy, policy, 10, context=20).save(tmp_path / "s")
    with pytest.raises(UsageError, match="as it was, 20"):
        Session.load(toy, tmp_path / "s", context=60)


def test_metadata_must_be_texts_and_not_ours(toy: Model, tmp_path: Path) -> None:
    session = read(toy, TINY, 3)
    for added, word in (({"position": "5"}, "must not be named"), ({"a": 5}, "found 5"), ({5: "a"}, "found 5")):
        with pytest.raises(UsageError, match=word):
            session.save(tmp_path / "s", added)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_metadata_that_no_load_would_take_are_not_saved(
    toy: Model, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()
    monkeypatch.setattr(storage, "MAX_SESSION_HEADER_BYTES", 20_000)
    with pytest.raises(SessionFileError, match="at most 20000 are allowed"):
        read(toy, TINY, 3).save(file, {"note": "x" * 20_000})
    assert file.read_bytes() == before


# --- a save that fails --------------------------------------------------------------------------------------------


def check_survives(file: Path, before: bytes, caught: pytest.ExceptionInfo[SessionFileError], reason: str) -> None:
    assert file.read_bytes() == before
    assert [x.name for x in file.parent.iterdir()] == [file.name], "something was left"
    text = str(caught.value)
    assert text == f"{file}: cannot be saved: {reason}; what was there before is as it was"


@pytest.mark.fault("disk-full")
@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen"])
def test_a_full_disk_leaves_the_old_file(toy: Model, file: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, session, twin = file.read_bytes(), read(toy, TINY, 95), read(toy, TINY, 95)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, call, full)
        with pytest.raises(SessionFileError) as caught:
            session.save(file)
    check_survives(file, before, caught, "No space left on device")
    assert go_on(session, 20) == go_on(twin, 20)


class Filling:
    """A file that is full after so many writes."""

    def __init__(self, file: Any, writes: int, error: BaseException) -> None:
        self._file, self._writes, self._error = file, writes, error

    def write(self, data: Any) -> int:
        self._writes -= 1
        if self._writes < 0:
            raise self._error
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Filling":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@pytest.mark.fault("disk-full")
@pytest.mark.parametrize("writes", [0, 1, 2, 10, 29])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, 0])
def test_a_write_that_fails_or_is_interrupted_leaves_the_old_file(
    toy: Model, file: Path, writes: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, session, original = file.read_bytes(), read(toy, TINY, 95), os.fdopen
    error = OSError(number, os.strerror(number)) if number else KeyboardInterrupt()
    monkeypatch.setattr(storage.os, "fdopen", lambda *args: Filling(original(*args), writes, error))
    with pytest.raises(SessionFileError if number else KeyboardInterrupt) as caught:
        session.save(file)
    if number:
        check_survives(file, before, caught, os.strerror(number))  # type: ignore[arg-type]
    assert file.read_bytes() == before and [x.name for x in file.parent.iterdir()] == [file.name]


def test_a_folder_that_is_missing_or_a_file_is_said(toy: Model, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in ((tmp_path / "none" / "s", "No such file"), (tmp_path / "file" / "s", "Not a directory")):
        with pytest.raises(SessionFileError, match=reason):
            read(toy, TINY, 3).save(path)


def test_a_folder_that_cannot_be_written_to_keeps_its_file(toy: Model, file: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    before, session = file.read_bytes(), read(toy, TINY, 95)
    file.parent.chmod(0o555)
    try:
        with pytest.raises(SessionFileError) as caught:
            session.save(file)
    finally:
        file.parent.chmod(0o755)
    check_survives(file, before, caught, "Permission denied")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB, where one can be mounted."""
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    if sys.platform != "linux" or os.geteuid() != 0 or not mount or not unmount:
        pytest.skip("needs root on Linux to mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run([unmount, str(folder)], check=True)


@pytest.mark.fault("disk-full")
def test_a_disk_that_is_really_full_leaves_the_old_file(toy: Model, disk: Path) -> None:
    file = disk / "s"
    read(toy, TINY, 90).save(file)
    before, large = file.read_bytes(), read(toy, CachePolicy.full(), 800)
    with pytest.raises(SessionFileError) as caught:
        large.save(file)
    check_survives(file, before, caught, "No space left on device")


@pytest.mark.fault("disk-full")
def test_a_disk_that_is_really_read_only_leaves_the_old_file(toy: Model, disk: Path) -> None:
    file = disk / "s"
    read(toy, TINY, 90).save(file)
    before = file.read_bytes()
    if subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True).returncode:
        pytest.skip("it cannot be mounted anew")
    with pytest.raises(SessionFileError) as caught:
        read(toy, TINY, 95).save(file)
    check_survives(file, before, caught, "Read-only file system")


def test_a_link_stays_one_and_permissions_stay_as_they_were(toy: Model, file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    for mode in (0o640, 0o600, 0o644):
        file.chmod(mode)
        read(toy, TINY, 95).save(link)
        assert link.is_symlink() and stat.S_IMODE(file.stat().st_mode) == mode
        assert Session.load(toy, link).position == 95
    new = tmp_path / ("n" * 250)
    read(toy, TINY, 5).save(new)
    assert stat.S_IMODE(new.stat().st_mode) == 0o600


@pytest.mark.fault("two-processes")
def test_saves_at_once_leave_one_of_them_whole(toy: Model, file: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    sessions = [read(toy, TINY, n) for n in (10, 50, 90, 130)]
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda session: session.save(file), itertools.chain(*[sessions] * 5)):
            pass
    assert Session.load(toy, file).position in (10, 50, 90, 130)
    assert [x.name for x in file.parent.iterdir()] == [file.name]


# --- looking into one ---------------------------------------------------------------------------------------------


def test_describe_says_what_is_in_a_file_without_a_model(toy: Model, file: Path) -> None:
    saved = storage.describe(file)
    assert (saved.policy, saved.position, saved.context) == (TINY, 90, 16_384)
    assert np.array_equal(saved.token_ids, ids_for(toy, 90)) and saved.added == {"mode": "raw"}
    assert saved.model == Session._fingerprint(toy)
    assert saved.nbytes == sum(map(len, parts(file)[1].values()))
