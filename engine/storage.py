"""A session in a file and back.

The file is in the safetensors format (https://huggingface.co/docs/safetensors): other programs can look into it, and
nothing in it is ever executed.

    __metadata__              format, sha256, policy (canonical form), model, position, context, and what the caller adds
    token_ids                 int64 (position,)
    layers.I.spans            int64 (stores, 2): first and one past the last tile of the recent segment and of each tier
    layers.I.sink.k, .v       (sinks, n_kv_heads, width) in the dtype of the dense parts: the policy's, or float32 where a
                              number of the layer does not fit that
    layers.I.S.k, .v          uint8 (tiles, n_kv_heads, bytes): numbers or codes as kernels/layout.py has them; S is
                              recent, old, old2, ...
    layers.I.S.k_scales, .v_scales            uint8 (tiles, n_kv_heads, bytes): scales and minima, float16
    layers.I.S.wide_k.T, .wide_v.T            float32 (n_kv_heads, numbers): those of tile T where float16 does not do

``sha256`` is of the whole file, its own 64 digits taken as zeros: no bit can change unnoticed. A file is written beside the
place that it is to have, made safe on disk, and then renamed: whatever happens, there is the old one or the new one.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..kernels.layout import DENSE_DTYPES, Side
from ..kernels.memory import Bytes
from ..kernels.segment import TileStore
from ..models.check import parse_json_object, shown
from ..models.errors import ModelError, SessionFileError, UsageError
from ..models.limits import MAX_SESSION_HEADER_BYTES
from .cache import Cache
from .layer import LayerCache
from .policy import CachePolicy

FORMAT = "mixkv session 1"
_NO_DIGEST = "0" * 64
_TYPES = {
    np.dtype(np.uint8): "U8", np.dtype(np.int64): "I64", np.dtype(np.float32): "F32", np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}  # fmt: skip
OWN_KEYS = ("format", "sha256", "policy", "model", "position", "context")
_DIGEST = re.compile("[0-9a-f]{64}")

Tensor = tuple[str, np.dtype[Any], tuple[int, ...]]
Spans = list[list[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Saved:
    """What a file holds beside the cache: see the module's text."""

    policy: CachePolicy
    position: int
    context: int
    token_ids: NDArray[np.int64]
    added: dict[str, str]
    model: str  # its fingerprint
    nbytes: int  # of all tensors


def save(
    path: Path, cache: Cache, model: str, token_ids: NDArray[np.int64], context: int, added: Mapping[str, str]
) -> None:
    """Write a session to a file; see ``Session.save``. ``model``: its fingerprint; token_ids: (position,).

    Raises:
        SessionFileError: the file cannot be written. One that was there before is untouched.
        UsageError: a name among ``added`` that the format needs for itself, or what is no text.

    """
    if strange := [x for pair in added.items() for x in pair if not isinstance(x, str)]:
        raise UsageError(f"metadata must be names and texts, found {shown(strange[0])}")
    if clash := [name for name in added if name in OWN_KEYS]:
        raise UsageError(f"metadata must not be named {', '.join(OWN_KEYS)}, found {shown(clash[0])}")
    position = len(token_ids)
    metadata = {
        "format": FORMAT, "sha256": _NO_DIGEST, "policy": str(cache.policy), "model": model, "position": str(position),
        "context": str(context), **added,
    }  # fmt: skip
    wide = [{name: list(store.wide_scales()) for name, store in _stores(layer).items()} for layer in cache.layers]
    tensors = [("token_ids", np.dtype(np.int64), token_ids.shape), *_tensors(cache, _spans(cache), wide)]
    header = _header(metadata, tensors)
    try:
        if len(header) - 8 > MAX_SESSION_HEADER_BYTES:
            raise ValueError(
                f"the header would have {len(header) - 8} bytes, at most {MAX_SESSION_HEADER_BYTES} are allowed"
            )
        _write(path, header, _arrays(cache, token_ids))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise SessionFileError(f"{path}: cannot be saved: {why}; what was there before is as it was") from None


def load(path: Path, model: str, vocab: int, make_cache: Callable[[CachePolicy, int], Cache]) -> tuple[Saved, Cache]:
    """Read a session from a file; see ``Session.load``.

    Args:
        path: of the file.
        model: the fingerprint of the model that is to go on with it.
        vocab: how many tokens that has.
        make_cache: an empty cache for a policy and a context.

    Raises:
        SessionFileError: a file that cannot be read, is damaged, or belongs to another model or version.

    """
    data = _contents(path)
    entries, body = _checked(data, str(path))
    return _read(entries, body, str(path), model, vocab, make_cache)


def describe(path: Path) -> Saved:
    """What a file holds beside the cache, without a model: its checksum is verified, its tiles are not looked at.

    Raises:
        SessionFileError: a file that cannot be read, is damaged, or belongs to another version.

    """
    entries, body = _checked(_contents(path), str(path))
    return _saved(entries.pop("__metadata__"), _Tensors(entries, body, str(path)))


# --- what is in a file ------------------------------------------------------------------------------------------------


def _stores(layer: LayerCache) -> dict[str, TileStore]:
    return {"recent": layer.recent} | {f"old{i + 1 if i else ''}": tier for i, tier in enumerate(layer.tiers)}


def _spans(cache: Cache) -> Spans:
    """First and one past the last tile of every store of every layer."""
    return [[(store.first, store.stop) for store in _stores(layer).values()] for layer in cache.layers]


def _tensors(cache: Cache, spans: Spans, wide: list[dict[str, list[tuple[int, int]]]]) -> Iterator[Tensor]:
    """Every tensor of a cache that holds these tiles, and has float32 scales of these tiles and sides, in order."""
    for i, layer in enumerate(cache.layers):
        yield f"layers.{i}.spans", np.dtype(np.int64), (len(spans[i]), 2)
        for name, sinks in (("k", layer.sink_k), ("v", layer.sink_v)):
            yield f"layers.{i}.sink.{name}", sinks.dtype, sinks.shape
        for (name, store), (first, stop) in zip(_stores(layer).items(), spans[i], strict=True):
            heads, prefix = store.layout.n_kv_heads, f"layers.{i}.{name}."
            sides = store.layout.k, store.layout.v
            for which, side in zip("kv", sides, strict=True):
                yield prefix + which, np.dtype(np.uint8), (stop - first, heads, side.codes_nbytes)
                if side.params_nbytes:
                    yield f"{prefix}{which}_scales", np.dtype(np.uint8), (stop - first, heads, side.params_nbytes)
            for tile, which_side in wide[i][name]:
                count = sides[which_side].params_nbytes // 2
                yield f"{prefix}wide_{'kv'[which_side]}.{tile}", np.dtype(np.float32), (heads, count)


def _arrays(cache: Cache, token_ids: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """The contents of ``_tensors``, one after the other; never more than one of them is a copy."""
    yield token_ids
    for layer in cache.layers:
        stores = _stores(layer)
        yield np.array([(store.first, store.stop) for store in stores.values()], np.int64)
        yield from (layer.sink_k, layer.sink_v)
        for name, store in stores.items():
            for is_k, side in ((True, store.layout.k), (False, store.layout.v)):
                tiles = _gathered(store, store.layout.codes, side)
                if name == "recent":
                    _blank(store, tiles, is_k, len(token_ids))
                yield tiles
                if side.params_nbytes:
                    yield _gathered(store, store.layout.params, side)
            yield from store.wide_scales().values()


def _gathered(store: TileStore, view: Callable[[Bytes, Side], Bytes], side: Side) -> Bytes:
    """Codes or scales of all tiles of a store, (tiles, heads, bytes)."""
    places = [store.place(t) for t in range(store.first, store.stop)]
    found = [view(page, side)[:, slot] for page, slot in places]
    return np.stack(found) if found else np.empty((0, store.layout.n_kv_heads, 0), np.uint8)


def _blank(store: TileStore, tiles: Bytes, is_k: bool, position: int) -> None:
    """Zero what the last tile of a recent segment holds of tokens from ``position`` on, which no longer count."""
    layout = store.layout
    if position % layout.tile and len(tiles):
        shape = (layout.width, layout.tile) if is_k else (layout.tile, layout.width)
        last = tiles[-1].view(DENSE_DTYPES[layout.k_kind]).reshape(layout.n_kv_heads, *shape)
        rows = slice(position % layout.tile, None)
        if is_k:
            last[:, :, rows] = 0
        else:
            last[:, rows] = 0


# --- writing ----------------------------------------------------------------------------------------------------------


def _header(metadata: Mapping[str, str], tensors: list[Tensor]) -> bytes:
    """The length and the header, padded to 8 bytes, as the format has it."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(path: Path, header: bytes, arrays: Iterator[NDArray[Any]]) -> None:
    """Write a file whose digest is then filled in, and put it in the place of ``path`` when it is safe on disk.

    A link stays one, and a file that is replaced has the permissions that it had; a new one is its owner's alone.
    """
    path = Path(os.path.realpath(path))
    mode = path.stat().st_mode if path.exists() else None
    if mode is not None and not stat.S_ISREG(mode):  # root could replace even a device
        raise OSError(0, "it is no file that could be replaced")
    handle, name = tempfile.mkstemp(prefix=".mixkv.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w+b") as file:
            if mode is not None:
                with contextlib.suppress(OSError):
                    os.chmod(name, stat.S_IMODE(mode))
            digest = hashlib.sha256(header)
            file.write(header)
            for array in arrays:
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                digest.update(data.data)
                file.write(data.data)
            file.seek(header.index(_NO_DIGEST.encode()))
            file.write(digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    with contextlib.suppress(OSError):  # the renaming itself; not every system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# --- reading ----------------------------------------------------------------------------------------------------------


def _contents(path: Path) -> Bytes:
    """The bytes of a file, mapped; a pipe or device, which may never end, is not read."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OSError(0, "it is no file")
            return np.memmap(file, np.uint8, "r") if found.st_size else np.empty(0, np.uint8)
    except (OSError, ValueError) as error:
        raise SessionFileError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _saved(metadata: dict[str, str], tensors: "_Tensors") -> Saved:
    """What a file holds beside the cache."""
    try:
        position, context = (_number(metadata, name) for name in ("position", "context"))
        policy = CachePolicy.parse(metadata["policy"])
    except ValueError as error:
        raise SessionFileError(f"{tensors.where}: {error}") from None
    token_ids = np.array(tensors.get("token_ids", np.dtype(np.int64), (position,)))
    if position > context or (position and token_ids.min() < 0):
        raise SessionFileError(f"{tensors.where}: more tokens than its context has, or ids that no model has")
    added = {name: value for name, value in metadata.items() if name not in OWN_KEYS}
    if strange := [name for name, value in added.items() if not isinstance(value, str)]:
        raise SessionFileError(f"{tensors.where}: the metadata {shown(strange[0])} are no text")
    return Saved(policy, position, context, token_ids, added, metadata["model"], tensors.nbytes)


def _number(metadata: Mapping[str, str], name: str) -> int:
    """A number of tokens; ValueError for what is none."""
    if not re.fullmatch("[0-9]{1,18}", metadata[name]):
        raise ValueError(f"{name} must be a number of tokens, found {shown(metadata[name])}")
    return int(metadata[name])


def _read(
    entries: dict[str, Any],
    body: Bytes,
    where: str,
    model: str,
    vocab: int,
    make_cache: Callable[[CachePolicy, int], Cache],
) -> tuple[Saved, Cache]:
    metadata = entries.pop("__metadata__")
    if metadata["model"] != model:
        raise SessionFileError(f"{where}: saved with another model, or with its weights in another format")
    tensors = _Tensors(entries, body, where)
    saved = _saved(metadata, tensors)
    position = saved.position
    if position and saved.token_ids.max() >= vocab:
        raise SessionFileError(f"{where}: ids that the model has not")
    try:
        cache = make_cache(saved.policy, saved.context)
    except UsageError as error:
        raise SessionFileError(f"{where}: {error}") from None
    for i, layer in enumerate(cache.layers):
        if tensors.get(f"layers.{i}.sink.k").dtype == np.float32 != layer.sink_k.dtype:
            layer.widen_dense()
    spans = [_layer_spans(layer, position, tensors, i) for i, layer in enumerate(cache.layers)]
    wide = [
        {
            name: tensors.wide(f"layers.{i}.{name}.", span, store)
            for (name, store), span in zip(_stores(layer).items(), own, strict=True)
        }
        for i, (layer, own) in enumerate(zip(cache.layers, spans, strict=True))
    ]
    expected = {name: (dtype, shape) for name, dtype, shape in _tensors(cache, spans, wide)}
    tensors.expect_only(["token_ids", *expected])
    for name, (dtype, shape) in expected.items():
        tensors.get(name, dtype, shape)
    for i, layer in enumerate(cache.layers):
        prefix = f"layers.{i}."
        sinks = (tensors.get(f"{prefix}sink.{x}", *expected[f"{prefix}sink.{x}"]) for x in "kv")
        layer.fill_sinks(*sinks)
        for (name, store), (first, stop) in zip(_stores(layer).items(), spans[i], strict=True):
            store.forget_before(first)
            while store.stop < stop:
                store.append()
            for which, side in zip("kv", (store.layout.k, store.layout.v), strict=True):
                _scatter(store, store.layout.codes, side, tensors.get(f"{prefix}{name}.{which}"))
                if side.params_nbytes:
                    _scatter(store, store.layout.params, side, tensors.get(f"{prefix}{name}.{which}_scales"))
            for tile, which_side in wide[i][name]:
                store.widen(tile, which_side)
                found = tensors.get(f"{prefix}{name}.wide_{'kv'[which_side]}.{tile}")
                store.wide_scales()[tile, which_side][:] = found
    return saved, cache


def _checked(data: Bytes, where: str) -> tuple[dict[str, Any], Bytes]:
    """The header's entries and the bytes behind it, of a file in which no bit has changed."""
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or not 2 <= length <= min(len(data) - 8, MAX_SESSION_HEADER_BYTES):
        raise SessionFileError(f"{where}: no session file, or cut off: {len(data)} bytes")
    header = data[8 : 8 + length].tobytes()
    try:
        entries = parse_json_object(header, f"{where}: header")
    except ModelError as error:
        raise SessionFileError(str(error)) from None
    metadata = entries.get("__metadata__")
    if not isinstance(metadata, dict) or not str(metadata.get("format", "")).startswith("mixkv session "):
        raise SessionFileError(f"{where}: no session file of mixkv")
    found_digest = metadata.get("sha256")
    if not isinstance(found_digest, str) or not _DIGEST.fullmatch(found_digest):
        raise SessionFileError(f"{where}: damaged: there is no checksum")
    digest = found_digest.encode()
    if header.count(digest) != 1:
        raise SessionFileError(f"{where}: damaged: its checksum is another")
    found = hashlib.sha256(data[:8].tobytes())
    found.update(header.replace(digest, _NO_DIGEST.encode()))
    found.update(data[8 + length :].data)
    if found.hexdigest().encode() != digest:
        raise SessionFileError(f"{where}: damaged: its checksum is another")
    if metadata["format"] != FORMAT:
        raise SessionFileError(f"{where}: of version {shown(metadata['format'])}; this mixkv reads {FORMAT!r} only")
    if missing := [name for name in OWN_KEYS if not isinstance(metadata.get(name), str)]:
        raise SessionFileError(f"{where}: the metadata lack {missing[0]}")
    return entries, data[8 + length :]


class _Tensors:
    """The tensors of a file whose checksum is right. That does not make it one of ours: everything is still checked."""

    def __init__(self, entries: dict[str, Any], body: Bytes, where: str) -> None:
        self._entries, self._body, self.where = entries, body, where
        self.nbytes = len(body)

    def get(self, name: str, dtype: np.dtype[Any] | None = None, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """One tensor, a view; of the type and shape it is expected to have, where these are given."""
        entry: Any = self._entries.get(name)
        try:
            own_dtype = next(dtype for dtype, name_ in _TYPES.items() if name_ == entry["dtype"])
            own_shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
            if any(type(x) is not int or x < 0 for x in (*own_shape, start, stop)) or not start <= stop <= self.nbytes:
                raise ValueError
            array = self._body[start:stop].view(own_dtype).reshape(own_shape)
        except (TypeError, KeyError, ValueError, StopIteration, OverflowError):
            raise SessionFileError(f"{self.where}: tensor {shown(name)} is missing or no tensor") from None
        if dtype is not None and (own_dtype, own_shape) != (dtype, shape):
            raise SessionFileError(
                f"{self.where}: tensor {shown(name)} must be {dtype} {shape}, found {own_dtype} {own_shape}"
            )
        return array

    def wide(self, prefix: str, span: tuple[int, int], store: TileStore) -> list[tuple[int, int]]:
        """The tiles and sides of a store that have scales as float32; only codes have."""
        found, sides = [], (store.layout.k, store.layout.v)
        for name in self._entries:
            match = re.fullmatch(re.escape(prefix) + "wide_([kv])[.]([0-9]{1,9})", name)
            if match and span[0] <= int(match[2]) < span[1] and sides["kv".index(match[1])].params_nbytes:
                found.append((int(match[2]), "kv".index(match[1])))
        return found

    def expect_only(self, names: list[str]) -> None:
        """SessionFileError for a tensor that has no business here, and where they do not lie one behind the other."""
        if strange := sorted(self._entries.keys() - set(names)):
            raise SessionFileError(f"{self.where}: tensor {shown(strange[0])} does not belong there")
        end = 0
        for name in dict.fromkeys(names):
            self.get(name)
            start, stop = self._entries[name]["data_offsets"]
            if start != end:
                raise SessionFileError(f"{self.where}: tensor {shown(name)} begins at byte {start}, not at {end}")
            end = stop
        if end != self.nbytes:
            raise SessionFileError(f"{self.where}: {self.nbytes - end} bytes more than the tensors have")


def _layer_spans(layer: LayerCache, position: int, tensors: _Tensors, i: int) -> list[tuple[int, int]]:
    """The tiles of each store of a layer, if a cache at this position can hold them."""
    stores = _stores(layer)
    found = tensors.get(f"layers.{i}.spans", np.dtype(np.int64), (len(stores), 2))
    spans = [(int(first), int(stop)) for first, stop in found]
    try:
        layer.check_spans(spans, position)
    except UsageError as error:
        raise SessionFileError(f"{tensors.where}: layer {i}: {error}") from None
    return spans


def _scatter(store: TileStore, view: Callable[[Bytes, Side], Bytes], side: Side, tiles: Bytes) -> None:
    for t, tile in zip(range(store.first, store.stop), tiles, strict=True):
        page, slot = store.place(t)
        view(page, side)[:, slot] = tile
