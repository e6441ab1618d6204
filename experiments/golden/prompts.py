"""What golden files are recorded on: prompts as text or ids, from the user, a file, or our own."""

import json
from collections.abc import Sequence

from ...engine.policy import CachePolicy
from ...models.check import shown
from ...models.errors import PromptError
from ...models.limits import MAX_GOLDEN_PROMPTS
from ...models.load import Model

Prompt = str | list[int]
SHORT = ("The capital of France is", "def fibonacci(n):\n", "Grüße aus 東京! 1 + 2 =", "Once upon a time")
LONG = 600  # tokens, about: more than the usual window, so that codes matter


def default_prompts(model: Model, policy: CachePolicy, max_tokens: int) -> list[Prompt]:
    """Four short prompts, and one so long that codes are attended to: some 600 tokens, more for a large window.

    As much of it as fits the model's context in front of ``max_tokens``. Its text is that of the standard library's
    pydoc_data.topics. UsageError for a model without a tokenizer.
    """
    n_layers = model.config.num_hidden_layers
    each = [policy.for_layer(i, n_layers) for i in range(n_layers)]
    wanted = max(LONG, *(own.window + 2 * own.tile for own in each))
    return [*SHORT, topics_text(model, min(wanted, model.config.max_position_embeddings - max_tokens))]


def topics_text(model: Model, tokens: int) -> str:
    """The beginning of the text of pydoc_data.topics, sorted by name, of at most so many tokens, and not far below."""
    from pydoc_data.topics import topics  # half a megabyte

    text = ""
    for name in sorted(topics):
        text += topics[name] + "\n"
        ids = model.encode(text)
        if len(ids) >= tokens:
            break
    while text and (n := len(model.encode(text))) > max(tokens, 1):
        text = text[: min(len(text) - 1, len(text) * tokens // n)]
    return text


def parse_prompts(text: str, where: str) -> list[Prompt]:
    """The prompts of a file: a line each, empty ones left out; of a ``.jsonl`` file each a JSON text or list of ids.

    Raises:
        PromptError: no prompt, too many, or a line that is none; it names the file and the line.

    """
    every = enumerate((line.removesuffix("\r") for line in text.split("\n")), 1)
    lines = [(number, line) for number, line in every if line.strip()]
    if not 1 <= len(lines) <= MAX_GOLDEN_PROMPTS:
        raise PromptError(f"{where}: 1 to {MAX_GOLDEN_PROMPTS} prompts are needed, a line each, found {len(lines)}")
    if not where.endswith(".jsonl"):
        return [line for _, line in lines]
    return [_parsed(line, f"{where}: line {number}") for number, line in lines]


def _parsed(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(x) is int for x in value)):
        return value
    raise PromptError(f"{where}: a JSON text or a list of token ids is needed, found {shown(line)}")


def ids_of(model: Model, prompt: str | Sequence[int], *, chat: bool) -> list[int]:
    """The ids of a prompt: of a text raw, or as a user's turn in the chat template; ids as they are."""
    if not isinstance(prompt, str):
        return list(prompt)
    return model.encode_chat([{"role": "user", "content": prompt}]) if chat else model.encode(prompt)
