"""Prompts of ``needle``: exactly as long as asked, the key where it was asked, everything else a piece of the text."""

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

import mixkv
from mixkv.experiments.needle.task import BEYOND, FILLER, PLACES, Prompt, Prompts, Task
from mixkv.experiments.texts import default_text
from mixkv.models.bpe import BPETokenizer, byte_level_piece
from mixkv.models.errors import PromptError, UsageError
from mixkv.models.load import Model

CHAT = (Path(__file__).parents[2] / "data" / "chat_templates" / "smollm2.jinja").read_text(encoding="utf-8")
SENTENCE = re.compile(r"The pass key of the (\w+) is (\d{5})\. Remember it\.")
INTRODUCTION = "The pass key of the vault is hidden in this text. Remember it.\n\n"
QUESTION = re.compile(r"\n\nWhat is the pass key of the (\w+)\? The pass key of the \1 is")


def bpe(text: str, prefix: list[int], template: str | None = None) -> BPETokenizer:
    """A byte-level tokenizer trained on a text: words of several tokens, tokens of several words' ends."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    backend.train_from_iterator([text], trainer)
    pieces = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    return BPETokenizer(
        backend, [b"" if piece in special else byte_level_piece(piece) for piece in pieces], prefix=prefix,
        bos=(0, "<|begin|>"), eos=(2, "<|im_end|>"), chat_template=template,
    )  # fmt: skip


@pytest.fixture(scope="module")
def text() -> str:
    return default_text()[:20_000]


@pytest.fixture(scope="module", params=["bytes", "bpe", "bpe with a beginning of text"])
def model(request: pytest.FixtureRequest, text: str) -> Model:
    toy = mixkv.load("toy")
    if request.param == "bytes":
        return toy
    return replace(toy, tokenizer=bpe(text, [0] if "beginning" in request.param else []))


@pytest.fixture(scope="module")
def prompts(model: Model, text: str) -> Callable[..., Prompts]:
    """The prompts of a task, whose text is tokenized once."""
    return functools.cache(lambda *task, **options: Prompts(model, text, Task(*task, **options)))


def said(model: Model, prompt: Prompt) -> str:
    assert model.tokenizer is not None
    return model.tokenizer.decode(prompt.token_ids.tolist())


CASES = [
    (length, depth, trial)
    for length in (400, 417, 1000, 2500) for depth in (0.0, 0.1, 1 / 3, 0.5, 0.75, 1.0) for trial in range(4)
]  # fmt: skip


def test_a_prompt_is_as_long_as_asked_and_has_its_key_at_the_depth(
    model: Model, text: str, prompts: Callable[..., Prompts]
) -> None:
    assert model.tokenizer is not None
    longest = max(len(model.encode(part)) for part in re.split(r"\n|(?<=[.!?])\s", text))
    head = len(model.encode(INTRODUCTION))
    for length, depth, trial in CASES:
        prompt = prompts().make(length, depth, trial)
        assert prompt.token_ids.shape == (length,) and prompt.token_ids.dtype == np.int64
        whole = said(model, prompt)
        assert whole.startswith(INTRODUCTION) and SENTENCE.findall(whole) == [("vault", prompt.expected)]
        question = QUESTION.search(whole)
        assert question is not None and question.end() == len(whole) and question[1] == "vault"
        others = question[0], f" The pass key of the vault is {prompt.expected}. Remember it."
        filler = length - head - sum(len(model.encode(part)) for part in others)
        assert abs(prompt.position - head - depth * filler) <= longest + 3  # within one sentence or line
        told = model.tokenizer.decode(prompt.token_ids[prompt.position :].tolist()).lstrip()
        assert told.startswith(f"The pass key of the vault is {prompt.expected}. Remember it.")
        assert model.tokenizer.decode(prompt.answer_ids) == f" {prompt.expected}"


def test_nothing_but_the_sentence_is_put_into_the_text(
    model: Model, text: str, prompts: Callable[..., Prompts]
) -> None:
    """What is left without it stands in the text as it is, from the beginning of a line."""
    for trial in range(20):
        whole = said(model, prompts().make(1000, 0.4, trial)).removeprefix(INTRODUCTION)
        middle = whole[: whole.index("\n\nWhat is the pass key of the vault?")]
        found = SENTENCE.search(middle)
        assert found is not None
        before, behind = middle[: found.start()], middle[found.end() :]
        if before.endswith("\n"):  # a line of its own
            assert behind.startswith("\n")
            rest = before + behind[1:]
        else:  # behind a sentence
            assert before.endswith((". ", "! ", "? ")) and behind[:1].isspace()
            rest = before[:-1] + behind
        assert ("\n" + rest) in ("\n" + text), rest


@pytest.mark.parametrize("keys", [2, 3, 4, 20])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_several_keys_are_spread_and_one_is_asked_for(
    model: Model, prompts: Callable[..., Prompts], keys: int, depth: float
) -> None:
    prompt = prompts("multikey", keys).make(4000, depth, keys)
    assert len(prompt.token_ids) == 4000
    whole = said(model, prompt)
    found = SENTENCE.findall(whole)
    assert len(found) == keys == len({place for place, _ in found}) == len({number for _, number in found})
    question = QUESTION.search(whole)
    assert question is not None and dict(found)[question[1]] == prompt.expected
    assert {place for place, _ in found} <= set(PLACES)
    starts = [match.start() / len(whole) for match in SENTENCE.finditer(whole) if match[1] != question[1]]
    assert starts[0] < 0.5 / (keys - 1) + 0.15 and starts[-1] > 1 - 0.5 / (keys - 1) - 0.2
    own = next(match.start() for match in SENTENCE.finditer(whole) if match[1] == question[1])
    assert abs(own / len(whole) - depth) < 0.3  # other keys stand before or behind it


def test_trials_differ_and_a_seed_says_all(model: Model, text: str, prompts: Callable[..., Prompts]) -> None:
    made = {
        (seed, length, depth, trial): prompts(seed=seed).make(length, depth, trial)
        for seed in (0, 1) for length in (600, 601) for depth in (0.0, 0.5) for trial in range(5)
    }  # fmt: skip
    assert len({prompt.expected for prompt in made.values()}) > len(made) - 3  # 40 of 90,000 numbers
    assert len({prompt.token_ids.tobytes() for prompt in made.values()}) == len(made)
    anew = {seed: Prompts(model, text, Task(seed=seed)) for seed in (0, 1)}
    for (seed, *where), prompt in made.items():
        again = anew[seed].make(*where)
        assert np.array_equal(again.token_ids, prompt.token_ids)
        assert (again.expected, again.answer_ids, again.position) == (
            prompt.expected, prompt.answer_ids, prompt.position,
        )  # fmt: skip


def test_what_is_drawn_is_the_same_on_every_machine() -> None:
    """Results of one machine can be repeated on another."""
    text = "".join(f"This is line {i} of the text.\n" for i in range(200))
    prompt = Prompts(mixkv.load("toy"), text, Task(seed=7)).make(400, 0.5, 0)
    again = Prompts(mixkv.load("toy"), text, Task("multikey", 3, seed=7)).make(600, 0.5, 2)
    assert (prompt.expected, again.expected) == ("24534", "31667")


def test_a_chat_template_stands_around_it(text: str) -> None:
    model = replace(mixkv.load("toy"), tokenizer=bpe(text, [], CHAT))
    prompt = Prompts(model, text, Task(chat=True)).make(700, 0.5, 0)
    assert len(prompt.token_ids) == 700
    assert isinstance(model.tokenizer, BPETokenizer)
    ids = prompt.token_ids.tolist()
    roles = [model.tokenizer.decode(ids[i + 1 : i + 12]).split("\n")[0] for i, token in enumerate(ids) if token == 1]
    assert roles == ["system", "user", "assistant"] and ids.count(2) == 2
    answer = model.tokenizer.decode(ids[len(ids) - ids[::-1].index(1) :])
    assert answer == "assistant\nThe pass key of the vault is"
    content = model.tokenizer.decode(ids).split("user\n", 1)[1].split("assistant\n")[0].removesuffix("\n")
    rendered = model.encode_chat([{"role": "user", "content": content}])
    assert model.tokenizer.decode(rendered) + "The pass key of the vault is" == model.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("nothing of it", "does not say once"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "does not say once"),
    ],
)
def test_a_template_without_a_place_for_the_text_is_refused(text: str, template: str, words: str) -> None:
    model = replace(mixkv.load("toy"), tokenizer=bpe(text, [], template))
    with pytest.raises(PromptError, match=words):
        Prompts(model, text, Task(chat=True))


def test_lengths_that_do_not_fit_are_refused_with_what_is_allowed(model: Model, text: str) -> None:
    prompts = Prompts(model, text * 4, Task("multikey", 3))
    with pytest.raises(
        UsageError, match=r"^length must be from \d+ to \d+ tokens for task multikey.*found 50$"
    ) as caught:
        prompts.make(50, 0.5, 0)
    least = int(str(caught.value).split("from ")[1].split()[0])
    answer = len(prompts.make(least + 50, 0.5, 0).answer_ids)
    context = model.config.max_position_embeddings
    assert len(prompts.make(context - answer - BEYOND, 1.0, 0).token_ids) == context - answer - BEYOND
    with pytest.raises(
        UsageError, match=rf"to {context - answer - BEYOND} tokens.*found {context - answer - BEYOND + 1}$"
    ):
        prompts.make(context - answer - BEYOND + 1, 1.0, 0)


def test_the_least_length_is_taken() -> None:
    model, text = mixkv.load("toy"), "Some words. " * 50
    with pytest.raises(UsageError, match=r"from \d+ to") as caught:
        Prompts(model, text, Task()).make(1, 0.0, 0)
    least = int(str(caught.value).split("from ")[1].split()[0])
    parts = "The pass key of the vault is hidden in this text. Remember it.\n\n", "The pass key of the vault is 12345. "
    parts += "Remember it.\n", "\n\nWhat is the pass key of the vault? The pass key of the vault is"
    assert least == len("".join(parts)) + FILLER
    assert len(Prompts(model, text, Task()).make(least, 0.0, 0).token_ids) == least
    with pytest.raises(UsageError):
        Prompts(model, text, Task()).make(least - 1, 0.0, 0)


def test_a_text_that_is_too_short_or_has_no_place_for_a_key_is_refused() -> None:
    model = mixkv.load("toy")
    with pytest.raises(PromptError, match=r"needs up to \d+ tokens of text, found 40: give a longer text$"):
        Prompts(model, "word word " * 4, Task()).make(600, 0.5, 0)
    with pytest.raises(PromptError, match="found 0: give a longer text"):
        Prompts(model, "", Task()).make(600, 0.5, 0)
    endless = Prompts(model, "word " * 1000, Task())
    assert len(endless.make(600, 0.0, 0).token_ids) == 600  # in front of it there is a place
    with pytest.raises(PromptError, match=r"within 256 tokens of depth 0\.75"):
        endless.make(1200, 0.75, 0)


def test_a_text_is_taken_to_its_last_token() -> None:
    """The text may be just as long as it must be."""
    model, fixed = mixkv.load("toy"), len(" The pass key of the vault is 12345. Remember it.")
    rest = len("The pass key of the vault is hidden in this text. Remember it.\n\n")
    rest += len("\n\nWhat is the pass key of the vault? The pass key of the vault is")
    text = "ab. cd.\n" * 40
    longest = len(text) + fixed + rest
    assert len(Prompts(model, text, Task()).make(longest, 0.5, 0).token_ids) == longest
    with pytest.raises(PromptError, match=f"needs up to {len(text) + 1} tokens of text, found {len(text)}"):
        Prompts(model, text, Task()).make(longest + 1, 0.5, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "haystack"}, "task must be one of passkey, multikey, found 'haystack'"),
        ({"keys": 2}, "keys of task passkey must be from 1 to 1, found 2"),
        ({"name": "multikey", "keys": 1}, "from 2 to 20, found 1"),
        ({"name": "multikey", "keys": 21}, "from 2 to 20, found 21"),
        ({"name": "multikey", "keys": 2.0}, "found 2.0"),
        ({"seed": -1}, "seed must be a whole number, 0 or more, found -1"),
        ({"seed": True}, "found True"),
    ],
)
def test_a_task_out_of_range_is_refused(options: dict, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        Task(**options)


def test_a_model_without_tokenizer_or_template_is_refused() -> None:
    toy = mixkv.load("toy")
    with pytest.raises(UsageError, match="no tokenizer"):
        Prompts(replace(toy, tokenizer=None), "text", Task())
    with pytest.raises(UsageError, match="no chat template"):
        Prompts(toy, "text", Task(chat=True))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("12345", True), (" 12345. Remember it.", True), ("\n 12345\n", True), ("12345 is", True), ("12345a", True),
        ("123456", False), ("1234", False), ("", False), ("the number 12345", False), ("12346", False), ("-12345", False),
    ],
)  # fmt: skip
def test_an_answer_is_right_that_begins_with_the_digits(answer: str, right: bool) -> None:
    assert Prompt(np.zeros(1, np.int64), 0, "12345", (1,)).is_right(answer) is right
