"""Conversations, tools and variables that the templates of models/ are tried on, and which go with which."""

from typing import Any

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "  What <b>is</b> 'it' & \"why\"? \u00e9\u4f60\U0001f600\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is.\n"}
AGAIN = {"role": "user", "content": "And {{ 7 * 7 }} {% raw %}?"}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The weather of a place, in <degrees> & "words".',
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "A city: Z\u00fcrich, \u6771\u4eac"},
                    "days": {"type": "integer", "description": "How many", "default": 1},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["place"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "stop", "description": "Ends it.", "parameters": {"type": "object", "properties": {}}},
    },
]


def called(arguments: Any, **more: Any) -> list[dict[str, Any]]:
    """A turn that calls a tool, and what it gave back."""
    call = {"type": "function", "id": "call12345", "function": {"name": "get_weather", "arguments": arguments}} | more
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": '{"sky": "blue", "t": 21.5}'},
    ]


ARGUMENTS = {"place": "Z\u00fcrich", "days": 2, "tags": ["a<b>", "c"]}
CALLED = [USER, *called(ARGUMENTS)]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "with system": [SYSTEM, USER],
    "several turns": [USER, ANSWER, AGAIN],
    "several with system": [SYSTEM, USER, ANSWER, AGAIN],
    "ends with an answer": [USER, ANSWER],
    "a tool was called": CALLED,
    "a tool was called, with system": [SYSTEM, *CALLED, {"role": "assistant", "content": "21 degrees."}, AGAIN],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]}],
}
VARIABLES: dict[str, dict[str, Any]] = {
    "": {},
    "thinking": {"enable_thinking": True},
    "no thinking": {"enable_thinking": False},
    "date": {"date_string": "30 Nov 2026"},
    "more": {"xml_tools": ["{'name': 'f'}"], "thinking": True, "reasoning_effort": "high", "model_identity": "You are X.",
             "controls": {"length": "short"}, "builtin_tools": ["python", "browser"]},
}  # fmt: skip
NOW = (2026, 11, 29)  # what strftime_now says
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def cases() -> list[tuple[str, bool, bool, str]]:
    """(conversation, with tools, add_generation_prompt, variables): all conversations, and variables with two of them."""
    made = [(name, tools, ask, "") for name in CONVERSATIONS for tools in (False, True) for ask in (True, False)]
    for variables in list(VARIABLES)[1:]:
        for name in ("with system", "several turns"):
            made += [(name, tools, True, variables) for tools in (False, True)]
    return made
