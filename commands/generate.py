"""``mixkv generate``: text as it comes, and what it took."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.errors import UsageError
from .options import AsJson, CacheOptions, ModelOption, takes_cache_options
from .shell import INTERRUPTED, Bars, read_text, reported, say, set_threads, size

if TYPE_CHECKING:
    from ..engine.policy import CachePolicy
    from ..engine.session import Session
    from ..models.load import Model


@reported
@takes_cache_options
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
    tools: Annotated[
        Path | None, typer.Option(help="What the model may call, for the chat template: a JSON list of functions.")
    ] = None,
    template_var: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="A variable of the chat template: enable_thinking=false. JSON, or text."
        ),
    ] = None,
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
    from ..engine.sampler import SamplingParams

    if retier and (session_file is None or cache == CacheOptions()):
        raise UsageError("--retier has no effect without --session and options of a cache")
    saved = None
    if session_file is not None:
        from ..engine import conversation

        saved = conversation.look(session_file)
        if retier and saved is None:
            raise UsageError(f"--retier has no effect: there is no session {session_file} yet")
    policy = cache.policy(None if saved is None else saved.policy)
    if session_file is not None and saved is not None:
        conversation.check_options(session_file, saved, policy, chat=chat, system=system, retier=retier)
    sampling = SamplingParams(temperature, top_k, top_p, min_p, repeat_penalty, seed)
    idle = [name for name, given in (("--top-k", top_k), ("--top-p", top_p < 1), ("--min-p", min_p)) if given]
    if temperature == 0 and idle:
        raise UsageError(f"{', '.join(idle)} has no effect at temperature 0: give a --temperature above 0")
    template = _template_options(tools, template_var or [])
    text = _read_prompt(prompt, file)
    used_threads = set_threads(threads)
    from ..engine import generate as loop
    from ..engine import memory
    from ..engine.conversation import Conversation
    from ..kernels.warmup import warm_up
    from ..models.load import load

    loop.check_options(max_tokens, stop or ())
    with Bars(quiet) as bars:
        loaded = load(
            model, weights, progress=bars.bar("loading"), download_progress=bars.bar("downloading"),
            check_weights=check_weights,
        )  # fmt: skip
        talk = Conversation(
            loaded, policy, chat=chat, system=system, context=context, path=session_file, saved=saved,
            template=template,
        )  # fmt: skip
        session, ids = talk.session, talk.prompt(text)
        session.check_fits(ids)
        most = min(talk.kept + len(ids) + max_tokens, session.context)
        held = session.nbytes()["total"]
        memory.check_fits(loaded.config, session.policy, most, context=session.context, held=held)
        warm_up(bars.bar("preparing kernels (compiled once)"))
        warning = _warning(loaded, session.policy, bars)
    if warning is not None:
        say(f"mixkv: warning: {warning}")
    if talk.retiered is not None:
        say(_retiered_line(policy, talk.retiered))
    run = Run(session, ids, started, as_json, quiet)
    tokens = loop.generate(session, ids, max_tokens=max_tokens, sampling=sampling, stop=stop or (), progress=run.read)
    about: dict[str, Any] = {"model": loaded.name, "policy": str(policy), "routes": policy.routes()}
    about["threads"] = used_threads
    if talk.retiered is not None:
        about["retier"] = talk.retiered
    if warning is not None:
        about["warning"] = warning
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
        say(kept + _statistics_line(stats, run.finish_reason) + (f" | saved to {session_file}" if saving else ""))
    if run.finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _warning(loaded: "Model", policy: "CachePolicy", bars: Bars) -> str | None:
    """What is wrong with a cache for a model, in words; measured once for each, where keys have few bits."""
    from ..experiments.probe import doubtful, probe

    if loaded.name == "toy" or not doubtful(loaded.config, policy):  # toy says nothing anyway
        return None
    verdict = probe(loaded, policy, bars.bar("trying the cache on a short text"))
    return verdict.sentence(policy) if verdict is not None and verdict.ruinous else None


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the one place it was given in: argument, --file, or stdin (for "-" or nothing)."""
    if prompt is not None and file is not None:
        raise UsageError("give the prompt either as an argument or with --file, not both")
    if prompt is not None and prompt != "-":
        return prompt
    if file is None and (sys.stdin is None or (prompt is None and sys.stdin.isatty())):
        raise UsageError("give a prompt as an argument, with --file, or on stdin")
    return read_text(file)


def _template_options(tools: Path | None, variables: list[str]) -> dict[str, Any]:
    """--tools and --template-var as ``Model.encode_chat`` takes them."""
    given: dict[str, Any] = {}
    for each in variables:
        name, equals, value = each.partition("=")
        if not equals or not name.isidentifier() or name == "tools" or name in given:
            raise UsageError(f"--template-var {each[:60]!r}: must be NAME=VALUE, each name once, tools as --tools FILE")
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
        except RecursionError as error:
            raise UsageError(f"--template-var {each[:60]!r}: {error}") from None
    if tools is not None:
        text = read_text(tools)
        try:
            given["tools"] = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--tools {tools}: not valid JSON ({error})") from None
        if not isinstance(given["tools"], list):
            raise UsageError(
                f"--tools {tools}: must be a JSON list of functions, found {type(given['tools']).__name__}"
            )
    return given


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


def _statistics_line(stats: dict[str, Any], finish_reason: str) -> str:
    kv = stats["kv_bytes"]
    parts = ", ".join(f"{name} {size(kv[name])}" for name in ("sink", "old", "recent"))
    return (
        f"prompt {stats['prompt_tokens']} tokens, {stats['prompt_tokens_per_second']:.1f} tokens/s | "
        f"generated {stats['generated_tokens']} tokens, {stats['generated_tokens_per_second']:.1f} tokens/s "
        f"({finish_reason}) | KV {size(kv['total'])} ({parts}); float16 would take {size(stats['kv_bytes_float16'])}"
    )


def _retiered_line(policy: "CachePolicy", found: dict[str, int]) -> str:
    return (
        f"mixkv: {found['tokens']} tokens are kept by the policy '{policy}' from now on: {found['requantized']} of them "
        f"were rounded once more, {found['not_restored']} stay as rounded as they were although it keeps such tokens whole"
    )
