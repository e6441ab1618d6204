"""The filters and tests that a chat template may use, charging to a budget. What is missing here does not exist."""

import json
from collections.abc import Callable
from functools import wraps
from typing import Any

from jinja2 import Undefined, pass_environment
from jinja2.filters import FILTERS, make_attrgetter, make_multi_attrgetter
from jinja2.tests import TESTS

from .chat_budget import ITEM, Budget, refused
from .chat_methods import LINE_ENDS, replaced_text, whole_text
from .limits import MAX_TEMPLATE_INDENT

# Filters


def bounded_filters(budget: Budget) -> dict[str, Callable[..., Any]]:
    """The filters by name, charging to this budget."""
    same = {name: FILTERS[name] for name in ("abs", "count", "d", "default", "first", "last", "length")}
    text = {
        name: _on_text(budget, FILTERS[name]) for name in ("capitalize", "lower", "string", "title", "trim", "upper")
    }
    items = {
        name: _on_items(budget, FILTERS[name])
        for name in ("items", "map", "reject", "rejectattr", "reverse", "select", "selectattr")
    }
    ordered = {name: _on_ordered(budget, name) for name in ("dictsort", "max", "min", "sort", "unique")}
    return {**same, **text, **items, **ordered, **_own_filters(budget)}


def _arguments(
    original: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[tuple[Any, ...], Any, tuple[Any, ...]]:
    """What jinja2 passes first (a context, say), the value, the rest."""
    skip = int(hasattr(original, "jinja_pass_arg"))
    return arguments[:skip], arguments[skip], arguments[skip + 1 :]


def _on_text(budget: Budget, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def run(*arguments: Any, **named: Any) -> Any:
        first, value, rest = _arguments(original, arguments)
        text = budget.text(value)
        whole_text(budget, text, *rest, *named.values())
        return original(*first, text, *rest, **named)

    return run


def _on_items(budget: Budget, original: Callable[..., Any]) -> Callable[..., Any]:
    """Filters that pass over their items once; done at once, as lazy ones could be nested without limit."""

    @wraps(original)
    def run(*arguments: Any, **named: Any) -> Any:
        first, value, rest = _arguments(original, arguments)
        paths = sum(len(path) for path in (*rest, *named.values()) if isinstance(path, str))
        if isinstance(value, str):
            budget.charge((ITEM + paths) * len(value))
        elif isinstance(value, dict):
            budget.charge((2 * ITEM + paths) * len(value))
        elif not isinstance(value, Undefined) and value is not None:
            value = budget.drained(value, ITEM + paths)
        result = original(*first, value, *rest, **named)
        return result if isinstance(result, str) else iter(list(result))

    return run


def _on_ordered(budget: Budget, name: str) -> Callable[..., Any]:
    """Filters that compare their items, or one attribute of them, with each other."""
    original = FILTERS[name]
    position = 2 if name == "sort" else 1  # of the argument `attribute`, when it is not given by name
    getter = make_multi_attrgetter if name == "sort" else make_attrgetter

    @wraps(original)
    def run(*arguments: Any, **named: Any) -> Any:
        first, value, rest = _arguments(original, arguments)
        compared = value
        if not isinstance(value, Undefined | dict):
            compared = value = budget.drained(value)
            attribute = named.get("attribute", rest[position] if len(rest) > position else None)
            if attribute is not None:
                budget.charge(len(str(attribute)) * len(value))
                compared = list(map(getter(first[0], attribute), value))
        for _ in range(len(compared).bit_length() + 1):
            budget.weigh(compared)
        result = original(*first, value, *rest, **named)
        return result if isinstance(result, list) or name in ("max", "min") else iter(list(result))

    return run


def _own_filters(budget: Budget) -> dict[str, Callable[..., Any]]:
    def as_list(value: Any) -> list[Any]:
        return budget.drained(value)

    @pass_environment
    def join(environment: Any, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
        items = budget.drained(value)
        if attribute is not None:
            budget.charge(len(str(attribute)) * len(items))
            items = list(map(make_attrgetter(environment, attribute), items))
        glue = budget.text(d)
        budget.charge(len(glue) * len(items))
        return glue.join(map(budget.text, items))

    def replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, wanted, instead = budget.text(value), budget.text(old), budget.text(new)
        times = -1 if count is None else count
        replaced_text(budget, text, wanted, instead, times)
        return text.replace(wanted, instead, times)

    def indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = budget.text(value)
        size = len(width) if isinstance(width, str) else max(width, 0)
        budget.charge(2 * len(text) + (ITEM + size) * (1 + sum(map(text.count, LINE_ENDS))))
        return FILTERS["indent"](text, width, first, blank)

    def rounded(value: float, precision: int = 0, method: str = "common") -> float:
        budget.arithmetic("+", value, 0)
        if not -20 <= precision <= 20:
            raise refused("the filter 'round' takes from -20 to 20 digits")
        return FILTERS["round"](value, precision, method)

    def integer(value: Any, default: int = 0, base: int = 10) -> int:
        budget.weigh(value)
        return FILTERS["int"](value, default, base)

    def decimal(value: Any, default: float = 0.0) -> float:
        budget.weigh(value)
        return FILTERS["float"](value, default)

    @pass_environment
    def total(environment: Any, iterable: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
        items = budget.drained(iterable)
        if attribute is not None:
            budget.charge(len(str(attribute)) * len(items))
            items = list(map(make_attrgetter(environment, attribute), items))
        for item in items:
            budget.arithmetic("+", start, item)
            start = start + item
        return start

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        for option in (indent, *(separators or ())):
            if not (option is None or (isinstance(option, int) and option <= MAX_TEMPLATE_INDENT) or _short(option)):
                raise refused(
                    f"the filter 'tojson' takes at most {MAX_TEMPLATE_INDENT} spaces of indentation or separation"
                )
        budget.weigh(x, 4, 0 if indent is None else MAX_TEMPLATE_INDENT)
        written = json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        budget.charge(len(written))
        return written

    return {
        "indent": indent,
        "float": decimal,
        "int": integer,
        "join": join,
        "list": as_list,
        "replace": replace,
        "round": rounded,
        "safe": budget.text,  # nothing is escaped, so there is nothing to be marked
        "sum": total,
        "tojson": tojson,
    }


def _short(option: object) -> bool:
    return isinstance(option, str) and len(option) <= MAX_TEMPLATE_INDENT


# Tests


def bounded_tests(budget: Budget) -> dict[str, Callable[..., Any]]:
    """jinja2's own tests, those that compare or compute charging to this budget."""
    tests: dict[str, Callable[..., Any]] = dict(TESTS)  # type: ignore[arg-type]
    names = {
        "eq": ("==", "eq", "equalto"),
        "ne": ("!=", "ne"),
        "gt": (">", "gt", "greaterthan"),
        "gteq": (">=", "ge"),
        "lt": ("<", "lt", "lessthan"),
        "lteq": ("<=", "le"),
        "in": ("in",),
    }
    for comparison, spellings in names.items():
        for spelling in spellings:
            tests[spelling] = _comparing(budget, comparison)
    for name in ("odd", "even", "divisibleby"):
        tests[name] = _on_number(budget, TESTS[name])  # type: ignore[arg-type]
    for name in ("lower", "upper"):
        tests[name] = _on_text(budget, TESTS[name])  # type: ignore[arg-type]
    return tests


def _comparing(budget: Budget, comparison: str) -> Callable[[Any, Any], Any]:
    return lambda left, right: budget.compare(comparison, left, right)


def _on_number(budget: Budget, original: Callable[..., bool]) -> Callable[..., bool]:
    def run(value: Any, *rest: Any) -> bool:
        if not isinstance(value, int | float):
            raise refused(f"a number is needed, found a {type(value).__name__}")
        budget.arithmetic("%", value, rest[0] if rest else 2)
        return original(value, *rest)

    return run
