"""A BPE tokenizer from the tokenizer.json of a Hugging Face model folder."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from .bpe import SPACE, BPETokenizer, byte_level_piece, guarded, sentencepiece_piece
from .check import read_json_object, shown
from .errors import ModelError
from .limits import MAX_TEMPLATE_BYTES, MAX_VOCAB_SIZE
from .tokenizer_growth import check_growth


def tokenizer_from_json(path: Path, vocab_size: int | None = None) -> BPETokenizer:
    """The tokenizer of a model folder (or of the tokenizer.json itself).

    ``vocab_size`` is that of the model: tokens that were added beyond it, as Gemma 3's for images, are left out.
    tokenizer_config.json, special_tokens_map.json and chat_template.jinja beside it are optional; they give the names of
    BOS and EOS, ``add_bos_token`` and the chat template. Truncation and padding that the file asks for are switched
    off: nothing is cut in silence. Raises ModelError for a file that is missing, damaged, or holds anything but BPE.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    content = read_json_object(file)
    kind = content["model"].get("type", "BPE") if isinstance(content.get("model"), dict) else None
    if kind != "BPE":
        raise ModelError(f"{file}: model.type is {shown(kind)}, only 'BPE' is supported")
    if content["model"].get("dropout"):
        raise ModelError(
            f"{file}: model.dropout is {shown(content['model']['dropout'])}, only null and 0 are supported"
        )
    check_growth(content, str(file))
    decoders = list(_decoders(content.get("decoder")))
    names = [_checked(file, each) for each in decoders]
    backend = _backend(file, content, vocab_size)
    sentencepiece = partial(sentencepiece_piece, is_byte="ByteFallback" in names)
    pieces = _pieces(
        file, backend, *((byte_level_piece, _as_written) if "ByteLevel" in names else (sentencepiece,) * 2)
    )
    config = _config(file)
    bos, eos = _token(file, config, "bos_token", backend), _token(file, config, "eos_token", backend)
    return BPETokenizer(
        backend,
        pieces,
        prefix=_prefix(file, backend, config, bos),
        strip_left=any(map(_strips, decoders)),
        byte_level="ByteLevel" in names,
        bos=bos,
        eos=eos,
        chat_template=_chat_template(file, config),
    )


def _decoders(decoder: Any) -> Iterator[Any]:
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence" and isinstance(decoder.get("decoders"), list):
        yield from decoder["decoders"]
    else:
        yield decoder


def _checked(file: Path, decoder: Any) -> str:
    """The name of one step of a decoder whose effect is known."""
    name = decoder.get("type") if isinstance(decoder, dict) else None
    if name not in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"):
        raise ModelError(f"{file}: decoder {shown(name)} is not supported, only byte-level and SentencePiece's are")
    what = {key: value for key, value in decoder.items() if key != "type"}
    if name == "Replace" and what != {"pattern": {"String": SPACE}, "content": " "}:
        raise ModelError(
            f"{file}: decoder 'Replace' has {shown(what)}, only {SPACE!r} replaced by a space is supported"
        )
    if name == "Strip" and (what.get("content"), what.get("start"), what.get("stop")) not in ((" ", 0, 0), (" ", 1, 0)):
        raise ModelError(f"{file}: decoder 'Strip' has {shown(what)}, only one space at the start is supported")
    return str(name)


def _strips(decoder: dict[str, Any]) -> bool:
    """Whether a step of a decoder drops the space that a text begins with."""
    if decoder["type"] == "Metaspace":
        return bool(decoder.get("prepend_scheme", "always") != "never" and decoder.get("add_prefix_space", True))
    return decoder["type"] == "Strip" and decoder["start"] == 1


def _backend(file: Path, content: dict[str, Any], vocab_size: int | None) -> Backend:
    added = content.get("added_tokens")
    beyond = []
    if vocab_size is not None and isinstance(added, list):
        beyond = [e for e in added if isinstance(e, dict) and isinstance(e.get("id"), int) and e["id"] >= vocab_size]
    if beyond and isinstance(added, list):
        text = json.dumps(content | {"added_tokens": [each for each in added if each not in beyond]})
        backend = guarded(str(file), lambda: Backend.from_str(text))
    else:
        backend = guarded(str(file), lambda: Backend.from_file(str(file)))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _as_written(token: str) -> bytes:
    return token.encode("utf-8", "replace")


def _pieces(
    file: Path, backend: Backend, piece: Callable[[str], bytes], added_piece: Callable[[str], bytes]
) -> list[bytes]:
    vocab = backend.get_vocab(with_added_tokens=True)
    largest = max(vocab.values(), default=-1)
    if not 0 <= largest < MAX_VOCAB_SIZE:
        raise ModelError(f"{file}: the largest token id is {largest}, must be from 0 to {MAX_VOCAB_SIZE - 1}")
    pieces = [b""] * (largest + 1)
    for token, index in vocab.items():
        pieces[index] = piece(token)
    for index, added in backend.get_added_tokens_decoder().items():
        pieces[index] = b"" if added.special else added_piece(added.content)
    return pieces


def _prefix(file: Path, backend: Backend, config: dict[str, Any], bos: tuple[int, str] | None) -> list[int]:
    """What the model wants in front of a raw prompt: its own post-processor knows, add_bos_token overrules it."""
    add_bos = config.get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise ModelError(f"{_beside(file)}: add_bos_token is {shown(add_bos)}, must be true or false")
    if add_bos is not None and bos is not None:
        return [bos[0]] if add_bos else []
    plain = guarded(str(file), lambda: backend.encode("a", add_special_tokens=False)).ids
    whole = guarded(str(file), lambda: backend.encode("a", add_special_tokens=True)).ids
    before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:before]


def _beside(file: Path) -> Path:
    return file.with_name("tokenizer_config.json")


def _config(file: Path) -> dict[str, Any]:
    """tokenizer_config.json, and what only the older special_tokens_map.json says."""
    both = (file.with_name("special_tokens_map.json"), _beside(file))
    special, config = (read_json_object(each) if each.exists() else {} for each in both)
    return {key: special[key] for key in ("bos_token", "eos_token") if key in special} | config


def _token(file: Path, config: dict[str, Any], key: str, backend: Backend) -> tuple[int, str] | None:
    found = config.get(key)
    if isinstance(found, dict):  # an AddedToken written out
        found = found.get("content")
    if found is None:
        return None
    if not isinstance(found, str):
        raise ModelError(f"{_beside(file)}: {key} is {shown(found)}, must be a string")
    index = backend.token_to_id(found)
    if index is None:
        raise ModelError(f"{_beside(file)}: {key} {shown(found)} is not in the vocabulary of {file.name}")
    return index, found


def _chat_template(file: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja if there, else the one (or the one named "default") of tokenizer_config.json."""
    separate = file.with_name("chat_template.jinja")
    if separate.is_file():
        try:
            with separate.open("rb") as opened:
                data = opened.read(MAX_TEMPLATE_BYTES + 1)
            if len(data) > MAX_TEMPLATE_BYTES:
                raise ModelError(f"{separate}: larger than the {MAX_TEMPLATE_BYTES} bytes allowed")
            return data.decode("utf-8")
        except OSError as error:
            raise ModelError(f"{separate}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise ModelError(f"{separate}: not valid UTF-8 ({error})") from error
    found = config.get("chat_template")
    if isinstance(found, list):
        named = [each for each in found if isinstance(each, dict) and each.get("name") == "default"]
        found = named[0].get("template") if named else None
    if found is not None and not isinstance(found, str):
        raise ModelError(f"{_beside(file)}: chat_template is {shown(found)}, must be a string")
    return found
