# ruff: noqa: E501 - a snippet of a template is one line
"""Chat templates: real ones and every part of their language come out as plain jinja2 writes them."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mixkv.models.chat import ChatTemplate
from mixkv.models.errors import PromptError
from mixkv.models.limits import MAX_CHAT_DEPTH, MAX_PROMPT_BYTES

FOLDER = Path(__file__).parent.parent / "data" / "chat_templates"
REAL = {path.stem: path.read_bytes().decode() for path in sorted(FOLDER.glob("*.jinja"))}
SMOLLM2, CHATML, QWEN3, LLAMA31 = (REAL[name] for name in ("smollm2", "chatml", "qwen3", "llama31"))

USER = {"role": "user", "content": "  Hi <b>& 'you'</b>\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm \U0001f600\n</think>\n\nHello."}
CONVERSATIONS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, ANSWER, {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"}],
    [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER],
    [USER, ANSWER],
]

# What plain jinja2 and we must agree on, beyond what the real templates use
SNIPPETS = [
    "{{ 1 + 2 * 3 - 4 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 7 % 4 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ -3 + +2 }} {{ 9**9**9 }}",
    "{{ 'a' ~ 1 ~ none ~ [1, 'x'] ~ nothing ~ 2.5 }} {{ 'ab' * 3 }} {{ [1] * 2 + [3] }} {{ (1, 2) + (3,) }}",
    "{{ 1 < 2 < 3 }} {{ 3 > 2 > 5 }} {{ 'a' in 'abc' }} {{ 'z' not in ['a'] }} {{ 'k' in {'k': 1} }} {{ 1 == 1.0 != 2 }}",
    "{{ 'x' in nothing }} {{ messages[0] in messages }} {{ messages == messages }} {{ 3 in range(5) }} {{ none in [none] }}",
    "{{ 'abcdef'[1:4] }} {{ 'abcdef'[::-2] }} {{ [1,2,3][:-1] }} {{ messages[-1]['role'] }} {{ messages[0].nothing }}|",
    "{{ {'a': [1, (2, none)], 'b': {1: true}} }} {{ {'a b': '\\'\"<>&\\u00e9'} | tojson }}",
    "{{ [1, {'k': '<&>\u00e9'}] | tojson(indent=2) }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}",
    "{{ '\u00e9' | tojson(ensure_ascii=true) }} {{ messages | tojson }}",
    "{% for i in range(10) if i % 2 %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% else %}no{% endfor %}",
    "{% for x in [] %}{% else %}none{% endfor %}{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role if not loop.first }}>{{ (loop.nextitem|default({})).role }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}",
    "{% for m in [1, [2, [3]]] recursive %}{{ loop(m) if m is sequence else m }}@{{ loop.depth }}{% endfor %}",
    "{% macro m(a, b='x') %}<{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{{ caller() if caller }}>{% endmacro %}"
    "{{ m(1) }}{{ m(1, 2, 3, c=4) }}{% call m('q') %}inner{% endcall %}",
    "{% macro outer(x) %}{{ x|upper }}{{ inner(x) }}{% endmacro %}{% macro inner(x) %}[{{ x }}]{% endmacro %}{{ outer('a') + 'b' }}",
    "{% set x %}a{{ 1 }}b\n{% endset %}{{ x|length }}{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set y | upper %}abc{% endset %}{{ y }}",
    "{% set ns = namespace(n=0, l=[]) %}{% for i in range(4) %}{% set ns.n = ns.n + i %}{% set ns.l = ns.l + [i] %}{% endfor %}{{ ns.n }}{{ ns.l }}",
    "{% with a = 1 %}{{ a }}{% endwith %}{{ a is defined }}{% filter upper %}abc{% endfilter %}{% raw %}{{ x }}{% endraw %}{# c #}",
    "{{ '  a b '.strip() }}|{{ ' a '.lstrip() }}|{{ 'a,b,c'.split(',', 1) }}|{{ 'a b  c'.split() }}|{{ 'a\\nb'.splitlines() }}",
    "{{ 'abcabc'.replace('b', 'XY') }} {{ 'abcabc'.replace('b', '', 1) }} {{ 'abc'.find('c') }} {{ 'abca'.rfind('a') }} {{ 'aXa'.lower().count('a') }}",
    "{{ ','.join(['a', 'b']) }} {{ 'abc'.startswith(('x', 'a')) }} {{ 'a.b'.partition('.') }} {{ 'xab'.removeprefix('x') }} {{ 'Ab c'.title() }}",
    "{{ {'a': 1}.get('a') }} {{ {'a': 1}.get('b', 'd') }} {{ {'a': 1}.keys()|list }} {{ {'a': 1}.values()|list }} {{ [3, 1, 3].count(3) }} {{ [3, 1].index(1) }}",
    "{{ messages | map(attribute='role') | join(', ') }} {{ messages | map('length') | sum }} {{ ['a', 'b'] | map('upper') | list }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ messages | rejectattr('role', 'eq', 'user') | map(attribute='role') | list }}",
    "{{ [1, 2, 3, 4] | select('odd') | list }} {{ [1, none] | reject('none') | list }} {{ [0, 1] | select | list }} {{ 'yes' if messages | select }}",
    "{{ [3, 1, 2] | sort }} {{ [3, 1, 2] | sort(reverse=true) | first }} {{ messages | sort(attribute='role') | last }} {{ ['b', 'A', 'b'] | unique | list }}",
    "{{ {'b': 1, 'a': 2} | dictsort }} {{ {'b': 1} | items | list }} {{ [1, 5, 2] | max }} {{ [4, 2] | min }} {{ [1, 2] | sum(start=10) }} {{ [1, 2] | reverse | list }} {{ 'ab' | reverse }}",
    "{{ nothing | default('d') }} {{ '' | default('d', true) }} {{ 'x' | d('y') }} {{ '3' | int + 1 }} {{ '2.5' | float }} {{ 'z' | int(7) }} {{ -3 | abs }} {{ 2.567 | round(1) }}",
    "{{ 'a b' | capitalize }} {{ 'a b' | title }} {{ 'AB' | lower }} {{ ' x ' | trim }} {{ 'xax' | trim('x') }} {{ 12 | string | length }} {{ 'abc' | list }} {{ [1] | string }} {{ '<' | safe }}",
    "{{ 'aXbXc' | replace('X', '-') }} {{ 'aXbXc' | replace('X', '-', 1) }} {{ ['a', 1] | join('<') }} {{ 'a\\nb\\n\\nc' | indent(2) }} {{ 'a\\nb' | indent('> ', true) }}",
    "{{ 1 is number }}{{ 'a' is string }}{{ none is none }}{{ {} is mapping }}{{ [] is iterable }}{{ 'a' is sequence }}{{ true is boolean }}{{ x is undefined }}{{ 4 is divisibleby 2 }}{{ 'a' is in ['a'] }}{{ 'A' is upper }}",
    "{{ '%s is %d and %.2f%%' % ('x', 3, 2.5) }} {{ 'x' if false }}| {{ 'a' if messages else 'b' }} {{ not true or false and 1 }}",
    "{% generation %}kept{% set inside = 1 %}{% endgeneration %}\n{% if true %}\n  trimmed\n{% endif %}\nend\n\n",
    "{{ dict(a=1, **{'b': 2}) }} {{ messages[0].items() | list }} {{ bos_token }}{{ eos_token }} {{ unk_token is defined }} {{ tools is none }} {{ documents }}",
]


def plain(source, messages, **variables):
    """The text that jinja2 makes when it is set up like in transformers and nothing is bounded."""

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    source = source.replace("{% generation %}", "{% if true %}").replace("{% endgeneration %}", "{% endif %}")
    known = {"tools": None, "documents": None, "add_generation_prompt": True}
    return environment.from_string(source).render(messages=messages, **{**known, **variables})


def test_the_templates_are_there():
    assert len(REAL) == 7


@pytest.mark.parametrize("ask", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("source", REAL.values(), ids=REAL)
def test_real_templates_render_as_plain_jinja2_does(source, messages, ask):
    expected = plain(source, messages, add_generation_prompt=ask, bos_token="<s>", eos_token="</s>")
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    assert template.render(messages, add_generation_prompt=ask) == expected
    assert template.render(tuple(messages), add_generation_prompt=ask) == expected  # a template renders many times


def test_smollm2_prompt_written_out():
    assert ChatTemplate(SMOLLM2).render([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("source", SNIPPETS)
def test_language_of_templates_means_what_it_means_in_jinja2(source):
    messages = CONVERSATIONS[3]
    assert ChatTemplate(source, bos_token="<s>").render(messages) == plain(source, messages, bos_token="<s>")


@given(st.text(), st.text(max_size=20))
@settings(max_examples=25, deadline=None)
def test_any_content_comes_through_untouched(content, role):
    messages = [{"role": role, "content": content}] * 2
    for source in (SMOLLM2, CHATML, QWEN3):
        assert ChatTemplate(source).render(messages) == plain(source, messages)


def test_a_long_conversation_fits_the_budget():
    messages = [USER, ANSWER] * 2_500
    assert ChatTemplate(QWEN3).render(messages) == plain(QWEN3, messages)
    messages = [{"role": "user", "content": "x y\n" * 250_000}, ANSWER]
    assert ChatTemplate(LLAMA31).render(messages) == plain(LLAMA31, messages, bos_token="")


def test_what_a_template_cannot_be_given_is_refused_by_name():
    template = ChatTemplate(SMOLLM2)
    nested = value = []
    for _ in range(MAX_CHAT_DEPTH):
        nested.append([])
        nested = nested[0]
    for message, problem in (
        ({"content": b"a"}, "message 1: 'content': must be text, a number, a list or a mapping of these, found bytes"),
        ({"content": {1}}, "message 1: 'content': must be .*, found set"),
        ({"content": float("nan")}, "message 1: 'content': must be .*, found nan"),
        ({"content": 1 << 70}, "message 1: 'content': must be .*, found a number that is too large"),
        ({"content": {3: "x"}}, "message 1: 'content': the name of a field must be text, found int"),
        ({4: "x"}, "message 1: the name of a field must be text, found int"),
        ({"content": value}, f"message 1: 'content': nested deeper than {MAX_CHAT_DEPTH}"),
    ):
        with pytest.raises(PromptError, match=problem):
            template.render([USER, message])
    with pytest.raises(PromptError, match="message 0: must be a mapping, found str"):
        template.render(["hi"])
    with pytest.raises(PromptError, match="tools: must be text, .*, found object"):
        template.render([USER], tools=[object()])
    with pytest.raises(PromptError, match="'messages' has a meaning of its own"):
        template.render([USER], variables={"messages": []})
    with pytest.raises(PromptError, match=f"at most {MAX_PROMPT_BYTES}"):
        template.render([{"role": "user", "content": "x" * (MAX_PROMPT_BYTES + 1)}])
    with pytest.raises(PromptError, match=f"at most {MAX_PROMPT_BYTES}"):
        template.render([{"role": "user", "content": ["x" * 1_000_000] * 17}])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), 1 << 63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(JSON, JSON)
@settings(max_examples=50, deadline=None)
def test_any_json_reaches_the_template_as_it_is(content, variable):
    source = "{{ messages[0].content | tojson }} {{ x | tojson(indent=2) }} {{ tools | tojson }} {{ x }}"
    found = ChatTemplate(source).render([{"content": content}], tools=[content], variables={"x": variable})
    assert found == plain(source, [{"content": content}], tools=[content], x=variable)


def test_a_template_tells_which_names_it_looks_at():
    source = (
        "{% if not thinking is defined %}{% set thinking = 1 %}{% endif %}{% macro m(a) %}{{ tools }}{% endmacro %}"
    )
    assert {"thinking", "tools"} <= ChatTemplate(source).names
    assert "enable_thinking" not in ChatTemplate(SMOLLM2).names


def test_the_caller_s_messages_are_out_of_reach():
    class Sneaky(dict):
        def keys(self):
            raise AssertionError("code of the caller's types must not run inside a template")

    messages = [Sneaky(role="user", content="Hi")]
    assert ChatTemplate("{{ messages[0].keys()|join }}").render(messages) == "rolecontent"
