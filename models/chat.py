"""From a conversation to a prompt, by the chat template that a model brings along.

A template is a program from a stranger. It runs in jinja2's sandbox, and within a budget of time and memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .chat_budget import Budget, refused
from .chat_data import Message, plain
from .chat_sandbox import BoundedEnvironment
from .errors import PromptError
from .limits import MAX_PROMPT_BYTES, MAX_TEMPLATE_BYTES

__all__ = ["ChatTemplate", "Message"]
_NOT_FREE = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")


class ChatTemplate:
    """A compiled chat template.

    ``source`` is jinja2 in the dialect of Hugging Face's transformers (blocks are trimmed, ``break``, ``continue`` and
    ``generation`` work, ``raise_exception``, ``strftime_now`` and ``tojson`` are there). Filters, methods and functions
    are those listed in chat_filters. ``names`` are all that it looks at by name. Raises PromptError for a template that
    is too large, malformed, or not allowed.
    """

    __slots__ = ("_code", "_tokens", "names")

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        size = len(source.encode("utf-8", "surrogatepass"))
        if size > MAX_TEMPLATE_BYTES:
            raise refused(f"{size} bytes, at most {MAX_TEMPLATE_BYTES} are allowed")
        try:
            self._code, self.names = BoundedEnvironment(Budget()).compiled(source)
        except PromptError:
            raise
        except Exception as error:  # whatever a stranger's program can provoke in a compiler
            raise refused(_reason(error)) from error
        # transformers leaves a token that a model does not have undefined
        self._tokens = {name: t for name, t in (("bos_token", bos_token), ("eos_token", eos_token)) if t}

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for these messages.

        Args:
            messages: each with "role", "content" and whatever else the template knows ("tool_calls", "name", ...): text,
                numbers, None, lists and mappings of these.
            tools: what the model may call, each as JSON schema: {"type": "function", "function": {"name": ..., ...}}.
            add_generation_prompt: end with the beginning of the assistant's answer.
            variables: what else the template may look at by name, like ``enable_thinking``.

        Raises PromptError when the template refuses the conversation, fails, or takes too long or too much memory.
        """
        conversation, size = [], 0
        for index, message in enumerate(messages):
            made, characters = plain(message, f"message {index}", mapping=True)
            conversation.append(made)
            size += characters
        functions = None
        if tools is not None:
            functions, characters = plain(list(tools), "tools")
            size += characters
        added, characters = plain(variables or {}, "variables of the chat template", mapping=True)
        if taken := [name for name in _NOT_FREE if name in added]:
            raise PromptError(f"variables of the chat template: {taken[0]!r} has a meaning of its own")
        size += characters
        if size > MAX_PROMPT_BYTES:
            raise PromptError(f"prompt: {size} characters of conversation, at most {MAX_PROMPT_BYTES} are allowed")
        given: dict[str, Any] = {
            "messages": conversation,
            "tools": functions,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
            **added,
        }
        try:
            budget = Budget(size, len(conversation) + len(functions or ()))
            return BoundedEnvironment(budget).rendered(self._code, given)
        except PromptError:
            raise
        except Exception as error:  # whatever a stranger's program can raise
            raise refused(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it calls itself, or is nested, too deeply"
    line = getattr(error, "lineno", None)  # of a syntax error
    return f"{f'line {line}: ' if line else ''}{str(error) or type(error).__name__}"
