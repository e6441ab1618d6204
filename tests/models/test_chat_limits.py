"""Chat templates that try to escape or to take all time and memory are refused, within limits of both."""

import time
import tracemalloc

import pytest

from mixkv.models.chat import ChatTemplate
from mixkv.models.chat_budget import Budget
from mixkv.models.errors import PromptError
from mixkv.models.limits import MAX_TEMPLATE_BYTES, MAX_TEMPLATE_NODES, MAX_TEMPLATE_STEPS

USER = {"role": "user", "content": "Hi"}

ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'] }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{0.__class__}'.format_map({}) }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|sort(attribute='__class__') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{% macro m() %}{% endmacro %}{{ m.__call__.__func__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func }}",
    "{% for m in messages %}{{ loop._iterator }}{% endfor %}",
    "{{ dict.fromkeys('ab') }}",
    "{{ (1).__class__ }}",
    "{{ (1).to_bytes(1000000000, 'big') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ 'x'.encode() }}",
    "{{ environment.tick }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% autoescape true %}{% endautoescape %}",
]


@pytest.mark.fault("chat-template")
@pytest.mark.parametrize("source", ESCAPES)
def test_a_chat_template_that_tries_to_escape_is_refused(source):
    with pytest.raises(PromptError, match=r"^chat template: [^\n]+$"):
        ChatTemplate(source).render([USER])


def grown(step, start="'aa'", then="{{ n.x|length }}", rounds=60):
    """A template that applies a step to n.x again and again."""
    return "{% set n = namespace(x=" + start + ") %}{% for i in range(" + f"{rounds}) %}}{step}{{% endfor %}}" + then


# Refused for the memory they would take
MEMORY_BOMBS = [
    "{{ 'a'*10**8 }}",
    "{{ [0]*10**9 }}",
    grown("{% set n.x = n.x ~ n.x %}"),
    grown("{% set n.x = n.x + n.x %}"),
    grown("{% set n.x = n.x + n.x %}", start="'\U0001f600'"),
    grown("{% set n.x = n.x + n.x %}", start="[1]"),
    grown("{% set n.x = [n.x, n.x]|join %}"),
    grown("{% set n.x = n.x.replace('a', n.x + 'a') %}"),
    grown("{% set n.x = n.x|replace('', n.x) %}"),
    grown("{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
    grown("{% set n.x = [n.x, messages[0].content ~ 'a' * 1000000] %}", rounds=100),
    "{{ 9**(9**9) }}",
    "{{ (10**1000) * (10**1000) }}",
    "{{ range(10**9) }}",
    "{{ range(10**30)|list }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%(a)1000000000d' % {'a': 1} }}",
    "{{ '%1000000000d' is odd }}",
    "{{ '%1000000000d' is divisibleby 3 }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.rjust(10**9) }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ 'a\t'.expandtabs(10**9) }}",
    "{{ 'a'|center(10**9) }}",
    "{{ 'a'|indent(10**9, true) }}",
    "{{ [1]|tojson(indent=10**9) }}",
    "{{ [1]|batch(10**9, 0)|list }}",
    "{{ 2.5|round(10**9) }}",
    "{{ strftime_now('%1000000000d') }}",
    "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) }}",
    "{% set x = 'a' * 1000000 %}{{ x.join(x) }}",
    "{% set x = 'a' * 1000000 %}{{ x|join(x) }}",
    "{% set x = 'a ' * 10000000 %}{{ x.split()|length }}",
    "{% set x = 'a\n' * 10000000 %}{{ x.splitlines()|length }}",
    "{% set x = '\u0105\u0107' * 5000000 %}{{ x|list|length }}",
    "{% set x = 'a' * 10000000 %}{% for i in range(100000) %}{{ x }}{% endfor %}",
    "{% macro m() %}{% for i in range(100000) %}" + "x" * 50_000 + "{% endfor %}{% endmacro %}{{ m()|length }}",
    grown("{% set n.x = [n.x, [" + "1," * 9_000 + "]] %}", start="1", rounds=50_000),
]
# Refused for the time they would take
TIME_BOMBS = [
    "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}",
    "{% for a in range(10000) %}{% for b in range(10000) if false %}{% endfor %}{% endfor %}",
    "{% for m in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m(n) %}{{ caller() }}{% endmacro %}"
    "{% macro r() %}{% call m() %}{{ r() }}{% endcall %}{% endmacro %}{{ r() }}",
    "{% for i in range(99999) %}" + "{{ messages[0].x }}" * 2_000 + "{% endfor %}",
    "{% for i in range(99999) %}" + "{% set a = b and c %}" * 2_000 + "{% endfor %}",
    "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% set y = 'b' in x %}{% endfor %}",
    "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% set y = x|upper %}{% endfor %}",
    "{% set x = 'a' * 999999 %}{{ x.rfind('ab' + 'a' * 500000) }}",
    "{% set x = 'a' * 99999 %}{% for i in range(99999) %}{% set y = x + 'b' == x + 'c' %}{% endfor %}",
    "{% set l = ['a' * 3000000 + 'b', 'a' * 3000000 + 'c'] * 50000 %}{{ l|sort|length }}",
    "{% set a, b = namespace(k='a' * 3000000 + 'b'), namespace(k='a' * 3000000 + 'c') %}"
    "{{ ([a, b] * 50000)|sort(false, true, 'k')|length }}",
    grown("{% set n.x = [n.x, n.x] %}", then="{{ n.x }}"),
    grown("{% set n.x = [n.x, n.x] %}", then="{{ n.x|tojson }}"),
    grown("{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}", start="1, y=1", then="{{ n.x == n.y }}"),
    grown("{% set n.x = (n.x, n.x) %}", then="{{ {n.x: 1} }}"),
    grown("{% set n.x = (n.x, n.x) %}", then="{{ {}[n.x] }}"),
    grown("{% set n.x = (n.x, n.x) %}", then="{{ {}.get(n.x) }}"),
    grown("{% set n.x = (n.x, n.x) %}", then="{{ [n.x]|unique|list }}"),
    grown("{% set n.x = (n.x, n.x) %}", then="{{ dict([[n.x, 1]]) }}"),
    grown("{% set n.x = (n.x,) %}", rounds=50_000, then="{{ {n.x: 1} }}"),
]


@pytest.mark.fault("chat-template")
@pytest.mark.parametrize("source", MEMORY_BOMBS, ids=range(len(MEMORY_BOMBS)))
def test_a_chat_template_that_is_a_bomb_is_refused_in_bounded_memory(source):
    tracemalloc.start()
    try:
        with pytest.raises(PromptError, match=r"^chat template: [^\n]+$"):
            ChatTemplate(source).render([USER])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200e6


@pytest.mark.fault("chat-template")
@pytest.mark.parametrize("source", TIME_BOMBS, ids=range(len(TIME_BOMBS)))
def test_a_chat_template_that_is_a_bomb_is_refused_in_bounded_time(source):
    start = time.process_time()
    with pytest.raises(PromptError, match=r"^chat template: [^\n]+$"):
        ChatTemplate(source).render([USER])
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ x", "chat template: line 1: unexpected end of template"),
        ("\n{% foo %}", "chat template: line 2: Encountered unknown tag 'foo'"),
        ("{{ 'a'|pprint }}", "chat template: line 1: No filter named 'pprint'"),
        ("{{ 1 / 0 }}", "chat template: division by zero"),
        ("{{ x.y }}", "chat template: 'x' is undefined"),
        ("{{ raise_exception('roles\nmust alternate') }}", "chat template: roles must alternate"),
        ("{{ namespace() }}", "chat template: a Namespace cannot be written as text"),
        ("{{ 1" + "+1" * 400 + " }}", "chat template: it calls itself, or is nested, too deeply"),
        ("{{ 'a'.zfill(3) }}", "chat template: the attribute 'zfill' of a str is not allowed"),
        (
            "{% for a in range(9**6) %}{% endfor %}",
            f"chat template: a range of more than {MAX_TEMPLATE_STEPS} numbers",
        ),
        (
            "{% for a in range(3) %}{% for b in range(49999) %}{% endfor %}{% endfor %}",
            f"chat template: more than {MAX_TEMPLATE_STEPS} steps (loop iterations, and macro calls, four each)",
        ),
    ],
)
def test_failures_are_one_line_that_says_why(source, message):
    with pytest.raises(PromptError) as caught:
        ChatTemplate(source).render([USER])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 5


@pytest.mark.fault("chat-template")
def test_an_oversized_template_is_refused_before_it_is_parsed():
    with pytest.raises(PromptError, match=f"{MAX_TEMPLATE_BYTES + 1} bytes, at most {MAX_TEMPLATE_BYTES}"):
        ChatTemplate("\u00e9" + "x" * (MAX_TEMPLATE_BYTES - 1))
    ChatTemplate("x" * MAX_TEMPLATE_BYTES)
    with pytest.raises(PromptError, match=f"at most {MAX_TEMPLATE_NODES} are allowed"):
        ChatTemplate("{{a}}" * MAX_TEMPLATE_NODES)


def test_budgets_are_charged_before_the_work_is_done():
    budget = Budget()
    with pytest.raises(PromptError):
        budget.arithmetic("*", "a", 10**15)
    with pytest.raises(PromptError, match="bits"):
        Budget().arithmetic("**", 3, 10**15)
