"""The command line: parse, call, print. Heavy imports stand inside the commands; this is the only place that prints.

Exit codes: 0 done; 1 another error; 2 wrong usage; 3 a model file refused; 4 a download failed; 5 a prompt refused;
6 numbers that cannot be continued with; 7 a session file refused, or not written; 130 interrupted; 141 the reader of
stdout went away.
"""

import contextlib
import functools
import inspect
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from . import __version__
from .models.errors import MixkvError, PromptError, UsageError

if TYPE_CHECKING:
    from .engine.policy import CachePolicy
    from .engine.session import Session
    from .experiments.tables import Row, Writer
    from .models.load import Model, Opened

INTERRUPTED, PIPE_CLOSED = 130, 141

app = typer.Typer(
    name="mixkv",
    help="Generate text with a mixed-precision KV cache, on the CPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Registry name (see `mixkv models`), a model folder, or a .gguf file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def _unless(default: object) -> str:
    """What help says of an option that changes a field of the policy."""
    return f"{default}, or as --policy says"


Policy = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="full, f16, balanced, small, tiny; k4v2; words such as 'old=k4c/v2t32 rot=k'; or a .toml file.",
        show_default="balanced",
    ),
]
Window = Annotated[
    int | None, typer.Option(help="Recent tokens that every query sees at high precision.", show_default=_unless(128))
]
Sinks = Annotated[int | None, typer.Option(help="First tokens that stay at high precision.", show_default=_unless(4))]
KBits = Annotated[int | None, typer.Option(help="Bits of old keys: 2, 3, 4, 8, 16 or 32.", show_default=_unless(4))]
VBits = Annotated[int | None, typer.Option(help="Bits of old values: 2, 3, 4, 8, 16 or 32.", show_default=_unless(4))]
Tile = Annotated[int | None, typer.Option(help="Tokens quantized together: 32, 64 or 128.", show_default=_unless(64))]
Dense = Annotated[
    str | None, typer.Option(help="Type of sinks and recent tokens: f16, bf16 or f32.", show_default=_unless("f16"))
]
KAxis = Annotated[
    str | None, typer.Option(help="Scales of old keys: by channel or token.", show_default=_unless("channel"))
]
VAxis = Annotated[
    str | None, typer.Option(help="Scales of old values: by channel or token.", show_default=_unless("token"))
]
KGroup = Annotated[
    int | None, typer.Option(help="Channels of old keys a scale by token.", show_default=_unless("0: up to 64"))
]
VGroup = Annotated[
    int | None, typer.Option(help="Channels of old values a scale by token.", show_default=_unless("0: up to 64"))
]
Rotate = Annotated[
    str | None, typer.Option(help="What is kept Hadamard-rotated: none, k, v or kv.", show_default=_unless("kv"))
]
Scales = Annotated[
    str | None, typer.Option(help="Scales of codes: fit, by least squares, or range.", show_default=_unless("fit"))
]
Rollback = Annotated[int | None, typer.Option(help="Tokens that the session can go back.", show_default=_unless(0))]


class CacheOptions(NamedTuple):
    """The options of a cache: a policy, and fields that are to be otherwise than it says; None where nobody said so."""

    policy_text: Policy = None
    window: Window = None
    sinks: Sinks = None
    k_bits: KBits = None
    v_bits: VBits = None
    tile: Tile = None
    dense: Dense = None
    k_axis: KAxis = None
    v_axis: VAxis = None
    k_group: KGroup = None
    v_group: VGroup = None
    rotate: Rotate = None
    scales: Scales = None
    rollback: Rollback = None

    def policy(self, saved: "CachePolicy | None" = None) -> "CachePolicy":
        """The policy that they ask for, where they change ``saved`` unless --policy is given; UsageError for none."""
        from dataclasses import replace

        from .engine.policy import CachePolicy
        from .engine.policy_text import rotation

        text = "balanced" if self.policy_text is None else self.policy_text
        if saved is not None and self.policy_text is None:
            policy = saved
        else:
            policy = CachePolicy.load(text) if text.endswith(".toml") else CachePolicy.parse(text)
        own = {name: value for name, value in self._asdict().items() if value is not None}
        own.pop("policy_text", None)
        if "rotate" in own:
            own["rotate_k"], own["rotate_v"] = rotation("rotate", own.pop("rotate"))
        return replace(policy, **own)


def _takes_cache_options(command: Callable[..., None]) -> Callable[..., None]:
    """Offer the options of a cache where a command has its parameter ``cache``, which gets them as one."""
    offered = [
        option.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for option in inspect.signature(CacheOptions).parameters.values()
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        parameters += offered if parameter.name == "cache" else [parameter]

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        cache = CacheOptions(**{name: options.pop(name) for name in CacheOptions._fields})
        command(*args, cache=cache, **options)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command raises into one line on stderr and the documented exit code."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            if sys.stdout is None:
                raise UsageError("stdout is closed: there is nowhere to write to")
            if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal's encoding lacks is no error
                sys.stdout.reconfigure(errors="replace")
            command(*args, **options)
            sys.stdout.flush()
        except MixkvError as error:
            _say(f"mixkv: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            _say("mixkv: interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            _drop_unwritten()
            raise typer.Exit(PIPE_CLOSED) from None
        except (OSError, MemoryError) as error:
            _say(f"mixkv: {getattr(error, 'strerror', None) or error or type(error).__name__}")
            _drop_unwritten()
            raise typer.Exit(MixkvError.exit_code) from None

    return run


def _drop_unwritten() -> None:
    """What is still buffered for a stdout that takes nothing would raise again at exit: let it go nowhere."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _say(line: str) -> None:
    """One line on stderr, where there is a stderr that takes it."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


class Bars:
    """Progress bars on stderr, one below the other, gone when they are done; entered again, they begin anew.

    Without ``threaded`` they are drawn only when a callback is called: no thread takes time from what is measured.
    """

    def __init__(self, quiet: bool, *, threaded: bool = True) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._off, self._threaded = quiet or not self._console.is_terminal, threaded
        self._begin()

    def _begin(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")
        self._progress = Progress(
            *columns, TimeRemainingColumn(), console=self._console, transient=True, auto_refresh=self._threaded,
            disable=self._off,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> "Bars":
        self._begin()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def bar(self, label: str) -> Callable[..., None]:
        """A callback (done, in all[, what comes next]); its bar appears with the first call."""

        def update(done: int, total: int, detail: str = "") -> None:
            text = f"{label}: {detail}" if detail else label
            if label not in self._tasks:
                self._tasks[label] = self._progress.add_task(text, total=total)
            self._progress.update(
                self._tasks[label], completed=done, total=total, description=text, refresh=not self._threaded
            )

        return update


def _set_threads(threads: int | None) -> int:
    """Limit the kernels and NumPy's BLAS to so many threads; returns the number in force."""
    import numba
    import threadpoolctl

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = min(cores, numba.config.NUMBA_NUM_THREADS)
    if threads is None:
        threads = most
    if not 1 <= threads <= most:
        why = "the cores of this machine" if most == cores else "NUMBA_NUM_THREADS in the environment"
        raise UsageError(f"--threads must be from 1 to {most}, {why}, found {threads}")
    numba.set_num_threads(threads)
    threadpoolctl.threadpool_limits(threads)
    return threads


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the one place it was given in: argument, --file, or stdin (for "-" or nothing)."""
    if prompt is not None and file is not None:
        raise UsageError("give the prompt either as an argument or with --file, not both")
    if prompt is not None and prompt != "-":
        return prompt
    if file is None and (sys.stdin is None or (prompt is None and sys.stdin.isatty())):
        raise UsageError("give a prompt as an argument, with --file, or on stdin")
    return _read_text(file)


def _read_text(file: Path | None) -> str:
    """The whole of a file, or of stdin for None; PromptError where it is no UTF-8, too long or cannot be read."""
    from .models.limits import MAX_PROMPT_BYTES

    where = "stdin" if file is None else str(file)
    try:
        if file is None:
            data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        else:
            with file.open("rb") as stream:
                data = stream.read(MAX_PROMPT_BYTES + 1)
    except OSError as error:
        raise PromptError(f"{where}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_PROMPT_BYTES:
        raise PromptError(f"{where}: more than the {MAX_PROMPT_BYTES} bytes that a prompt may have")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{where}: not UTF-8 at byte {error.start}") from None


@app.command()
@_reported
@_takes_cache_options
def generate(
    prompt: Annotated[str | None, typer.Argument(help='The prompt; "-" or nothing reads it from stdin.')] = None,
    model: ModelOption = "smollm2",
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Only the k most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the tokens that together reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Only tokens this fraction as likely as the likeliest.")] = 0.0,
    repeat_penalty: Annotated[float, typer.Option(help="Above 1: tokens already seen become less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the random generator.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be given several times.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Apply the chat template, or not; unless given, if the model has one."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message for the chat template.")] = None,
    weights: Annotated[
        str, typer.Option(help="Weights in memory: f32, bf16, q8, q4, or auto: as stored, else q8.")
    ] = "auto",
    check_weights: Annotated[bool, typer.Option("--check-weights", help="Refuse NaN and infinite weights.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads; all cores unless given.")] = None,
    context: Annotated[int | None, typer.Option(help="Most tokens of prompt and answer.")] = None,
    session_file: Annotated[
        Path | None,
        typer.Option("--session", help="Go on with the session in this file, or begin one; it is saved at the end."),
    ] = None,
    retier: Annotated[
        bool, typer.Option("--retier", help="Keep the session by another policy from now on: that of the options.")
    ] = False,
    *,
    cache: CacheOptions,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no statistics on stderr.")] = False,
) -> None:
    """Generate text. Text streams to stdout; progress and statistics go to stderr."""
    started = time.perf_counter()
    from .engine.sampler import SamplingParams

    if retier and (session_file is None or cache == CacheOptions()):
        raise UsageError("--retier has no effect without --session and options of a cache")
    saved = None
    if session_file is not None:
        from .engine import conversation

        saved = conversation.look(session_file)
    policy = cache.policy(None if saved is None else saved.policy)
    if session_file is not None and saved is not None:
        conversation.check_options(session_file, saved, policy, chat=chat, system=system, retier=retier)
    sampling = SamplingParams(temperature, top_k, top_p, min_p, repeat_penalty, seed)
    idle = [name for name, given in (("--top-k", top_k), ("--top-p", top_p < 1), ("--min-p", min_p)) if given]
    if temperature == 0 and idle:
        raise UsageError(f"{', '.join(idle)} has no effect at temperature 0: give a --temperature above 0")
    text = _read_prompt(prompt, file)
    used_threads = _set_threads(threads)
    from .engine import generate as loop
    from .engine import memory
    from .engine.conversation import Conversation
    from .kernels.warmup import warm_up
    from .models.load import load

    loop.check_options(max_tokens, stop or ())
    with Bars(quiet) as bars:
        loaded = load(
            model, weights, progress=bars.bar("loading"), download_progress=bars.bar("downloading"),
            check_weights=check_weights,
        )  # fmt: skip
        talk = Conversation(
            loaded, policy, chat=chat, system=system, context=context, path=session_file, saved=saved
        )  # fmt: skip
        session, ids = talk.session, talk.prompt(text)
        session.check_fits(ids)
        most = min(talk.kept + len(ids) + max_tokens, session.context)
        held = session.nbytes()["total"]
        memory.check_fits(loaded.config, session.policy, most, context=session.context, held=held)
        warm_up(bars.bar("preparing kernels (compiled once)"))
    if talk.retiered is not None:
        _say(_retiered_line(policy, talk.retiered))
    run = Run(session, ids, started, as_json, quiet)
    tokens = loop.generate(session, ids, max_tokens=max_tokens, sampling=sampling, stop=stop or (), progress=run.read)
    about: dict[str, Any] = {"model": loaded.name, "policy": str(policy), "routes": policy.routes()}
    about["threads"] = used_threads
    if talk.retiered is not None:
        about["retier"] = talk.retiered
    try:
        run.stream(tokens)
        stats = {**run.statistics(), "kept_tokens": talk.kept, **about}
        if as_json:
            result: dict[str, Any] = {"text": run.text, "prompt_ids": ids, "token_ids": run.token_ids}
            result |= {"finish_reason": run.finish_reason, "stats": stats}
            print(json.dumps(result, ensure_ascii=False), flush=True)
    finally:
        saving = talk.end(run.text, run.token_ids)
    if not quiet:
        kept = f"kept {talk.kept} tokens | " if session_file is not None else ""
        _say(kept + _statistics_line(stats, run.finish_reason) + (f" | saved to {session_file}" if saving else ""))
    if run.finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


class Run:
    """One generation as the command line sees it: what was printed, and when."""

    def __init__(self, session: "Session", prompt_ids: list[int], started: float, as_json: bool, quiet: bool) -> None:
        self.text, self.finish_reason = "", "interrupted"
        self.token_ids: list[int] = []
        self._session, self._prompt = session, len(prompt_ids)
        self._as_json = as_json
        self._bars = Bars(quiet)
        self._update = self._bars.bar("reading the prompt")
        self._started, self._begun = started, time.perf_counter()
        self._first = self._last = self._begun

    def read(self, done: int) -> None:
        """Called with the number of prompt tokens read."""
        self._update(done, self._prompt)

    def stream(self, tokens: Iterator[Any]) -> None:
        """Print tokens as they come. An interrupt ends it; what was printed stays."""
        try:
            with self._bars:  # shows only while the prompt is read
                token = next(tokens)
            self._first = time.perf_counter()
            self._print(token)
            for token in tokens:
                self._print(token)
        except KeyboardInterrupt:
            pass
        self._last = time.perf_counter()
        if not self._as_json:
            print(flush=True)

    def _print(self, token: Any) -> None:
        self.token_ids.append(token.id)
        self.text += token.text
        self.finish_reason = token.finish_reason or self.finish_reason
        if not self._as_json and token.text:
            sys.stdout.write(token.text)
            sys.stdout.flush()
        self._last = time.perf_counter()

    def statistics(self) -> dict[str, Any]:
        """Tokens, seconds, tokens/s and bytes of this generation."""
        config, position = self._session.model.config, self._session.position
        reading, writing = self._first - self._begun, self._last - self._first
        generated = len(self.token_ids)
        values = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
        return {
            "prompt_tokens": self._prompt,
            "prompt_seconds": reading,
            "prompt_tokens_per_second": self._prompt / reading if reading else 0.0,
            "generated_tokens": generated,
            "generated_seconds": writing,
            # the first token is part of reading the prompt: only those after it are counted
            "generated_tokens_per_second": (generated - 1) / writing if generated > 1 else 0.0,
            "start_to_first_token_seconds": self._first - self._started,
            "kv_bytes": self._session.nbytes(),
            "kv_bytes_float16": values * 2 * position,
        }


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e6:.2f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.2f} GB"


def _statistics_line(stats: dict[str, Any], finish_reason: str) -> str:
    kv = stats["kv_bytes"]
    parts = ", ".join(f"{name} {_size(kv[name])}" for name in ("sink", "old", "recent"))
    return (
        f"prompt {stats['prompt_tokens']} tokens, {stats['prompt_tokens_per_second']:.1f} tokens/s | "
        f"generated {stats['generated_tokens']} tokens, {stats['generated_tokens_per_second']:.1f} tokens/s "
        f"({finish_reason}) | KV {_size(kv['total'])} ({parts}); float16 would take {_size(stats['kv_bytes_float16'])}"
    )


def _retiered_line(policy: "CachePolicy", found: dict[str, int]) -> str:
    return (
        f"mixkv: {found['tokens']} tokens are kept by the policy '{policy}' from now on: {found['requantized']} of them "
        f"were rounded once more, {found['not_restored']} stay as rounded as they were although it keeps such tokens whole"
    )


@app.command()
@_reported
def bench(
    model: ModelOption = "smollm2",
    prompts: Annotated[
        list[str] | None, typer.Option("--n-prompt", "-p", help="Tokens of a prompt; 0 for none.", show_default="512")
    ] = None,
    generated: Annotated[
        list[str] | None, typer.Option("--n-gen", "-n", help="Tokens to generate; 0 for none.", show_default="128")
    ] = None,
    pairs: Annotated[
        list[str] | None, typer.Option("-pg", help="A prompt and tokens to generate behind it: 512,128.")
    ] = None,
    depths: Annotated[
        list[str] | None,
        typer.Option("--n-depth", "-d", help="Tokens in the cache before, not timed.", show_default="0"),
    ] = None,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", help="How often each test is timed.")] = 5,
    warmup: Annotated[bool, typer.Option("--warmup/--no-warmup", help="Run each test once before, untimed.")] = True,
    weights: Annotated[list[str] | None, typer.Option(help="Weight formats in memory.", show_default="auto")] = None,
    kv: Annotated[
        list[str] | None,
        typer.Option(
            help="Cache policies: f32, f16, k4v2, k8v8:window=64:sinks=0:tile=32, small, 'old=k4c/v2t32 rot=k'.",
            show_default="k4v4",
        ),
    ] = None,
    threads: Annotated[
        list[str] | None, typer.Option("--threads", "-t", help="Threads; all cores unless given.")
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="md, csv, json or jsonl.")] = "md",
    startup: Annotated[bool, typer.Option("--startup", help="Instead, time a warm start and its parts.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Time reading prompts and generating, as llama-bench does.

    Numbers are lists (512,1024) and ranges: 0-4096+1024 adds 1024, 1-64*2 doubles. Each combination of options is a row.
    Every repetition fills a cache of its own up to the depth.
    """
    from .experiments import bench as speed
    from .experiments import startup as start
    from .experiments.bench_plan import MAX_THREADS, Plan, parse_cases, parse_policies
    from .experiments.ranges import parse_numbers, split_words
    from .experiments.tables import make_writer

    idle = {"-p": prompts, "-n": generated, "-pg": pairs, "-d": depths, "--kv": kv}
    if startup and any(idle.values()):
        raise UsageError(f"{', '.join(name for name, given in idle.items() if given)} has no effect with --startup")
    writer = make_writer(output, *((start.COLUMNS, start.heading) if startup else (speed.COLUMNS, speed.heading)))
    formats = split_words("--weights", weights or ["auto"])
    counts = [_set_threads(n) for n in (parse_numbers("--threads", threads, 1, MAX_THREADS) if threads else [None])]
    bars = Bars(quiet, threaded=False)
    downloading = bars.bar("downloading")
    if startup:
        measuring = start.Startup(
            model, formats, counts, repetitions, warmup,
            progress=bars.bar("starting"), download_progress=downloading,
        )  # fmt: skip
        _print_rows(measuring.rows(), writer, bars)
        return
    cases = parse_cases(prompts or ["512"], generated or ["128"], depths or ["0"], pairs or [])
    plan = Plan(formats, counts, parse_policies(kv or ["k4v4"]), cases, repetitions, warmup)

    def ready(weights: str) -> "Model":
        from .kernels.warmup import warm_up
        from .models.load import load

        loaded = load(model, weights, progress=bars.bar("loading"), download_progress=downloading)
        warm_up(bars.bar("preparing kernels (compiled once)"))
        return loaded

    _print_rows(speed.Bench(plan, ready, _set_threads, progress=bars.bar("measuring")).rows(), writer, bars)


def _print_rows(rows: "Iterator[Row]", writer: "Writer", bars: Bars) -> None:
    """Print rows as they are measured, as far as the format allows; whatever ends it, all that there are by then."""
    try:
        while True:
            with bars:  # not while something is printed
                row = next(rows, None)
            if row is None:
                break
            print(writer.row(row), end="", flush=True)
    finally:
        print(writer.end(), end="", flush=True)


@app.command()
@_reported
def pull(
    name: Annotated[str, typer.Argument(help="Registry name, see `mixkv models`.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Fetch a model of the registry into the cache, and print where it is."""
    from .models import hub

    if name == "toy":
        _say("mixkv: toy is built in, there is nothing to fetch")
        return
    with Bars(quiet) as bars:
        path = hub.pull(name, progress=bars.bar(f"downloading {name}"))
    print(path)


@app.command()
@_reported
def models(as_json: AsJson = False) -> None:
    """List the models of the registry, and which of them are in the cache."""
    from .models import hub

    rows = [
        {
            "name": entry.name,
            "summary": entry.summary,
            "license": entry.license,
            "bytes": entry.file_nbytes,
            "path": str(path) if (path := hub.cached_file(entry.name)) else None,
        }
        for entry in hub.REGISTRY.values()
    ]
    rows.append({"name": "toy", "summary": "seeded tiny transformer on bytes, made on the fly", "license": "Apache-2.0",
                 "bytes": 0, "path": None})  # fmt: skip
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        state = "built in" if row["name"] == "toy" else row["path"] or "not fetched"
        print(
            f"{row['name']:10} {_size(float(row['bytes'] or 0)):>10}  {row['license']:12} {row['summary']}  [{state}]"
        )


@app.command()
@_reported
@_takes_cache_options
def info(
    model: Annotated[
        str | None,
        typer.Argument(help="Registry name, a model folder, or a .gguf file; smollm2, or none for --routes."),
    ] = None,
    *,
    cache: CacheOptions,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights in memory: f32, bf16, q8, q4, or auto: as stored, else q8.", show_default="auto"),
    ] = None,
    routes: Annotated[
        bool, typer.Option("--routes", help="How the kernels compute each format on this CPU, and what options cost.")
    ] = False,
    as_toml: Annotated[
        bool, typer.Option("--toml", help="Print only the policy, as a file for --policy; of no model.")
    ] = False,
    context: Annotated[
        int | None, typer.Option(help="Also say what the cache of a session with so many tokens takes.")
    ] = None,
    session_file: Annotated[
        Path | None, typer.Option("--session", help="Instead, say what is in a session file; of no model.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Describe a model, and what its cache takes under a policy; or a session file."""
    if session_file is not None:
        from .engine.conversation import summary

        if model or weights or routes or as_toml or context is not None or cache != CacheOptions():
            raise UsageError("with --session, info describes the file alone: only --json can be given besides")
        found = summary(session_file)
        if as_json:
            print(json.dumps(found))
        else:
            _print_table(found)
        return
    policy = cache.policy()
    if as_toml:
        options = ("MODEL", model), ("--weights", weights), ("--routes", routes), ("--context", context)
        idle = [name for name, given in (*options, ("--json", as_json)) if given]
        if idle:
            raise UsageError(f"{', '.join(idle)} has no effect with --toml, which prints only the policy")
        print(policy.to_toml(), end="")
        return
    described: dict[str, Any] = {}
    if model is not None or not routes or context is not None:
        from .models.load import open_model

        with Bars(quiet=as_json) as bars:
            opened = open_model(model or "smollm2", progress=bars.bar("downloading"))
        described |= _described(opened, policy, weights or "auto")
        if context is not None:
            described |= _planned(opened, policy, context)
    described |= {"policy": str(policy), "policy_digest": policy.digest}
    if as_json:
        described["policy_toml"] = policy.to_toml()
    if routes:
        from .kernels.routes import routes as all_routes

        described["routes"] = {"segments": policy.routes(), **all_routes()}
    if as_json:
        print(json.dumps(described))
        return
    _print_table(described)


def _print_table(described: dict[str, Any], indent: str = "") -> None:
    """Names and values in two columns; a dictionary below its name."""
    width = max(28 - len(indent), *(len(name) for name in described))
    for name, value in described.items():
        if isinstance(value, dict) and len(value) > 2:
            print(f"{indent}{name}")
            _print_table(value, indent + "  ")
        elif isinstance(value, dict):
            print(f"{indent}{name:{width}} " + ", ".join(f"{key}: {x}" for key, x in value.items()))
        else:
            print(f"{indent}{name:{width}} {value}")


def _described(opened: "Opened", policy: "CachePolicy", weights: str) -> dict[str, Any]:
    from .models.pack import check_weights_option, kept_as, kept_nbytes

    check_weights_option(weights)
    config, source = opened.config, opened.source
    matrices = {name: shape for name, shape in source.shapes.items() if len(shape) == 2}
    kept = {source.stored_types[name]: kept_as(weights, source.stored_types[name]) for name in matrices}
    layers, heads, head_dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    policy.check_model(layers, head_dim)
    parameters = sum(functools.reduce(int.__mul__, shape, 1) for shape in opened.source.shapes.values())
    return {
        "model": opened.name,
        "path": None if opened.path is None else str(opened.path),
        "architecture": config.architecture,
        "parameters": parameters,
        "stored_bytes": opened.source.nbytes,
        "stored_types": " ".join(sorted(set(opened.source.stored_types.values()))),
        "f32_bytes": 4 * parameters,
        "weights": weights,
        "matrices_kept_as": kept,
        "matrices_bytes": sum(kept_nbytes(weights, source.stored_types[n], s) for n, s in matrices.items()),
        "layers": layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "attention_heads": config.num_attention_heads,
        "kv_heads": heads,
        "head_dim": head_dim,
        "vocab_size": config.vocab_size,
        "context": config.max_position_embeddings,
        **_bytes_per_token(policy, layers, heads, head_dim),
        "kv_bytes_per_token_float16": layers * heads * head_dim * 4,
    }


def _planned(opened: "Opened", policy: "CachePolicy", tokens: int) -> dict[str, Any]:
    """What a cache of so many tokens takes, and what memory there is."""
    from .engine.memory import available_nbytes, plan

    limit = opened.config.max_position_embeddings
    if not 1 <= tokens <= limit:
        raise UsageError(f"--context must be from 1 to {limit} tokens (the model's limit), found {tokens}")
    found = plan(opened.config, policy, tokens)
    tiers = {f"old{i + 1 if i else ''}": nbytes for i, nbytes in enumerate(found.tiers)}
    planned = {"tokens": tokens, "sink": found.sink, **tiers, "recent": found.recent, "total": found.total}
    return {"kv_bytes": planned, "available_bytes": available_nbytes()}


def _bytes_per_token(policy: "CachePolicy", n_layers: int, n_kv_heads: int, head_dim: int) -> dict[str, float]:
    """Bytes of a token in all layers, by tier and dense; the last tier of a layer stands for those that it has not."""
    each = [policy.for_layer(i, n_layers).nbytes_per_token(n_kv_heads, head_dim) for i in range(n_layers)]
    n_tiers = max(len(tiers) for tiers, _ in each)
    old = [sum(tiers[min(t, len(tiers) - 1)] for tiers, _ in each) for t in range(n_tiers)]
    by_tier = {f"kv_bytes_per_old{t + 1 if t else ''}_token": nbytes for t, nbytes in enumerate(old)}
    return {**by_tier, "kv_bytes_per_recent_token": sum(dense for _, dense in each)}


@app.command("eval")
@_reported
@_takes_cache_options
def evaluate(
    file: Annotated[Path, typer.Argument(help='The text, in UTF-8; "-" reads stdin.')],
    model: ModelOption = "smollm2",
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", "-n", help="Most tokens to evaluate, from the beginning; all unless given."),
    ] = None,
    first: Annotated[int, typer.Option(help="Compare predictions only from this position on.")] = 0,
    weights: Annotated[str, typer.Option(help="Weight format of the candidate.")] = "auto",
    reference_weights: Annotated[str, typer.Option(help="Weight format of the reference.")] = "f32",
    threads: Annotated[int | None, typer.Option(help="Threads; all cores unless given.")] = None,
    *,
    cache: CacheOptions,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Measure on a text what a cache policy and a weight format cost, beside a cache of float32."""
    policy = cache.policy()
    if tokens is not None and tokens < 2:
        raise UsageError(f"--tokens must be 2 or more, found {tokens}")
    if str(file) == "-" and sys.stdin is None:
        raise UsageError("stdin is closed: there is no text to read")
    text = _read_text(None if str(file) == "-" else file)
    used_threads = _set_threads(threads)
    from .engine.memory import check_fits
    from .engine.policy import CachePolicy
    from .engine.session import Session
    from .experiments.evaluate import evaluate as run
    from .kernels.warmup import warm_up

    with Bars(quiet) as bars:
        loaded = _load_each(model, {weights, reference_weights}, bars)
        ids = _first_tokens(loaded[weights], text, tokens)
        check_fits(loaded[weights].config, policy, len(ids), beside=[CachePolicy.full()])
        reference = Session(loaded[reference_weights], CachePolicy.full())
        candidate = Session(loaded[weights], policy)
        warm_up(bars.bar("preparing kernels (compiled once)"))
        begun = time.perf_counter()
        found = run(reference, candidate, ids, first=first, progress=bars.bar("evaluating"))
    seconds = time.perf_counter() - begun
    about = {"model": model, "policy": str(policy), "weights": weights, "reference_weights": reference_weights}
    result = {**found.to_dict(), **about, "threads": used_threads, "seconds": seconds}
    if as_json:
        print(json.dumps(result))
    else:
        _print_table(_rounded(result))


def _load_each(model: str, formats: set[str], bars: Bars) -> dict[str, "Model"]:
    """The model in each weight format."""
    from .models.load import load

    return {
        weights: load(
            model, weights, progress=bars.bar(f"loading {weights}"), download_progress=bars.bar("downloading")
        )
        for weights in sorted(formats)
    }


def _first_tokens(model: "Model", text: str, most: int | None) -> list[int]:
    """The ids of a text, ``most`` of them at most; PromptError where they do not fit and nobody said how many to take."""
    ids, context = model.encode(text), model.config.max_position_embeddings
    if most is None and len(ids) > context:
        raise PromptError(f"the text has {len(ids)} tokens, the context {context}: --tokens takes the first of them")
    return ids[:most]


def _rounded(numbers: dict[str, Any]) -> dict[str, Any]:
    """Numbers as people read them: six digits, and "none" for what is not a finite number."""
    return {
        name: _rounded(x) if isinstance(x, dict) else "none" if x is None else f"{x:.6g}" if isinstance(x, float) else x
        for name, x in numbers.items()
    }


@app.command()
@_reported
@_takes_cache_options
def plan(
    model: Annotated[str, typer.Argument(help="Registry name, a model folder, or a .gguf file.")],
    budget: Annotated[str, typer.Option(help="Of an old token in all layers: 6KB/token, 5760B/token, 4bits.")],
    text: Annotated[Path, typer.Option(help='What to measure on, in UTF-8; "-" reads stdin.')],
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Tokens to measure on, from the beginning.")] = 1024,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the policy's TOML to a file.")] = None,
    weights: Annotated[str, typer.Option(help="Weight format; others than f32 blur what is measured.")] = "f32",
    threads: Annotated[int | None, typer.Option(help="Threads; all cores unless given.")] = None,
    *,
    cache: CacheOptions,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Find how many bits each layer needs: the policy of the least divergence whose old tokens take no more than a budget.

    Every layer's keys, and its values, are tried in 2 and 3 bits on the text. Its tokens behind those measured on, as
    many again, tell what the policy is worth on text it was not made for. The policy's TOML is printed, or written.
    """
    idle = [name for name, given in (("--k-bits", cache.k_bits), ("--v-bits", cache.v_bits)) if given is not None]
    if idle:
        raise UsageError(f"{', '.join(idle)} has no effect: bits are what is searched for")
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {output.parent}")
    policy = cache.policy()
    source = _read_text(None if str(text) == "-" else text)
    _set_threads(threads)
    from .experiments import plan as solver
    from .kernels.warmup import warm_up

    with Bars(quiet) as bars:
        loaded = _load_each(model, {weights}, bars)[weights]
        config = loaded.config
        values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        allowed = solver.parse_budget(budget, values)
        ids = loaded.encode(source)
        warm_up(bars.bar("preparing kernels (compiled once)"))
        found = solver.find(
            loaded, ids, policy, allowed, n_tokens=tokens, progress=bars.bar("measuring the layers")
        )  # fmt: skip
    toml = found.policy.to_toml()
    try:
        if output is not None:
            output.write_text(toml, encoding="utf-8")
    except OSError as error:
        print(toml, end="")  # minutes of measuring are in it
        raise UsageError(f"--output {output}: cannot be written: {error.strerror}; the policy is on stdout") from None
    if as_json:
        print(json.dumps({**found.to_dict(), "policy_toml": toml, "budget_bytes": allowed}))
        return
    if output is None:
        print(toml, end="")
    _say(
        f"{found.nbytes:g} bytes an old token ({8 * found.nbytes / values:.2f} bits a value), of {allowed:g} allowed | "
        f"KL {found.predicted:.5f} predicted, {found.measured:.5f} measured there, "
        + ("no text left to check on" if found.unseen is None else f"{found.unseen:.5f} on the text behind it")
    )


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mixkv {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Generate text with a mixed-precision KV cache, on the CPU."""


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
