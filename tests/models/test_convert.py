"""GGUF models written as folders of safetensors: exact, checked, or not there at all."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from typer.testing import CliRunner, Result

import mixkv
from mixkv.cli import app
from mixkv.experiments import convert as converting
from mixkv.experiments.convert import TEXTS, convert
from mixkv.models import convert as writing
from mixkv.models.errors import MixkvError, ModelError, UsageError

from ..refusals import refused
from .test_load import gguf_name, permuted, write_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


KINDS = {"f32": np.dtype("f4"), "f16": np.dtype("f2"), "bf16": np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("dtype", sorted(KINDS))
def test_tensors_are_those_of_the_file_as_the_gguf_package_reads_it(tiny: Path, tmp_path: Path, dtype: str) -> None:
    report = convert(str(tiny), tmp_path / "out", dtype)
    assert report["same"] and report["differences"] == [] and report["dtype"] == dtype
    assert report["logits_tokens"] == converting.LOGITS_TOKENS and (report["logits_change"] == 0) == (dtype == "f32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    stored = {each.name: each for each in gguf.GGUFReader(tiny).tensors}
    assert len(stored) == len(found) == report["tensors"]
    heads = json.loads((tmp_path / "out" / "config.json").read_text())
    for name, values in found.items():
        raw = stored[gguf_name(name)]
        n = {"q": heads["num_attention_heads"], "k": heads["num_key_value_heads"]}.get(
            name.rpartition("_proj.")[0][-1:] if "self_attn" in name else ""
        )
        expected = dequantize(raw.data, raw.tensor_type).reshape(values.shape)
        ours = permuted(values.astype(np.float32), n) if n else values.astype(np.float32)
        assert values.dtype == KINDS[dtype]
        assert np.array_equal(ours, expected.astype(KINDS[dtype]).astype(np.float32)), name


def test_the_folder_runs_as_the_file_does(tiny: Path, tmp_path: Path) -> None:
    convert(str(tiny), tmp_path / "out")
    assert left(tmp_path) == {"out"}
    assert left(tmp_path / "out") == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    ours, theirs = mixkv.load(str(tmp_path / "out"), "f32"), mixkv.load(str(tiny), "f32")
    assert ours.config == theirs.config
    assert ours.encode("BAAB!") == theirs.encode("BAAB!")
    logits = [mixkv.Session(model, mixkv.CachePolicy.full()).forward([3, 4, 5]) for model in (ours, theirs)]
    assert np.array_equal(*logits)
    library = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert library.encode("BAAB!", add_special_tokens=False).ids == theirs.encode("BAAB!")
    assert library.decode(library.encode("BAAB!").ids) == "BAAB!"


def test_shards_have_an_index(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixkv.models import safetensors_write

    real = safetensors_write.shards
    monkeypatch.setattr(writing, "shards", lambda shapes, kind: real(shapes, kind, 20_000))
    report = convert(str(tiny), tmp_path / "out")
    assert report["same"] and "model.safetensors.index.json" in report["files"]
    assert sum(name.endswith(".safetensors") for name in report["files"]) > 2
    assert mixkv.load(str(tmp_path / "out")).config == mixkv.load(str(tiny)).config


def test_nothing_is_overwritten_and_nothing_but_gguf_is_converted(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("there", "link"):
        refused(command("convert", tiny, tmp_path / name), 2, "exists already", name)
    refused(command("convert", tiny, tmp_path / "a" / "b"), 2, "is no folder")
    refused(command("convert", tiny, tmp_path / "out", "--dtype", "q8"), 2, "f32, bf16, f16")
    refused(command("convert", "toy", tmp_path / "out"), 2, "only GGUF files")
    refused(command("convert", tmp_path / "none.gguf", tmp_path / "out"), 2, "none.gguf")
    assert left(tmp_path) == {"there", "link"} and left(tmp_path / "there") == set()


def test_progress_goes_from_part_to_all(tiny: Path, tmp_path: Path) -> None:
    calls: dict[str, list[tuple[int, int]]] = {"writing": [], "checking": []}
    both = {name: (lambda done, total, of=of: of.append((done, total))) for name, of in calls.items()}
    convert(str(tiny), tmp_path / "out", "bf16", **both)  # type: ignore[arg-type]
    nbytes = sum(x.nbytes for x in load_file(tmp_path / "out" / "model.safetensors").values())
    for of in calls.values():
        assert of == sorted(of) and of[-1] == (nbytes, nbytes)


def tampered(folder: Path, what: str) -> None:
    """Change one thing of a folder that was written."""
    if what == "a bit of a tensor":
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        return
    name, _, key = what.partition(": ")
    content = json.loads((folder / name).read_text())
    if key == "vocab":
        vocab = content["model"]["vocab"]
        vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
        content["model"]["merges"] = []
    else:
        content[key] = {
            "rope_theta": 7.5,
            "bos_token": "</s>",
            "eos_token_id": 5,
            "pre_tokenizer": None,
            "chat_template": "x",
        }[key]
        if key == "rope_theta":
            content.pop("rope_parameters")
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("a bit of a tensor", "1 of"),
        ("config.json: rope_theta", "rope is"),
        ("generation_config.json: eos_token_id", "eos_token_ids"),
        ("tokenizer.json: vocab", "2 tokens have another text"),
        ("tokenizer_config.json: bos_token", "bos_token"),
        ("tokenizer_config.json: chat_template", "chat_template"),
    ],
)
def test_a_folder_that_is_read_back_otherwise_is_not_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, word: str
) -> None:
    real = converting.write_folder

    def write(opened: Any, folder: Path, *rest: Any) -> None:
        real(opened, folder, *rest)
        tampered(folder, what)

    monkeypatch.setattr(converting, "write_folder", write)
    result = command("convert", tiny, tmp_path / "out", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 8 and not report["same"] and any(word in each for each in report["differences"]), report
    assert "not kept" in result.stderr
    assert left(tmp_path) == set()


def test_logits_that_differ_are_noticed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = converting._logits

    def changed(opened: Any, source: Any, ids: list[int]) -> Any:
        return real(opened, source, ids) + (0.5 if isinstance(source, converting._Rounded) else 0)

    monkeypatch.setattr(converting, "_logits", changed)
    report = convert(str(tiny), tmp_path / "out")
    assert report["differences"] == [f"logits of {converting.LOGITS_TOKENS} tokens differ by up to 0.5"]
    assert left(tmp_path) == set()
    assert convert(str(tiny), tmp_path / "out", logits=False)["logits_change"] is None


def test_a_full_disk_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as small:
        small.setattr(os, "fsync", full)
        with pytest.raises(MixkvError, match=r"out: cannot be written \(No space left on device\)"):
            convert(str(tiny), tmp_path / "out")
        refused(command("convert", tiny, tmp_path / "out", "-q"), 1, "cannot be written")
    with monkeypatch.context() as small:
        small.setattr("mixkv.models.hub.files.shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10})())
        with pytest.raises(UsageError, match="room for 10 bytes"):
            convert(str(tiny), tmp_path / "out")
        refused(command("convert", tiny, tmp_path / "out", "-q"), 2, "room for 10 bytes")
    assert left(tmp_path) == set()


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryDirectory", nowhere)
    monkeypatch.setattr(converting, "open_model", None)  # nothing is opened, so nothing is fetched
    with pytest.raises(MixkvError, match=r"out: cannot be written \(Permission denied\)"):
        convert("smollm2", tmp_path / "out")


def test_what_lies_beside_it_stays_whatever_it_is_called(tiny: Path, tmp_path: Path) -> None:
    beside = tmp_path / f".out.{os.getpid()}.tmp"
    beside.mkdir()
    (beside / "precious").write_text("x")
    convert(str(tiny), tmp_path / "out")
    assert left(tmp_path) == {"out", beside.name} and left(beside) == {"precious"}
    assert (tmp_path / "out").stat().st_mode == beside.stat().st_mode


def test_a_reader_of_the_progress_who_has_gone_is_no_error_of_the_disk(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(done: int, total: int) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        convert(str(tiny), tmp_path / "out", writing=gone)
    monkeypatch.setattr("mixkv.commands.shell.Bars.bar", lambda self, text: gone)
    assert command("convert", tiny, tmp_path / "out").exit_code == 141
    assert left(tmp_path) == set()


def test_an_interrupt_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(str(tiny), tmp_path / "out", checking=interrupt)
    assert left(tmp_path) == set()


def test_too_little_memory_is_said_before_anything_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converting, "available_nbytes", lambda: 1_000)
    with pytest.raises(UsageError, match="1000 are available; --no-logits"):
        convert(str(tiny), tmp_path / "out")
    assert convert(str(tiny), tmp_path / "out", logits=False)["same"]


def test_a_value_that_float16_cannot_hold_is_refused_by_name(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixkv.models.gguf_names import GGUFSource

    real = GGUFSource.read
    monkeypatch.setattr(GGUFSource, "read", lambda self, name: real(self, name) * np.float32(1e6))
    with pytest.raises(ModelError, match=r"tensor model.embed_tokens.weight holds .*, which f16 cannot hold; use f32"):
        convert(str(tiny), tmp_path / "out", "f16")
    assert left(tmp_path) == set()


def test_ends_that_only_their_names_tell_are_written(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", special=["<|im_end|>", "<|endoftext|>"])
    assert convert(str(tmp_path / "tiny.gguf"), tmp_path / "out")["same"]
    for name in ("generation_config.json", "config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == [2, 3, 4]
    assert mixkv.load(str(tmp_path / "out")).config.eos_token_ids == (2, 3, 4)


def test_user_defined_tokens_keep_their_text_and_bos_comes_first(tmp_path: Path) -> None:
    """Of the kinds of tokens in a GGUF file, control tokens have no text and those that users define have."""
    from mixkv.models.hf_tokenizer import hf_tokenizer
    from mixkv.models.tokenizer import tokenizer_from_gguf, tokenizer_from_json

    letters = [chr(code) for code in range(33, 127)] + ["Ġ"]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": ["<s>", "</s>", "<call>", *letters],
        "tokenizer.ggml.token_type": [3, 3, 4] + [1] * len(letters),
        "tokenizer.ggml.merges": [], "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }  # fmt: skip
    ours = tokenizer_from_gguf(metadata, "test")
    for name, content in hf_tokenizer(ours, 128).items():
        (tmp_path / name).write_text(json.dumps(content))
    theirs = tokenizer_from_json(tmp_path)
    text = "</s> a <call> b"
    ids = ours.encode(text)
    assert ids == theirs.encode(text) and ids[0] == 0 and 2 in ids
    assert ours.decode(ids) == theirs.decode(ids) and "<call>" in ours.decode(ids) and "</s>" not in ours.decode(ids)
    assert (theirs.bos_id, theirs.eos_ids, theirs.chat_template) == (0, (1,), ours.chat_template)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode(text).ids == ids


@pytest.mark.model
def test_the_default_models_tokenizer_survives(default_model_path: Path, tmp_path: Path) -> None:
    from mixkv.models.hf_tokenizer import hf_tokenizer
    from mixkv.models.load import open_model
    from mixkv.models.tokenizer import BPETokenizer, tokenizer_from_json

    ours = open_model(str(default_model_path)).read_tokenizer()
    assert isinstance(ours, BPETokenizer)
    for name, content in hf_tokenizer(ours, 8192).items():
        (tmp_path / name).write_text(json.dumps(content))
    theirs = tokenizer_from_json(tmp_path)
    for text in (*TEXTS, "<|im_start|>user\nhi<|im_end|>"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
