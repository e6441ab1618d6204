"""What compiling takes: every kernel anew, into an empty folder, by step of the warm-up and by function.

`python benchmarks/compiling.py` prints it. A function's own seconds are without those that are compiled for it, but with
optimizing, once more, what it contains of them.
"""

import os
import tempfile
import time
from collections import Counter
from typing import Any

from numba.core import event

MOST = 20  # functions that are printed


class Clock(event.Listener):  # type: ignore[misc]
    """Seconds and number of compilations of each function, by its own name."""

    def __init__(self) -> None:
        self.own: Counter[str] = Counter()
        self.all: Counter[str] = Counter()
        self.times: Counter[str] = Counter()
        self._open: list[list[float]] = []  # of each function that is being compiled: when it began, seconds within it

    def on_start(self, _: Any) -> None:
        """A compilation begins."""
        self._open.append([time.perf_counter(), 0.0])

    def on_end(self, event: Any) -> None:
        """It has ended, after those that began within it."""
        began, within = self._open.pop()
        seconds = time.perf_counter() - began
        function = event.data["dispatcher"].py_func
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        self.own[name] += seconds - within
        self.all[name] += seconds
        self.times[name] += 1
        if self._open:
            self._open[-1][1] += seconds


def main() -> None:
    """Compile and print."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MIXKV_CACHE"] = folder  # before the kernels are imported, which say then where they are kept
        from mixkv.kernels.warmup import warm_up

        clock, steps = Clock(), [("", time.perf_counter())]
        event.register("numba:compile", clock)
        warm_up(lambda done, total, name: steps.append((name, time.perf_counter())))
    for (name, began), (_, ended) in zip(steps[1:], steps[2:], strict=False):
        print(f"{ended - began:7.2f} s  {name}")
    print(f"{steps[-1][1] - steps[1][1]:7.2f} s  in all, {clock.times.total()} compilations\n")
    print("own s  in all  times  function")
    for name, seconds in clock.own.most_common(MOST):
        print(f"{seconds:5.2f} {clock.all[name]:7.2f} {clock.times[name]:6}  {name}")


if __name__ == "__main__":
    main()
