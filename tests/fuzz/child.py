"""The process that fuzzes: atheris around one of the targets. ``__main__`` starts it."""

import hashlib
import importlib
import pkgutil
import random
import sys
import traceback

import atheris

import mixkv.kernels
from mixkv.kernels.warmup import warm_up

for module in pkgutil.iter_modules(mixkv.kernels.__path__):
    importlib.import_module(f"mixkv.kernels.{module.name}")  # before: Numba cannot compile code with counters in it
with atheris.instrument_imports(include=["mixkv", "safetensors", "jinja2", "tomllib", "json"]):
    from .targets import TARGETS

from .__main__ import REGRESSIONS  # noqa: E402
from .bounds import MAX_FILE_NBYTES, check  # noqa: E402


def main() -> None:
    """Fuzz the target whose name comes first; the rest are a folder and options of libFuzzer."""
    name, corpus, *options = sys.argv[1:]
    target, seen = TARGETS[name], set[str]()
    warm_up()
    for data in target.seeds():
        with open(f"{corpus}/{hashlib.sha256(data).hexdigest()[:16]}", "wb") as file:
            file.write(data)
        target.run(data)  # so that what is compiled, is: it must pass, too

    def one(data: bytes) -> None:
        if len(data) > MAX_FILE_NBYTES:
            return
        try:
            check(target.run, data)
        except Exception as error:
            _keep(name, data, error, seen)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return target.mutate(data, rng, lambda some: atheris.Mutate(some, min(len(some) + 64, max_size)))[:max_size]

    atheris.Setup([sys.argv[0], corpus, *options], one, custom_mutator=mutate)
    atheris.Fuzz()


def _keep(name: str, data: bytes, error: Exception, seen: set[str]) -> None:
    """Write down the first input that fails in this way."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "mixkv" in f.filename or "tests" in f.filename]
    place = f"{type(error).__name__} {frames[-1].filename}:{frames[-1].lineno}" if frames else repr(error)
    if place in seen:
        return
    seen.add(place)
    folder = REGRESSIONS / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    text = "".join(traceback.format_exception(error))
    print(f"\nfound: {place}\n{text}", file=sys.stderr, flush=True)


main()
