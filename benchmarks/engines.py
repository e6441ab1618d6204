"""mixkv beside whole engines, on one model and one prompt: `python benchmarks/engines.py`. See README.md next to this file.

Nothing heavy is imported here: every run is a process of its own, in the Python of its engine.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import summary
from surroundings import cpu, header, machine
from turns import Engine, NotInstalledError, Test, Turn, WorkerError, bits, call, plan, run_turns

NAMES = ("mixkv", "llama.cpp", "openvino")
SPARE = 4  # tokens of the context beyond prompt and timed steps
REFERENCE = {"kind": "reference", "kv": "f32", "weights": "f32"}


def numbers(text: str) -> list[int]:
    """Numbers with commas between them, or none."""
    found = [int(part) for part in text.split(",") if part]
    if any(n < 1 for n in found):
        raise argparse.ArgumentTypeError("numbers must be at least 1")
    return found


def formats(text: str) -> tuple[str, ...]:
    """Names of cache formats with commas between them."""
    try:
        return tuple(kv for kv in text.split(",") if kv and bits(kv))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Time mixkv, llama.cpp and OpenVINO on the same GGUF file, in turns.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add = parser.add_argument
    add("--model", default="smollm2", help="a name of `mixkv models` or a .gguf file (%(default)s)")
    add("--weights", default="auto", help="mixkv: weights in memory, as mixkv.load takes them (%(default)s)")
    add("--engines", default=",".join(NAMES), help="who takes part (%(default)s)")
    add("--llama-python", default=sys.executable, help="the Python that has llama-cpp-python; this one unless given")
    add("--openvino-python", default=sys.executable, help="the Python that has openvino-genai; this one unless given")
    add("--mixkv-kv", type=formats, default="f16,k8v8,k4v4", help="caches: f16, f32, k<bits>v<bits> (%(default)s)")
    add("--llama-kv", type=formats, default="f16,q8_0,q4_0", help="caches: ggml's types, or K/V (%(default)s)")
    add("--openvino-kv", type=formats, default="f16,u8,u4", help="caches: f32, f16, u8, u4 (%(default)s)")
    add("--depths", type=numbers, default="16,7900", help='tokens before decoding; "" for none (%(default)s)')
    add("--prefills", type=numbers, default="4096", help='prompts to time the reading of; "" for none (%(default)s)')
    add("-n", "--tokens", type=int, default=64, help="decode steps of a run (%(default)s)")
    add("--rounds", type=int, default=5, help="runs of everybody (%(default)s)")
    add("--threads", type=int, default=cores, help="threads of everybody (%(default)s)")
    add("--timeout", type=float, default=3600, help="seconds after which a run has failed (%(default)s)")
    add("--prompt", type=Path, help="text to take the prompt from; the topics of Python's help() unless given")
    add("--quality", type=Path, metavar="TEXTFILE", help="no times: KL divergence from float32 on this text")
    add("--quality-tokens", type=int, default=2048, help="tokens of that text (%(default)s)")
    add("--no-machine", action="store_true", help="do not measure the machine before and after")
    add("-o", "--output", type=Path, help="write everything to this file, as JSON")
    options = parser.parse_args()
    if min(options.tokens, options.rounds, options.threads, options.quality_tokens) < 1:
        parser.error("-n, --rounds, --threads and --quality-tokens must be at least 1")
    options.engines = options.engines.split(",")
    if unknown := set(options.engines) - set(NAMES):
        parser.error(f"--engines: {', '.join(sorted(unknown))} is none of {', '.join(NAMES)}")
    return options


def prompt_ids(options: argparse.Namespace, count: int, text: Path | None) -> tuple[str, list[int]]:
    """(path of the model, the first ``count`` ids of a text by its tokenizer)."""
    from mixkv.models.load import open_model

    opened = open_model(options.model)
    limit = opened.config.max_position_embeddings
    if count + SPARE > limit:
        raise SystemExit(f"{count} tokens and {SPARE} to spare are more than the model's context of {limit}")
    tokenizer = opened.read_tokenizer()
    if tokenizer is None:
        raise SystemExit(f"{options.model} has no tokenizer")
    if text is None:
        from pydoc_data.topics import topics

        source = "\n".join(topics[name] for name in sorted(topics))
    else:
        source = text.read_text(encoding="utf-8")
    ids = tokenizer.encode(source[: 16 * count])[:count]
    if len(ids) < count:
        raise SystemExit(f"{text or 'the default prompt'} has {len(ids)} tokens, {count} are needed")
    return str(opened.path or options.model), ids


def versions(engines: list[Engine], timeout: float) -> tuple[dict[str, Any], list[Engine]]:
    """What each engine says about itself, or why it cannot take part; and those that can."""
    said, present = {}, []
    for engine in engines:
        try:
            said[engine.name] = call(engine, None, timeout)
            present.append(engine)
        except NotInstalledError as error:
            said[engine.name] = {"missing": str(error)}
        except WorkerError as error:
            said[engine.name] = {"failed": str(error)}
    return said, present


def timed(options: argparse.Namespace, model: str, ids: list[int], engines: list[Engine]) -> list[dict[str, Any]]:
    """Run all turns."""
    tests = [Test("decode", n) for n in options.depths] + [Test("prefill", n) for n in options.prefills]
    with tempfile.TemporaryDirectory() as folder:

        def runner(turn: Turn) -> dict[str, Any]:
            job = {"kind": turn.test.kind, "model": model, "ids": ids[: turn.test.depth], "kv": turn.kv}
            job |= {"threads": options.threads, "tokens": options.tokens, "weights": options.weights}
            if options.rounds > 1 and turn.test.kind == "decode":
                job["state"] = str(Path(folder) / f"{turn.kv.replace('/', '-')}-{turn.test.depth}")
            return call(turn.engine, job, options.timeout)

        return run_turns(plan(engines, tests, options.rounds), runner, lambda line: print(line, file=sys.stderr))


def qualities(options: argparse.Namespace, model: str, ids: list[int], engines: list[Engine]) -> list[dict[str, Any]]:
    """Everybody's KL divergence from mixkv with weights and cache in float32."""
    job = {"kind": "quality", "model": model, "ids": ids, "threads": options.threads, "weights": options.weights}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        job["folder"] = folder
        try:
            call(ours(options), job | REFERENCE, options.timeout)
        except WorkerError as error:
            raise SystemExit(f"the reference failed:\n{error}") from None
        for engine in engines:
            for kv in engine.kvs:
                row = {"engine": engine.name, "kv": kv}
                try:
                    row |= call(engine, job | {"kv": kv}, options.timeout)
                    print(f"{engine.name} {kv}: mean KL {row['quality']['mean']:.5f}", file=sys.stderr)
                except WorkerError as error:
                    row["error"] = str(error)
                    print(f"{engine.name} {kv}: failed:\n{error}", file=sys.stderr)
                rows.append(row)
    return rows


def tables(report: dict[str, Any], quality: bool) -> list[str]:
    """Everything that was found."""
    rows, said = report["rows"], report["versions"]
    if quality:
        return [summary.quality_table(rows)]
    absent = {name: "failed" if "failed" in x else "not installed" for name, x in said.items() if "version" not in x}
    return [
        summary.ratio_table(rows, list(said), absent),
        summary.spread_table(rows),
        summary.check_table(rows, "mixkv"),
    ]


def ours(options: argparse.Namespace) -> Engine:
    """Who is compared with the others."""
    return Engine("mixkv", sys.executable, "run_mixkv.py", options.mixkv_kv)


def main() -> int:
    """Run what the options say; 1 if a worker failed."""
    options = arguments()
    everybody = [
        ours(options),
        Engine("llama.cpp", options.llama_python, "run_llama.py", options.llama_kv),
        Engine("openvino", options.openvino_python, "run_openvino.py", options.openvino_kv),
    ]
    engines = [engine for engine in everybody if engine.name in options.engines]
    report: dict[str, Any] = {"date": f"{datetime.date.today()}", "cpu": cpu(), "machine": {}}
    report["load_average"] = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"
    report["versions"], present = versions(engines, options.timeout)
    longest = max([n + options.tokens for n in options.depths] + options.prefills, default=0)
    count = options.quality_tokens if options.quality else longest
    report["model"], ids = prompt_ids(options, count, options.quality or options.prompt)
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8]
    source = (options.quality or options.prompt or Path("the topics of help()")).name
    report["prompt"] = (
        f"Prompts: the first of {count} tokens of {source} (Python {platform.python_version()}, {digest})"
    )
    if not options.no_machine:
        report["machine"]["before"] = machine(options.threads)
    report["rows"] = (qualities if options.quality else timed)(options, report["model"], ids, present)
    if not options.no_machine:
        report["machine"]["after"] = machine(options.threads)
    report["options"] = {name: str(value) for name, value in vars(options).items()}
    if options.output:
        options.output.write_text(json.dumps(report, indent=1))
    print(header(options, report), *tables(report, bool(options.quality)), sep="\n\n")
    return 1 if any("error" in x or "failed" in x for x in [*report["rows"], *report["versions"].values()]) else 0


if __name__ == "__main__":
    sys.exit(main())
