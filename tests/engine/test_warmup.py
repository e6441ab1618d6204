"""What a session runs is made ready before it begins, where somebody can watch."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from numba.core.dispatcher import Dispatcher
import mixkv
from mixkv.kernels.warmup import warm_up

warm_up()


def kinds():
    modules = [module for name, module in sys.modules.items() if name.startswith("mixkv.kernels")]
    own = {id(x): x for module in modules for x in vars(module).values() if isinstance(x, Dispatcher)}
    return sum(len(x.signatures) for x in own.values())


model = mixkv.load("toy", sys.argv[1])
before = kinds()
session = mixkv.Session(model, mixkv.CachePolicy(window=64))
session.forward(list(range(200)), "last")
for token in range(3):
    session.forward([token], "last")
print(before, kinds())
"""


@pytest.mark.parametrize("weights", ["q8", "q4", "bf16", "f32"])
def test_a_session_compiles_nothing_that_was_not_made_ready(weights: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, weights], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.split()
    assert before == after and int(before) > 10
