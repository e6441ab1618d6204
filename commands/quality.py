"""``mixkv eval`` and ``plan``: what a cache costs in quality, and which one costs least."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.errors import UsageError
from .options import AsJson, CacheOptions, ModelOption, takes_cache_options
from .shell import (
    Bars,
    check_output,
    load_each,
    print_table,
    read_text,
    reported,
    rounded,
    say,
    set_threads,
    write_output,
)

if TYPE_CHECKING:
    from ..engine.policy import CachePolicy
    from ..experiments.evaluate import Evaluation
    from ..experiments.pieces import Piece
    from ..models.load import Model


Weights = Annotated[str, typer.Option(help="Weight format; others than f32 blur what the cache alone costs.")]
ReferenceWeights = Annotated[
    str | None, typer.Option(help="Weight format of the reference.", show_default="that of --weights")
]
First = Annotated[int, typer.Option(help="Compare predictions only from this position on.")]
Regime = Annotated[
    str,
    typer.Option(help="chunked: read as a prompt; decode: token by token; both: chunked, and compared with decode."),
]
Shadow = Annotated[
    bool,
    typer.Option("--shadow", help="Also find the error of each layer's and head's attention; several times slower."),
]
Continue = Annotated[int, typer.Option("--continue", help="Generate so many tokens behind the text, with both caches.")]
SHOWN = (
    "tokens", "predicted_tokens", "ppl", "ppl_se", "ppl_reference", "ppl_reference_se", "ppl_ratio", "ppl_ratio_se",
    "ln_ppl_ratio", "ln_ppl_ratio_se", "nll_correlation", "kld", "dp", "top1", "top1_se", "by_distance", "mass", "regimes",
    "kv_bytes_per_token", "kv_bytes_per_token_reference", "bits_per_value", "prefill_tokens_per_second",
    "decode_tokens_per_second", "model", "policy", "weights", "reference_weights", "document", "seed", "start", "regime",
    "threads", "seconds",
)  # fmt: skip
OPTIONAL = ("mass", "regimes", "decode_tokens_per_second")


@reported
@takes_cache_options
def evaluate(
    file: Annotated[
        str | None,
        typer.Argument(
            help='The text, in UTF-8; "-" reads stdin.', show_default="2,048 tokens of Python's help topics"
        ),
    ] = None,
    model: ModelOption = "smollm2",
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", "-n", help="Most tokens to evaluate, from the beginning; all unless given."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which piece of so many tokens: 0 is the first, others lie anywhere.")] = 0,
    first: First = 0,
    regime: Regime = "chunked",
    shadow: Shadow = False,
    continuation: Continue = 0,
    weights: Weights = "f32",
    reference_weights: ReferenceWeights = None,
    threads: Annotated[int | None, typer.Option(help="Threads; all cores unless given.")] = None,
    *,
    cache: CacheOptions,
    per_token: Annotated[
        Path | None, typer.Option("--per-token", help="Also write a CSV file with a line for each predicted token.")
    ] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a line of names and a line of numbers.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Measure on a text what a cache costs, beside a cache of float32 and the same weights."""
    from ..experiments.pieces import DEFAULT_TOKENS, Setting, piece
    from ..experiments.texts import DEFAULT, Document, document

    if as_json and as_csv:
        raise UsageError("--json and --csv cannot be had at once")
    if seed < 0:
        raise UsageError(f"--seed must be 0 or more, found {seed}")
    if file is None and tokens is None:
        tokens = DEFAULT_TOKENS
    policy, other = cache.policy(), weights if reference_weights is None else reference_weights
    setting = Setting(model, weights, other, tokens, first, regime, shadow, continuation)
    if per_token is not None:
        check_output("--per-token", per_token, None if file is None else Path(file))
    text = Document("-", read_text(None)) if file == "-" else document(DEFAULT if file is None else file)
    used_threads = set_threads(threads)
    from ..engine.memory import check_fits
    from ..experiments.cells import Pair, beside, measure
    from ..experiments.tables import make_writer
    from ..kernels.warmup import warm_up

    with Bars(quiet) as bars:
        loaded = load_each(model, {weights, other}, bars)
        pair = Pair(loaded[weights], loaded[other])
        config = pair.candidate.config
        part = piece(
            text.name,
            pair.candidate.encode(text.text),
            setting,
            seed,
            config.max_position_embeddings,
            config.bos_token_id,
        )
        check_fits(config, policy, len(part.ids) + continuation, beside=beside(setting, policy))
        warm_up(bars.bar("preparing kernels (compiled once)"))
        begun = time.perf_counter()
        ((found, each),) = measure(pair, setting, part, [policy], bars.bar("evaluating"))
    row = {**found, "threads": used_threads, "seconds": time.perf_counter() - begun}
    if as_json:
        print(json.dumps(row, ensure_ascii=False))
    elif as_csv:
        from ..experiments.metrics import flat

        print(make_writer("csv", [], str).row(flat(row)), end="")
    else:
        _print_evaluation(row)
    if per_token is not None:
        _write_per_token(per_token, pair.candidate, part, policy.window, each)
    with Bars(quiet) as bars:
        warning = _warning(pair.candidate, policy, row["kld"]["mean"], bars)
    if warning is not None:
        say(f"mixkv: warning: {warning}")


def _warning(model: "Model", policy: "CachePolicy", kld: float | None, bars: Bars) -> str | None:
    """What is wrong with a cache that ruins the model, in words; kld: what was measured, None for infinity."""
    from ..experiments.probe import RUINOUS, probe

    if kld is not None and kld < RUINOUS:
        return None
    verdict = probe(model, policy, bars.bar("trying other caches on a short text"))
    return verdict.sentence(policy) if verdict is not None and verdict.ruinous else None


def _print_evaluation(row: dict[str, Any]) -> None:
    """The numbers of a row that people read, the divergence by distance among them."""
    shown = {name: row[name] for name in SHOWN if name not in OPTIONAL or row[name] is not None}
    shown["by_distance"] = {_between(x): _line(x) for x in row["by_distance"]}
    print_table(rounded(shown))


def _between(part: dict[str, Any]) -> str:
    return "not yet" if part["from"] is None else f"{part['from']} to {part['to']}"


def _line(part: dict[str, Any]) -> str:
    kld = "inf" if part["kld"] is None else format(part["kld"], ".6g")
    return f"KL {kld}, top-1 {part['top1']:.4g}, {part['tokens']} tokens"


def _write_per_token(path: Path, model: "Model", part: "Piece", window: int, each: "Evaluation") -> None:
    """The numbers of each predicted token as CSV."""
    from ..experiments.rows import per_token
    from ..experiments.tables import make_writer

    writer = make_writer("csv", [], str)
    write_output("--per-token", path, "".join(writer.row(row) for row in per_token(model, part, window, each)))


@reported
@takes_cache_options
def plan(
    model: Annotated[str, typer.Argument(help="As for generate --model.")],
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
    policy = cache.policy()
    if output is not None:
        check_output("--output", output, text)
    source = read_text(None if str(text) == "-" else text)
    set_threads(threads)
    from ..experiments import plan as solver
    from ..kernels.warmup import warm_up

    with Bars(quiet) as bars:
        loaded = load_each(model, {weights}, bars)[weights]
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
            write_output("--output", output, toml)
    except UsageError as error:
        print(toml, end="")  # minutes of measuring are in it
        raise UsageError(f"{error}; the policy is on stdout") from None
    if as_json:
        print(json.dumps({**found.to_dict(), "policy_toml": toml, "budget_bytes": allowed}))
        return
    if output is None:
        print(toml, end="")
    say(
        f"{found.nbytes:g} bytes an old token ({8 * found.nbytes / values:.2f} bits a value), of {allowed:g} allowed | "
        f"KL {found.predicted:.5f} predicted, {found.measured:.5f} measured there, "
        + ("no text left to check on" if found.unseen is None else f"{found.unseen:.5f} on the text behind it")
    )
