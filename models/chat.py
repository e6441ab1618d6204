"""From a conversation to a prompt, by the chat template that a model brings along.

A template is a program from a stranger. It runs in jinja2's sandbox, and within a budget of time and memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .chat_budget import Budget, refused
from .chat_sandbox import BoundedEnvironment
from .errors import PromptError
from .limits import MAX_PROMPT_BYTES, MAX_TEMPLATE_BYTES


class ChatTemplate:
    """A compiled chat template.

    ``source`` is jinja2 in the dialect of Hugging Face's transformers (blocks are trimmed, ``break`` and ``continue``
    work, ``raise_exception``, ``strftime_now`` and ``tojson`` are there). Filters, methods and functions are those
    listed in chat_filters. Raises PromptError for a template that is too large, malformed, or not allowed.
    """

    __slots__ = ("_code", "_tokens")

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        size = len(source.encode("utf-8", "surrogatepass"))
        if size > MAX_TEMPLATE_BYTES:
            raise refused(f"{size} bytes, at most {MAX_TEMPLATE_BYTES} are allowed")
        try:
            self._code = BoundedEnvironment(Budget()).compiled(source)
        except PromptError:
            raise
        except Exception as error:  # whatever a stranger's program can provoke in a compiler
            raise refused(_reason(error)) from error
        # transformers leaves a token that a model does not have undefined
        self._tokens = {name: t for name, t in (("bos_token", bos_token), ("eos_token", eos_token)) if t}

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The prompt for these messages (each with "role", "content" and whatever text else the template knows).

        ``add_generation_prompt`` ends it with the beginning of the assistant's answer. Raises PromptError when the
        template refuses the conversation, fails, or takes too long or too much memory.
        """
        conversation = _checked(messages)
        size = sum(len(name) + len(text) for message in conversation for name, text in message.items())
        if size > MAX_PROMPT_BYTES:
            raise PromptError(f"prompt: {size} characters of conversation, at most {MAX_PROMPT_BYTES} are allowed")
        variables: dict[str, Any] = {
            "messages": conversation,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
        }
        try:
            return BoundedEnvironment(Budget(size, len(conversation))).rendered(self._code, variables)
        except PromptError:
            raise
        except Exception as error:  # whatever a stranger's program can raise
            raise refused(_reason(error)) from error


def _checked(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The messages as plain dicts of plain text, the only things a template gets into its hands."""
    conversation = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(f"message {index}: must be a mapping, found {type(message).__name__}")
        for name, text in message.items():
            if not isinstance(name, str) or not isinstance(text, str):
                raise PromptError(f"message {index}: {str(name)[:40]!r} must be text, found {type(text).__name__}")
        conversation.append({str(name): str(text) for name, text in message.items()})
    return conversation


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it calls itself, or is nested, too deeply"
    line = getattr(error, "lineno", None)  # of a syntax error
    return f"{f'line {line}: ' if line else ''}{str(error) or type(error).__name__}"
