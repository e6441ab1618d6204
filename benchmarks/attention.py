"""Check and time the kernels: `python benchmarks/attention.py`. See README.md next to this file."""

import argparse
import fnmatch
import importlib
import json
import sys
from typing import Any

COLUMNS = (
    ("median us", "seconds", 1e6, "10.1f"),
    ("best us", "best_seconds", 1e6, "10.1f"),
    ("x f16", "x_f16", 1, "6.2f"),
    ("core ns/key", "core_ns_per_key", 1, "11.2f"),
    ("MB", "bytes_read", 1e-6, "8.2f"),
    ("GB/s", "gigabytes_a_second", 1, "6.1f"),
    ("of bandw.", "of_bandwidth", 100, "8.0f%"),
    ("best", "best_of_bandwidth", 100, "5.0f%"),
    ("of dot peak", "of_dot_peak", 100, "10.0f%"),
    ("best", "best_of_dot_peak", 100, "5.0f%"),
    ("GFLOP/s", "gflops", 1, "8.0f"),
    ("of BLAS", "of_blas", 100, "6.0f%"),
    ("rounds", "rounds", 1, "6d"),
)


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Check and time the attention kernels.")
    parser.add_argument("--check", action="store_true", help="only compare every case with float64; no times")
    parser.add_argument("--cases", metavar="PATTERN", default="*", help="names to run, * and ? allowed: 'decode-d64*'")
    parser.add_argument("--peers", action="store_true", help="also time NumPy, torch and onnxruntime, where installed")
    parser.add_argument("--only-peers", action="store_true", help="time the contests with the peers and nothing else")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--rounds", type=int, default=40, help="times a case is run, at most (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="threads of everything; all cores unless given")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    options = parser.parse_args()
    options.peers |= options.only_peers
    if options.rounds < 1 or options.threads < 0:
        parser.error("--rounds must be at least 1, --threads at least 0")
    return options


def cell(value: float | None, scale: float, form: str) -> str:
    """A figure in its column; a dash where it has no meaning."""
    percent = form.endswith("%")
    form = form.rstrip("%")
    width = int(form.split(".")[0].rstrip("d")) + percent
    if value is None:
        return "-".rjust(width)
    return format(value if form.endswith("d") else value * scale, form) + "%" * percent


def print_rows(rows: list[Any]) -> None:
    """A table of the cases of one shape."""
    width = max(32, *(len(row.name) for row in rows))
    head = "  ".join(name.rjust(len(cell(None, 1, form))) for name, _, _, form in COLUMNS)
    print(f"\n{rows[0].measures:{width}}  {head}")
    for row in rows:
        values = "  ".join(
            cell(getattr(row, field), scale, form).rjust(len(name)) for name, field, scale, form in COLUMNS
        )
        print(f"{row.name:{width}}  {values}", flush=True)


def run_checks(cases: list[Any], as_json: bool) -> int:
    """Compare every case with float64; the exit code."""
    from check import check

    found = {case.name: check(case) for case in cases}
    wrong = [name for name, result in found.items() if not result.right]
    if as_json:
        print(json.dumps({name: {"error": r.error, "bound": r.bound, "unit": r.unit} for name, r in found.items()}))
    else:
        for name, result in found.items():
            verdict = "right" if result.right else "WRONG"
            print(f"{verdict}  {name:40}  {result.error:.2g} <= {result.bound:.2g} {result.unit}")
        print(f"{len(found) - len(wrong)} of {len(found)} cases are right")
    return 1 if wrong else 0


def main() -> int:
    """Run what the options say."""
    options = arguments()
    from cases import CASES, CONTESTS

    cases = [case for case in CASES if fnmatch.fnmatchcase(case.name, options.cases)]
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    if not cases and not options.only_peers:
        print(f"no case is called {options.cases!r}; --list names them", file=sys.stderr)
        return 2
    if options.check:
        return run_checks(cases, options.json)
    # Before mixkv, which sets how long OpenMP threads spin: torch is to have its own default.
    peers = importlib.import_module("peers") if options.peers else None
    import numba
    import threadpoolctl
    from machine import COLD_BYTES, Meter
    from timing import time_cases

    threads = options.threads or numba.get_num_threads()
    numba.set_num_threads(threads)
    threadpoolctl.threadpool_limits(limits=threads, user_api="blas")
    report: dict[str, Any] = {"threads": threads, "cold_bytes": COLD_BYTES, "cases": [], "peers": []}
    say = (lambda *_: None) if options.json else print
    say(
        f"Keys (and tiles and weights that are read once) lie in several copies, {COLD_BYTES / 1e6:.0f} MB or more\n"
        "of each format, read in turn: they come from memory, as in a decode step, where other layers are read in\n"
        "between, unless a table says otherwise. The cases of one table take turns."
    )
    if not options.only_peers:
        meter = Meter(threads)
        for machine, rows in time_cases(cases, meter, options.rounds):
            report["cases"] += [{**vars(row), "machine": vars(machine)} for row in rows]
            if not options.json:
                print_rows(rows)
                print(f"machine, before or after: {machine}", flush=True)
        report["machine"] = vars(meter.best)
        say(f"\nmachine, at its best in this run: {meter.best}")
    if peers:
        report["versions"] = peers.versions()
        say(f"\npeers: {report['versions']}")
        for contest in CONTESTS:
            found = peers.run(contest, threads)
            report["peers"].append(found)
            say(peers.table(found))
    if options.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
