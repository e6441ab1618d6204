"""Models in every weight format: what is kept of a file, logits that no cut of a text changes, and how far they are off."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

import mixkv
from mixkv import CachePolicy, Session, cli
from mixkv.kernels.weights import NAMES, W4, W4M, W8, WBF16, WF16, WF32
from mixkv.models.errors import ModelError, NumericalError
from mixkv.models.experts import MLP
from mixkv.models.linear import FloatLinear, Linear, Norm, PackedLinear
from mixkv.models.load import Model, kept, load, open_model
from mixkv.models.pack import WEIGHTS
from mixkv.models.transformer import Transformer, Weights

from .small_gguf import read_back, tensors, type_of, write_model

Float32 = NDArray[np.float32]
Change = Callable[[dict[str, NDArray[Any]], dict[str, Any]], None]

DATA = Path(__file__).parents[1] / "data"
TINY_LLAMA = DATA / "tiny_llama"
CODES = (W8, W4, W4M)
KEPT = {"Q4_0": W4, "Q4_1": W4M, "Q5_0": W8, "Q8_0": W8, "F16": WF16, "BF16": WBF16}  # without loss
# One layer has parts that are stored differently; the next one, parts that share a matrix as far as they can
MIXED = {
    "0.self_attn.q_proj.weight": "Q4_1", "0.self_attn.k_proj.weight": "Q8_0", "0.self_attn.v_proj.weight": "F16",
    "0.self_attn.o_proj.weight": "Q4_0", "0.mlp.gate_proj.weight": "Q4_0", "0.mlp.up_proj.weight": "BF16",
    "0.mlp.down_proj.weight": "BF16", "1.self_attn.o_proj.weight": "F16", "1.mlp.gate_proj.weight": "Q4_1",
    "1.mlp.up_proj.weight": "Q4_1", "embed_tokens.weight": "Q8_0", "lm_head.weight": "Q5_1", ".weight": "Q4_0",
}  # fmt: skip
FORMATS = [
    *(f"tiny_llama {weights}" for weights in ("q8", "q4", "bf16")), *(f"toy {weights}" for weights in ("q8", "q4", "bf16")),
    *KEPT, "Q5_1", "mixed",
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """The models of FORMATS, each loaded once."""
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            if " " in name:
                model, weights = name.split()
                made[name] = load(str(TINY_LLAMA) if model == "tiny_llama" else model, weights)
            else:
                path = tmp_path_factory.mktemp("small") / "model.gguf"
                made[name] = load(str(write_model(path, MIXED if name == "mixed" else name)))
        return made[name]

    return get


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, for one test."""
    yield numba.set_num_threads
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


def ids_for(model: Model, n: int = 150) -> NDArray[np.int64]:
    return np.random.default_rng(5).integers(0, model.config.vocab_size, n)


def logits(model: Model, ids: NDArray[np.int64], policy: CachePolicy, chunk: int = 512) -> Float32:
    found = Session(model, policy, chunk=chunk).forward(ids)
    assert found is not None
    return found


def linears(model: Model) -> Iterator[tuple[list[str], Linear]]:
    """Every linear layer of a model whose head is not tied, with the names of the tensors whose rows it has."""
    weights = model.transformer.weights
    yield ["model.embed_tokens.weight"], weights.embedding
    yield ["lm_head.weight"], weights.head
    for i, layer in enumerate(weights.layers):
        place = f"model.layers.{i}."
        yield [f"{place}self_attn.{part}_proj.weight" for part in "qkv"], layer.qkv
        yield [f"{place}self_attn.o_proj.weight"], layer.o
        yield [f"{place}mlp.{part}_proj.weight" for part in ("gate", "up")], layer.mlp.gate_up
        yield [f"{place}mlp.down_proj.weight"], layer.mlp.down


def all_rows(linear: Linear) -> Float32:
    """The weights of a layer as float32; ``take`` is for layers of one matrix."""
    if isinstance(linear, FloatLinear):
        return linear.weight
    assert isinstance(linear, PackedLinear)
    return np.concatenate([PackedLinear([part]).take(np.arange(part.rows)) for part in linear.parts])


# --- What is kept of a file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KEPT, "mixed"])
def test_what_the_kernels_know_is_kept_without_loss(models: Callable[[str], Model], kind: str) -> None:
    """The very numbers that the gguf package makes of the file, in Hugging Face's order of rotary rows."""
    values, model = tensors(), models(kind)
    types = MIXED if kind == "mixed" else kind
    for names, linear in linears(model):
        assert isinstance(linear, PackedLinear)
        stored = [type_of(name, types) for name in names]
        if "Q5_1" in stored:
            continue
        assert {part.kind for part in linear.parts} == {KEPT[x] for x in stored}
        want = [read_back(values[name], x) for name, x in zip(names, stored, strict=True)]
        np.testing.assert_array_equal(all_rows(linear), np.concatenate(want), err_msg=str(names))


def test_what_the_kernels_do_not_know_becomes_q8(models: Callable[[str], Model]) -> None:
    """At the cost of half a step, a 127th of the largest of 32."""
    values = tensors()
    for names, linear in linears(models("Q5_1")):
        assert {part.kind for part in linear.parts} == {W8}
        want = np.concatenate([read_back(values[name], "Q5_1") for name in names])
        largest = np.abs(want).reshape(len(want), -1, 32).max(axis=2)
        error = np.abs(all_rows(linear) - want).reshape(len(want), -1, 32).max(axis=2)
        assert (error <= 0.501 * largest / 127).all() and error.any()


def test_neighbours_share_a_matrix_as_far_as_blocks_of_16_rows_allow(models: Callable[[str], Model]) -> None:
    """32 rows of q, 8 of k, 8 of v; 96 of gate and of up."""
    found = [[(part.kind, part.rows) for part in linear.parts] for _, linear in linears(models("mixed"))]
    assert found[2] == [(W4M, 32), (W8, 8), (WF16, 8)] and found[4] == [(W4, 96), (WBF16, 96)]
    assert found[6] == [(W4, 40), (W4, 8)] and found[8] == [(W4M, 192)]


def matrix_nbytes(model: Model) -> int:
    """Bytes of all matrices as they lie in memory."""
    weights = model.transformer.weights
    every = [weights.embedding, *weights.linears()]
    pieces = [x for each in every for x in ([each.weight] if isinstance(each, FloatLinear) else each.parts)]
    return sum({id(x): x.nbytes for x in pieces}.values())


@pytest.mark.parametrize("weights", ["auto", "f32", "q8", "q4"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "qwen2_plain", "phi3", "gemma2"])
def test_what_a_model_will_take_is_known_before_it_is_read(name: str, weights: str) -> None:
    """Routers stay float32, small matrices are padded, and a tied head is counted once."""
    folder = str(DATA / "tiny_models" / name)
    opened = open_model(folder)
    formats, nbytes = kept(opened, weights)
    assert nbytes == matrix_nbytes(load(folder, weights))
    form = {"auto": "bf16", "q4": "q4 with minima"}.get(weights, weights)
    routed = opened.config.num_experts and form != "f32"
    assert formats == {"BF16": " ".join(sorted(["f32", form])) if routed else form}


def test_what_a_model_of_mixed_formats_will_take(tmp_path: Path) -> None:
    """Float32 beside codes is packed like them, in whole blocks of 16 rows."""
    types = MIXED | {"0.self_attn.v_proj.weight": "F32"}
    model = load(str(write_model(tmp_path / "model.gguf", types)))
    opened = open_model(str(tmp_path / "model.gguf"))
    formats, nbytes = kept(opened, "auto")
    assert nbytes == matrix_nbytes(model) and formats["F32"] == "f32" and formats["Q5_1"] == "q8"


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", [*KEPT, "Q5_1", "F32"])
def test_every_choice_keeps_what_it_says(tmp_path: Path, weights: str, kind: str) -> None:
    """What is stored in the format that is asked for keeps its codes; everything else is near what it was."""
    model, values = load(str(write_model(tmp_path / "model.gguf", kind)), weights), tensors()
    name = {
        "auto": NAMES[KEPT[kind]] if kind in KEPT else {"Q5_1": "q8", "F32": "f32"}[kind],
        "q4": "q4" if kind == "Q4_0" else "q4 with minima",
    }.get(weights, weights)
    opened = open_model(str(tmp_path / "model.gguf"))
    assert kept(opened, weights) == ({kind: name}, matrix_nbytes(model))
    for names, linear in linears(model):
        kinds = {"f32"} if isinstance(linear, FloatLinear) else {NAMES[part.kind] for part in linear.parts}
        assert kinds == {name}
        want = np.concatenate([read_back(values[each], kind) for each in names])
        steps = {"f32": 0, "bf16": 2.0**-7, "f16": 2.0**-10, "q8": 1 / 127, "q4": 1 / 8, "q4 with minima": 2 / 15}[name]
        largest = np.repeat(np.abs(want).reshape(len(want), -1, 32).max(axis=2), 32, axis=1)
        lossless = name == "f32" or (kind in KEPT and name == NAMES[KEPT[kind]])
        error = np.abs(all_rows(linear) - want)
        assert (error <= (0 if lossless else 0.51 * steps * largest)).all()


@pytest.mark.parametrize("weights", ["q8", "q4", "bf16"])
def test_a_tied_head_is_packed_once(folder: Callable[[Change], str], weights: str) -> None:
    def tie(tensors: dict[str, NDArray[Any]], config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = True
        del tensors["lm_head.weight"]

    held = load(folder(tie), weights).transformer.weights
    assert isinstance(held.head, PackedLinear) and isinstance(held.embedding, PackedLinear)
    assert held.head.parts[0].data is held.embedding.parts[0].data
    assert held.head.before is not None and held.embedding.before is None


# --- Logits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("policy", [CachePolicy(window=32), CachePolicy.full()], ids=["4 bits", "full"])
def test_logits_are_the_same_bits_however_a_text_is_cut(
    models: Callable[[str], Model], threads: Callable[[int], None], name: str, policy: CachePolicy
) -> None:
    """Token by token, in chunks and at once, by one thread and by two; with codes in the cache, which amplify rounding."""
    model = models(name)
    ids = ids_for(model)
    want = logits(model, ids, policy)
    assert np.isfinite(want).all() and want.std() > 0.5
    for count in range(1, min(2, numba.config.NUMBA_NUM_THREADS) + 1):
        threads(count)
        for chunk in (1, 7, 64, 512):
            np.testing.assert_array_equal(logits(model, ids, policy, chunk), want)


class Oracle:
    """A layer of the same weights in float64. Behind ``rounds``, what meets codes is rounded as the kernels do it."""

    def __init__(self, linear: Linear, rounds: bool) -> None:
        assert isinstance(linear, PackedLinear | FloatLinear)
        self.rows, self.columns, self.nbytes = linear.rows, linear.columns, linear.nbytes
        self._weight, self._bias, self._before = all_rows(linear).astype(np.float64), linear.bias, linear.before
        self._rounded = np.zeros(self.rows, bool)
        if rounds and isinstance(linear, PackedLinear):
            self._rounded = np.concatenate([np.full(part.rows, part.kind in CODES) for part in linear.parts])

    def take(self, ids: NDArray[np.int64], out: Float32) -> Float32:
        out[:] = self._weight[ids]
        return out

    def __call__(self, values: Float32) -> Float32:
        x = values.astype(np.float64)
        if isinstance(self._before, Norm):
            root = np.sqrt((x * x).mean(axis=1, keepdims=True) + self._before.eps)
            x = x / root * self._before.weight
        elif self._before is not None:
            gate, up = np.split(x, 2, axis=1)
            x = gate / (1 + np.exp(-gate)) * up
        groups = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
        steps = np.abs(groups).max(axis=2, keepdims=True) / 127
        rounded = (np.rint(groups / steps) * steps).reshape(len(x), -1)[:, : self.columns]
        y = np.where(self._rounded, rounded @ self._weight.T, x @ self._weight.T)
        return (y if self._bias is None else y + self._bias).astype(np.float32)


def oracle(model: Model, *, rounds: bool) -> Model:
    """The same model with layers in float64."""

    def of(linear: Linear) -> Oracle:
        return Oracle(linear, rounds)

    held = model.transformer.weights
    layers = [replace(x, qkv=of(x.qkv), o=of(x.o), mlp=MLP(of(x.mlp.gate_up), of(x.mlp.down))) for x in held.layers]
    weights = Weights(of(held.embedding), layers, of(held.head))
    return replace(model, transformer=Transformer(model.config, weights))


def log_softmax(x: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def share_of_near_logits(model: Model) -> float:
    """Of the tokens of short texts, how many have the logits of layers in float64 with rounded activations, to 1e-5.

    A number halfway between two codes may fall to the other side, which everything behind it feels.
    """
    other, near = oracle(model, rounds=True), []
    for ids in ids_for(model, 160).reshape(20, 8):
        want, found = logits(other, ids, CachePolicy.full()), logits(model, ids, CachePolicy.full())
        near += (np.abs(found - want).max(axis=1) <= 1e-5 * np.abs(want).max()).tolist()
    return float(np.mean(near))


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_layers_in_float64_with_rounded_activations(
    models: Callable[[str], Model], name: str
) -> None:
    model = models(name)
    has_codes = model.transformer.weights.head.parts[0].kind in CODES
    assert share_of_near_logits(model) >= (0.8 if has_codes else 1)


@pytest.mark.parametrize("part", ["0.self_attn.k_proj", "1.self_attn.v_proj", "0.mlp.up_proj", "1.self_attn.o_proj"])
def test_a_part_in_float32_stays_that_beside_parts_in_codes(tmp_path: Path, part: str) -> None:
    """A layer of float32 alone is NumPy's; neither loses a bit of any part."""
    types = {f"{part}.weight": "F32", ".weight": "Q4_1"}
    values, model = tensors(), load(str(write_model(tmp_path / "model.gguf", types)))
    for names, linear in linears(model):
        want = [read_back(values[name], type_of(name, types)) for name in names]
        if f"model.layers.{part}.weight" not in names or len(names) > 1:
            assert isinstance(linear, PackedLinear)
            assert {held.kind for held in linear.parts} == {
                WF32 if type_of(name, types) == "F32" else W4M for name in names
            }
        else:
            assert isinstance(linear, FloatLinear)
        np.testing.assert_array_equal(all_rows(linear), np.concatenate(want))
    assert share_of_near_logits(model) >= 0.8


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_near_those_of_the_same_weights_in_float64(models: Callable[[str], Model], name: str) -> None:
    """Rounding to 127ths of the largest of 32 numbers, some 2.1 deviations, moves each by 2.1 / 127 / sqrt(12), half a
    percent. Four products a layer and the head do so, in layers of random weights whose attention makes up to four times
    as much of it (0.054 of the logits' deviation of tiny_llama, which has 13 products). KL is about half the square.
    """
    model = models(name)
    ids, policy = ids_for(model), CachePolicy.full()
    found, want = (logits(x, ids, policy) for x in (model, oracle(model, rounds=False)))
    log_p, log_q = log_softmax(want), log_softmax(found)
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    if model.transformer.weights.head.parts[0].kind not in CODES:
        assert divergence.max() <= 1e-9
        return
    products = 4 * model.config.num_hidden_layers + 1
    noise = 4 * 0.005 * np.sqrt(products) * want.std()
    assert 1e-6 < divergence.mean() <= noise**2


# --- What is refused -----------------------------------------------------------------------------------------------------

NAN, INFINITY = np.array([np.nan, np.inf], np.float16).view(np.uint8).reshape(2, 2)


def damaged(path: Path, kind: str, name: str, row: int, first_byte: int, number: NDArray[np.uint8]) -> str:
    """The small model with one number of one tensor replaced, in the row that llama.cpp has at that place."""

    def change(tensor: str, raw: NDArray[np.generic]) -> None:
        if tensor == name:
            raw.view(np.uint8)[row, first_byte : first_byte + len(number)] = number

    return str(write_model(path / "damaged.gguf", kind, change))


@pytest.mark.fault("nan-weights")
@pytest.mark.parametrize(
    ("kind", "name", "first_byte", "number", "message"),
    [
        ("Q4_1", "model.layers.1.mlp.up_proj.weight", 20, NAN, "1 NaN and 0 infinite values, the first at [5, 1]"),
        ("Q4_1", "model.layers.1.mlp.up_proj.weight", 22, INFINITY, "0 NaN and 1 infinite values, the first at [5, 1]"),
        ("Q4_1", "lm_head.weight", 2, NAN, "1 NaN and 0 infinite values, the first at [5, 0]"),
        ("Q4_0", "model.layers.0.self_attn.v_proj.weight", 0, NAN, "1 NaN and 0 infinite values, the first at [5, 0]"),
        # Row 5 of llama.cpp's is the second of the third pair
        ("Q4_0", "model.layers.0.self_attn.q_proj.weight", 18, NAN, "1 NaN and 0 infinite values, the first at [6, 1]"),
        ("Q8_0", "model.embed_tokens.weight", 34, INFINITY, "0 NaN and 1 infinite values, the first at [5, 1]"),
        ("Q5_1", "model.layers.1.mlp.down_proj.weight", 48, NAN, "32 NaN and 0 infinite values, the first at [5, 64]"),
        ("F16", "model.layers.0.mlp.gate_proj.weight", 6, NAN, "1 NaN and 0 infinite values, the first at [5, 3]"),
        ("BF16", "model.layers.0.mlp.gate_proj.weight", 6, np.array([0x80, 0xFF], np.uint8),
         "0 NaN and 1 infinite values, the first at [5, 3]"),
    ],
)  # fmt: skip
def test_check_weights_finds_scales_and_numbers_that_are_not_finite(
    tmp_path: Path, kind: str, name: str, first_byte: int, number: NDArray[np.uint8], message: str
) -> None:
    """In the very scales that are kept, or in the numbers that they stand for where those are converted."""
    path = damaged(tmp_path, kind, name, 5, first_byte, number)
    with pytest.raises(ModelError) as caught:
        load(path, check_weights=True)
    assert str(caught.value) == f"{path}: tensor {name} holds {message}"
    result = CliRunner().invoke(cli.app, ["generate", "AB", "-m", path, "--check-weights", "-q"])
    assert (result.exit_code, result.stdout) == (3, "") and f"tensor {name} holds {message}" in result.stderr
    with pytest.raises(ModelError, match=rf"tensor {name} holds"):
        load(path, "f32", check_weights=True)


@pytest.mark.parametrize("kind", KEPT)
def test_check_weights_has_nothing_against_sound_weights(tmp_path: Path, kind: str) -> None:
    path = str(write_model(tmp_path / "model.gguf", kind))
    for weights in WEIGHTS:
        checked, model = load(path, weights, check_weights=True), load(path, weights)
        for (names, one), (_, other) in zip(linears(checked), linears(model), strict=True):
            np.testing.assert_array_equal(all_rows(one), all_rows(other), err_msg=str(names))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_scale_that_is_not_a_number_is_no_answer_where_nobody_looked_for_it(tmp_path: Path, kind: str) -> None:
    model = load(damaged(tmp_path, kind, "model.layers.1.self_attn.o_proj.weight", 3, 0, NAN))
    with pytest.raises(NumericalError, match="positions 0 to 4: layer 1 gives NaN or infinity"):
        Session(model).forward([1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    ("weights", "number", "format_name"),
    [("q8", 127 * 65520, "q8"), ("q8", np.nan, "q8"), ("q4", 15 * 65520, "q4 with minima"),
     ("q4", -65520, "q4 with minima"), ("q4", np.inf, "q4 with minima")],
)  # fmt: skip
@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj", "model.embed_tokens", "model.layers.0.self_attn.k_proj"]
)
def test_weights_that_codes_cannot_hold_are_refused_by_name(
    folder: Callable[[Change], str], weights: str, number: float, format_name: str, name: str
) -> None:
    def enlarge(tensors: dict[str, NDArray[Any]], _: dict[str, Any]) -> None:
        tensors[f"{name}.weight"][3, 40] = number

    path = folder(enlarge)
    with pytest.raises(ModelError) as caught:
        load(path, weights)
    message = str(caught.value)
    assert f"tensor '{name}.weight' cannot be kept in {format_name}: values up to" in message and "\n" not in message
    assert message.endswith("whose scale is beyond float16")
    load(path, "bf16")


# --- The default model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default_packed(default_model_path: Path) -> Model:
    """The default model as it is stored: Q4_1, and Q8_0 for the embedding, which is the output head, too."""
    return mixkv.load(str(default_model_path))


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return json.loads((DATA / "smollm2_reference.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text(reference: dict[str, Any]) -> NDArray[np.int64]:
    return np.array(reference["perplexity"]["ids"])


@pytest.mark.model
def test_the_default_models_logits_are_the_same_bits_however_a_text_is_cut(
    default_packed: Model, threads: Callable[[int], None], text: NDArray[np.int64]
) -> None:
    assert {x.parts[0].kind for _, x in linears(default_packed)} == {W4M, W8}
    ids, policy = text[:200], CachePolicy(window=32)
    want = logits(default_packed, ids, policy, 200)
    for count in range(1, min(2, numba.config.NUMBA_NUM_THREADS) + 1):
        threads(count)
        for chunk in (1, 7, 64) if count > 1 else (64, 200):
            np.testing.assert_array_equal(logits(default_packed, ids, policy, chunk), want)


@pytest.mark.model
def test_the_default_models_perplexity_is_that_of_float32_within_half_a_percent(
    default_packed: Model, reference: dict[str, Any], text: NDArray[np.int64]
) -> None:
    """As transformers computed it in float32 with the same weights."""
    found = log_softmax(logits(default_packed, text, CachePolicy.full()))
    mean = -found[np.arange(len(text) - 1), text[1:]].mean()
    assert np.exp(mean) == pytest.approx(reference["perplexity"]["perplexity"], rel=0.005)
