"""The shape of the project: which way imports point, what ships in the wheel, and that public names are documented."""

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import mixkv

ROOT = Path(mixkv.__file__).parent
LAYERS = ["kernels", "models", "engine", "cli"]  # each may import those before it
KERNELS_MAY_IMPORT = {"numpy", "numba", "llvmlite", "ml_dtypes", "platformdirs"}
MODULES = [
    ROOT / "__init__.py",
    ROOT / "cli.py",
    *(p for part in LAYERS[:3] for p in sorted((ROOT / part).rglob("*.py"))),
]
NAMES = [str(path.relative_to(ROOT)) for path in MODULES]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The modules that a file imports, anywhere in it: (full name, whether it is for type checkers only)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    package = ("mixkv", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (start, node.module)))
            yield from ((f"{base}.{alias.name}", id(node) in typing_only) for alias in node.names)


def layer_of(module: str) -> int | None:
    """The number of the layer that a module of ours belongs to; None for anybody else's."""
    parts = module.split(".")
    return LAYERS.index(parts[1]) if parts[0] == "mixkv" and len(parts) > 1 and parts[1] in LAYERS else None


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_imports_point_one_way(path: Path) -> None:
    own = layer_of(".".join(("mixkv", *path.relative_to(ROOT).with_suffix("").parts)))
    for module, _ in imports(path):
        assert module.split(".")[0] not in LAYERS, f"{path}: import {module} relatively"
        layer = layer_of(module)
        assert own is None or layer is None or layer <= own, f"{path} imports {module}, which lies above it"


def test_kernels_import_only_what_they_may() -> None:
    for path in sorted((ROOT / "kernels").glob("*.py")):
        foreign = {m.split(".")[0] for m, _ in imports(path)} - {"mixkv"} - set(sys.stdlib_module_names)
        assert foreign <= KERNELS_MAY_IMPORT, (path, foreign)


def test_the_walk_would_notice_an_upward_import(tmp_path: Path) -> None:
    assert layer_of("mixkv.engine.cache") > layer_of("mixkv.kernels.flash") >= 0
    assert ("mixkv.kernels.flash.attend", False) in set(imports(ROOT / "engine" / "cache.py"))


@pytest.mark.parametrize("module", ["mixkv", "mixkv.models.errors", "mixkv.models.hub", "mixkv.cli"])
def test_importing_the_outside_does_not_import_numba(module: str) -> None:
    code = f"import sys, {module}; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_package_ships_in_the_wheel() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for part in LAYERS[:3] for path in (ROOT / part).rglob("__init__.py")}
    assert listed == {"mixkv", *(".".join(("mixkv", *folder.parts)) for folder in folders)}


def test_only_package_files_lie_at_the_root() -> None:
    """Every .py at the root ships in the wheel."""
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "cli.py"}


def test_the_version_is_the_installed_one() -> None:
    assert importlib.metadata.version("mixkv") == mixkv.__version__


def test_lazy_names_resolve_and_others_do_not() -> None:
    for name in mixkv.__all__:
        assert getattr(mixkv, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = mixkv.no_such_name


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), path
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name}"
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        assert ast.get_docstring(method), f"{path}: {node.name}.{method.name}"
