"""Which tests are of which fault of docs/security.md: reads the marks ``fault(...)`` of all tests.

python tests/faults.py      prints every fault with its tests; ``pytest -m fault`` runs them all
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def faults() -> dict[str, list[str]]:
    """The node ids of the tests of each fault, without their parameters: {"pickles": ["tests/test_x.py::test_y"]}."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name, test in _marks(path):
            tests = found.setdefault(name, [])
            if test not in tests:
                tests.append(test)
    return dict(sorted(found.items()))


def _marks(path: Path) -> Iterator[tuple[str, str]]:
    """(fault, node id) of every mark in a file: of a test, of one of its parameters, or of the whole file."""
    tree, where = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(ROOT).as_posix()
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    for test in tests:
        for name in _names(*test.decorator_list):
            yield name, f"{where}::{test.name}"
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            for name in _names(node.value):
                yield from ((name, f"{where}::{test.name}") for test in tests)


def _names(*nodes: ast.AST) -> Iterator[str]:
    """The texts in calls of ``fault``, or of ``case``, which makes a parameter that is so marked."""
    for call in (node for each in nodes for node in ast.walk(each) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        if called == "pytest.mark.fault":
            yield from (x.value for x in call.args if isinstance(x, ast.Constant))
        elif called == "case" and isinstance(call.args[0], ast.Constant):
            yield call.args[0].value


if __name__ == "__main__":
    for name, tests in faults().items():
        print(name)
        for test in tests:
            print(f"    {test}")
