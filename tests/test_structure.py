"""The shape of the package: who imports whom, what importing costs, what is shipped, what has no docstring."""

import ast
import importlib.metadata
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import mixkv

ROOT = Path(mixkv.__file__).parent
LAYERS = {
    "kernels": 0,
    "models": 1,
    "engine": 2,
    "experiments": 3,
    "serving": 3,
    "commands": 4,
    "testing": 4,
    "cli": 5,
    "__main__": 6,
}
KERNELS_MAY_IMPORT = {"numpy", "numba", "llvmlite", "ml_dtypes", "platformdirs"}
SKIPPED = {"tests", "build", "dist", "benchmarks", "docs"}


def package_files() -> list[Path]:
    """Every Python file of the package, relative to its root."""
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return sorted(p for p in found if p.parts[0] not in SKIPPED and not p.parts[0].startswith("."))


FILES = package_files()


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of everything that a file imports anywhere, also inside functions; our own as mixkv.*."""
    package = ["mixkv", *file.parts[:-1]]
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, node.lineno
            for alias in node.names:  # "from . import x" may name a module
                yield f"{module}.{alias.name}", node.lineno


def layer_of(module: str) -> int | None:
    """The layer of one of our own modules; None for others, and for the root itself."""
    parts = module.split(".")
    return LAYERS.get(parts[1]) if parts[0] == "mixkv" and len(parts) > 1 else None


def test_the_walk_finds_the_package_and_its_imports() -> None:
    """So that the tests below look at something."""
    assert {"cli.py", "__init__.py", "engine/layer.py", "kernels/attention.py", "models/load.py"} <= {
        file.as_posix() for file in FILES
    }
    found = {module for module, _ in imports(Path("engine/layer.py"))}
    assert {"mixkv.kernels.flash", "mixkv.models.errors", "mixkv.engine.policy", "numpy"} <= found
    assert "mixkv.models.hub" in {module for module, _ in imports(Path("models/load.py"))}
    assert layer_of("mixkv.kernels.flash") == 0 and layer_of("mixkv.cli") == 5 and layer_of("numpy") is None


@pytest.mark.parametrize("file", [f for f in FILES if f.as_posix() != "__init__.py"], ids=str)
def test_imports_point_downwards(file: Path) -> None:
    """cli -> commands, testing -> experiments, serving -> engine -> models -> kernels. The lazy root may name them all."""
    own = layer_of(".".join(["mixkv", *file.with_suffix("").parts]))
    if own is None:
        pytest.skip("not part of a layer")
    upward = [
        f"{file}:{line} imports {module}"
        for module, line in imports(file)
        if (layer := layer_of(module)) is not None and layer > own
    ]
    # What is imported from the root comes from anywhere: only the version is harmless.
    from_root = [
        f"{file}:{line} imports {module}"
        for module, line in imports(file)
        if module.startswith("mixkv.") and layer_of(module) is None and module != "mixkv.__version__"
    ]
    assert upward + from_root == []


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] == "kernels"], ids=str)
def test_kernels_import_little(file: Path) -> None:
    foreign = {
        module.split(".")[0]
        for module, _ in imports(file)
        if module.split(".")[0] not in {"mixkv", *sys.stdlib_module_names, *KERNELS_MAY_IMPORT}
    }
    assert foreign == set()


def imported_by(statement: str, env: dict[str, str]) -> set[str]:
    """The top-level modules that a fresh process has loaded after a statement."""
    program = (
        f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "statement",
    [
        "import mixkv", "import mixkv; dir(mixkv); mixkv.__version__", "from mixkv import MixkvError", "import mixkv.cli",
        "import mixkv.testing",
    ],
)  # fmt: skip
def test_importing_the_package_its_errors_the_command_line_or_the_plugin_stays_light(
    statement: str, clean_env: dict[str, str]
) -> None:
    heavy = {"numba", "llvmlite", "numpy", "tokenizers", "safetensors", "jinja2", "gguf"}
    assert imported_by(statement, clean_env) & heavy == set()


def test_importing_the_errors_alone_stays_light(clean_env: dict[str, str]) -> None:
    assert imported_by("import mixkv.models.errors", clean_env) & {"numba", "llvmlite", "numpy"} == set()


def test_the_probe_of_light_imports_sees_heavy_ones(clean_env: dict[str, str]) -> None:
    assert {"numba", "numpy"} <= imported_by("from mixkv import Session", clean_env)


def test_every_public_name_is_found_where_the_root_says() -> None:
    for name in mixkv.__all__:
        found = getattr(mixkv, name)
        assert found.__name__ == name and name in dir(mixkv)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mixkv.nothing  # type: ignore[attr-defined]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_of_the_package_is_shipped() -> None:
    """An unlisted one works in an editable install, and is missing from the wheel."""
    folders = {file.parent for file in FILES if file.name == "__init__.py"}
    expected = {".".join(["mixkv", *folder.parts]) for folder in folders}
    assert set(project()["tool"]["setuptools"]["packages"]) == expected
    without = {file.parent for file in FILES} - folders
    assert without == set(), "a folder of Python files without an __init__.py is not shipped"


def declared(lines: list[str]) -> set[str]:
    """The names of some dependencies."""
    return {line.split(">")[0].split("<")[0].split("=")[0].strip() for line in lines}


def imports_when_loaded(file: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of what a file imports outside of functions."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    inside = {
        node.lineno
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    return ((module, line) for module, line in imports(file) if line not in inside)


def test_every_import_of_others_is_declared() -> None:
    """What the package imports is the standard library or a dependency of pyproject.toml (llvmlite is Numba's).

    The plugin alone may also import pytest, which whoever runs it has; it is in the extra ``test``. What other extras bring
    is imported inside of functions, which can say what to install.
    """
    about = project()["project"]
    everywhere = declared(about["dependencies"])
    assert "pytest" in declared(about["optional-dependencies"]["test"]) - everywhere
    extras = about["optional-dependencies"]
    optional = set[str]().union(*(declared(lines) for extra, lines in extras.items() if extra != "test"))
    installed = importlib.metadata.packages_distributions()
    for file in FILES:
        at_once = {line for _, line in imports_when_loaded(file)}
        allowed = everywhere | ({"pytest"} if file == Path("testing.py") else set())
        for module, line in imports(file):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top == "mixkv":
                continue
            if optional & set(installed.get(top, [])):
                assert line not in at_once, f"{file}:{line} imports {module}, of an extra, outside of a function"
                continue
            assert top in allowed or (top == "llvmlite" and "numba" in allowed), f"{file}:{line} imports {module}"


def test_the_tests_install_what_the_extras_of_users_bring() -> None:
    extras = project()["project"]["optional-dependencies"]
    for extra, lines in extras.items():
        assert set(lines) <= set(extras["test"]), f"the extra test lacks what {extra} has"


def test_files_that_are_no_code_are_shipped() -> None:
    """Templates stand in package-data; there is no other folder of such files."""
    shipped = project()["tool"]["setuptools"]["package-data"]
    assert shipped["mixkv.experiments.report"] == ["templates/*"]
    assert {file.name for file in (ROOT / "experiments" / "report" / "templates").iterdir()} == {
        "report.html.j2",
        "report.css",
        "report.js",
    }


def public_definitions(tree: ast.Module, inside: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Public classes and functions of a module, and the public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield f"{inside}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node, f"{inside}{node.name}.")  # type: ignore[arg-type]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_everything_public_says_what_it_is(file: Path) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    silent = [name for name, node in public_definitions(tree) if not (ast.get_docstring(node) or "").strip()]  # type: ignore[arg-type]
    assert silent == []
    assert (ast.get_docstring(tree) or "").strip(), f"{file} has no docstring"


def test_the_version_is_that_of_the_installed_package() -> None:
    assert mixkv.__version__ == importlib.metadata.version("mixkv")


def test_the_package_is_marked_as_typed() -> None:
    assert (ROOT / "py.typed").is_file()
    assert "py.typed" in project()["tool"]["setuptools"]["package-data"]["mixkv"]
