"""The readers of foreign files that are fuzzed: what each does with bytes, what it begins with, how that is changed."""

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import mixkv
from mixkv.engine.conversation import Conversation, check_options, look, summary
from mixkv.engine.policy import CachePolicy
from mixkv.engine.session import Session
from mixkv.experiments.golden import file as golden
from mixkv.experiments.report import results
from mixkv.experiments.sweep import grid
from mixkv.experiments.sweep.journal import Journal
from mixkv.models.chat import ChatTemplate
from mixkv.models.errors import MixkvError
from mixkv.models.gguf import open_gguf
from mixkv.models.hf_config import config_from_hf
from mixkv.models.load import Model, load
from mixkv.models.names import expected_tensors
from mixkv.models.safetensors import open_safetensors
from mixkv.models.tiny import tiny_model
from mixkv.models.tokenizer import Tokenizer, tokenizer_from_gguf, tokenizer_from_json

from ..experiments.sweep.test_grid import WHOLE as GRID
from . import mutate_gguf, mutate_safetensors, mutators, seeds

TEXTS = "hello he ll 1<im>", "Hello \n 12\u00e9"


@dataclass(frozen=True)
class Target:
    """One reader. ``run`` raises MixkvError for what it refuses."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    mutate: mutators.Mutator = mutators.plain


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory, where there is one, for files that are rewritten thousands of times a second."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def _file(name: str, data: bytes) -> Path:
    path = Path(_scratch().name) / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


@cache
def toy() -> Model:
    """The model that sessions belong to."""
    return mixkv.load("toy")


def _gguf(data: bytes) -> None:
    path = _file("m.gguf", data)
    file = open_gguf(path)
    for name, tensor in file.tensors.items():
        assert file.read(name).shape == tensor.shape
        file.forget(name)
    with contextlib.suppress(MixkvError):
        _use(tokenizer_from_gguf(file.metadata, "m.gguf"))
    _run(load(str(path), check_weights=True))


def _run(model: Model) -> None:
    """A model of whatever dimensions reads three tokens, through codes and dense tiles."""
    vocab = model.config.vocab_size
    policy = CachePolicy.parse("sinks=1 recent=0:f16 tile=32 old=k4c/v2t")
    Session(model, policy, context=min(model.config.max_position_embeddings, 64)).forward(
        [0, vocab - 1, vocab // 2], "last"
    )


def _use(tokenizer: Tokenizer | None) -> None:
    if tokenizer is not None:
        for text in TEXTS:
            with contextlib.suppress(MixkvError):  # a vocabulary may lack a byte
                assert all(0 <= i < tokenizer.vocab_size for i in tokenizer.encode(text))
        ids = range(-1, min(tokenizer.vocab_size, 300) + 1)
        stream = tokenizer.stream()
        assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)
        if tokenizer.chat_template is not None:
            ChatTemplate(tokenizer.chat_template, bos_token=tokenizer.bos_token).render(
                [{"role": "user", "content": "a"}]
            )


def _session(data: bytes) -> None:
    path = _file("s", data)
    saved = look(path)
    assert saved is not None
    about = summary(path)
    assert about["tokens"] == saved.position
    check_options(path, saved, saved.policy, chat=None, system=None, retier=False)
    conversation = Conversation(toy(), path=path, saved=saved)
    session = conversation.session
    assert session.position == saved.position and session.nbytes()["total"] >= 0
    fork = session.fork()
    if session.position < session.context:
        fork.forward([7], "last")
        assert session.position == saved.position
    session.save(path.with_name("s2"))
    Session.load(toy(), path.with_name("s2"))


def _safetensors(data: bytes) -> None:
    source = open_safetensors(_file("model.safetensors", data))
    for name, shape in source.shapes.items():
        with contextlib.suppress(MixkvError):
            assert source.read(name).shape == shape


def _config(data: bytes) -> None:
    config = config_from_hf(_file("config/config.json", data).parent)
    shapes = expected_tensors(config).values()
    if len(shapes) < 500 and sum(map(math.prod, shapes)) < 1 << 20:  # a model of these dimensions is made at once
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        _run(tiny_model(**fields))


def _tokenizer(data: bytes) -> None:
    _use(tokenizer_from_json(_file("tokenizer.json", data)))


def _template(data: bytes) -> None:
    template = ChatTemplate(data.decode("utf-8", "surrogateescape"), bos_token="<s>", eos_token="</s>")
    template.render([{"role": "system", "content": "be kind"}, {"role": "user", "content": "Hi {{ x }}"}])


def _policy(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    refusals = []
    for read in (CachePolicy.from_toml, CachePolicy.parse):
        try:
            policy = read(text)
        except MixkvError as error:
            refusals.append(error)
            continue
        assert CachePolicy.parse(str(policy)) == CachePolicy.from_toml(policy.to_toml()) == policy
        policy.check_model(3, 16)
    if len(refusals) == 2:
        raise refusals[0]


def _grid(data: bytes) -> None:
    setting, policies, axes, lists = grid.load(_file("grid.toml", data))
    named = [policy for policy in policies if not policy.endswith(".toml")]  # a file's name
    grid.make(setting, named, axes, lists.get("documents", []), lists.get("seeds", []))


def _golden(data: bytes) -> None:
    found = golden.parse(data, "g.json")
    assert golden.parse(golden.text_of(found).encode(), "g.json") == found


def _results(data: bytes) -> None:
    results.read([("r.jsonl", BytesIO(data))])


def _journal(data: bytes) -> None:
    path = _file("r.jsonl", data)
    with Journal(path) as journal:
        assert path.read_bytes().rstrip(b"\n").endswith(data[: len(data) - journal.torn].rstrip(b"\n"))
        journal.rows(journal.keys)


_NAMES = """
    U8 I64 F32 F16 BF16 dtype shape data_offsets __metadata__ sha256 format policy model position context mode messages text
    chat raw read rest role content token_ids layers.0.spans layers.1.sink.k layers.0.recent.v layers.2.old.k_scales
    layers.0.old.wide_k.0
"""
_SESSION_WORDS: list[Any] = [
    *_NAMES.split(), *seeds.POLICIES, "120", "0", "32", [0, 0], [2, 2], [0, 8], [1, 2, 16],
]  # fmt: skip
_CONFIG_WORDS: list[Any] = [
    "llama", "LlamaForCausalLM", "model_type", "architectures", "auto_map", "rope_scaling", "rope_theta", "rope_parameters",
    "linear", "default", "yarn", "longrope", "llama3", "dynamic", "factor", "short_factor", "layer_types", "silu", "gelu",
    "original_max_position_embeddings", "gelu_pytorch_tanh", "head_dim", "eos_token_id", "quantization_config", "gemma2",
    "full_attention", "sliding_attention", "sliding_window", "num_local_experts", "num_experts", "num_experts_per_tok",
    "gpt_oss", 4096, 1 << 20, 10_000.0, [1, 2], 128, 129, 1e-30, 1e30,
]  # fmt: skip
_TOKENIZER_WORDS: list[Any] = [
    "ByteLevel", "Sequence", "Split", "Regex", "String", "Replace", "Metaspace", "NFC", "NFKD", "Strip", "Lowercase", "BPE",
    "Digits", "Isolated", "Removed", "TemplateProcessing", "MergedWithNext", "(a+)+$", "\\p{L}+", "(?=", "[", "<s>", 0, 1,
    {"type": "ByteLevel"}, {"Regex": ".*"}, {"type": "Fuse"}, ["h", "e"],
]  # fmt: skip
_ROW_WORDS: list[Any] = ["kind", "key", "eval", "bench", "needle", "window-curve", "counts", "edges", [1, 2, 3], 1e-9]

_TEMPLATE_WORDS = b"""
    {{ }} {% %} {%- -%} {# #} for if elif else endif endfor set endset macro endmacro call endcall filter endfilter with
    endwith break continue loop namespace range dict cycler joiner lipsum in is not and or recursive | ~ + - * ** // % == <
    >= . , ( ) [ ] : 'a' "b" 0 1 9 -1 100000 99999999 0.5 1e308 true none messages m content role add_generation_prompt
    bos_token raise_exception strftime_now tojson trim join map select selectattr reject groupby batch slice sort unique
    replace split format upper center indent wordwrap repeat length list sum first last default items keys values attr
    __class__ __mro__ _a index0 previtem changed cycle 'x'*99999 [1]*9999 %s %9999d
""".split()
_POLICY_WORDS = (
    b"""
    sinks= recent= tile= old= rot= scales= rollback= layers= k_bits= v_bits= window= k4c/v4t64 k16/v16 k2t/v8c 128:f16
    0:bf16 512: [ ] [[older]] [[overrides]] [[overrides.older]] after layers = "0..1" 0..1+-1 * kv none fit range 0 1 16 32
    64 999999999 -1 1.5 nan true false 'f16' "token" "channel" k_axis k_group dense policies weights lengths # . .. +
""".split()
    + [b" ", b"\n"]
)

TARGETS = {
    "gguf": Target(_gguf, seeds.gguf_files, mutate_gguf.gguf),
    "session": Target(
        _session, lambda: seeds.session_files(toy()), mutate_safetensors.safetensors(_SESSION_WORDS, digest=True)
    ),
    "safetensors": Target(
        _safetensors, seeds.safetensors_files, mutate_safetensors.safetensors(_SESSION_WORDS, digest=False)
    ),
    "config": Target(_config, seeds.configs, mutators.json_text(_CONFIG_WORDS)),
    "tokenizer": Target(_tokenizer, seeds.tokenizers, mutators.json_text(_TOKENIZER_WORDS)),
    "template": Target(_template, seeds.templates, mutators.of_words(_TEMPLATE_WORDS)),
    "policy": Target(_policy, seeds.policies, mutators.of_words(_POLICY_WORDS)),
    "grid": Target(_grid, lambda: [GRID.encode()], mutators.of_words(_POLICY_WORDS)),
    "golden": Target(_golden, seeds.golden_files, mutators.json_text(_ROW_WORDS)),
    "results": Target(_results, seeds.results, mutators.json_lines(_ROW_WORDS)),
    "journal": Target(_journal, seeds.results, mutators.json_lines(_ROW_WORDS)),
}
