"""A sweep: the cells of a grid that a results file has not got yet, measured by workers and written as they are done."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...engine.memory import check_fits
from ...engine.policy import CachePolicy
from ...models.errors import MixkvError, UsageError
from ...models.load import Opened
from ..cells import beside, key
from ..pieces import Piece, piece
from ..tables import Column
from ..texts import document
from .grid import Grid
from .journal import Journal
from .worker import Progress, Task
from .workers import Workers

TOGETHER = 4  # policies that are measured beside one pass of the reference, unless said otherwise


@dataclass(frozen=True, slots=True)
class Cell:
    """One row to be: its key is that of the results file."""

    key: str
    piece: Piece
    policy: CachePolicy

    def __str__(self) -> str:
        seed = f" ({self.piece.seed})" if self.piece.seed else ""
        return f"{self.policy} on {self.piece.document}{seed}"


@dataclass(frozen=True, slots=True)
class Failure:
    """A cell that could not be measured."""

    cell: Cell
    error: MixkvError


def pieces(grid: Grid, opened: Opened) -> list[Piece]:
    """The pieces of all documents, by document and seed.

    Raises:
        UsageError: a model without a tokenizer, a policy that does not fit it.
        PromptError: a text that cannot be read, or has too few tokens or too many.

    """
    config, tokenizer = opened.config, opened.read_tokenizer()
    if tokenizer is None:
        raise UsageError(f"model {opened.name!r} has no tokenizer: it takes token ids only")
    for policy in grid.policies:
        try:
            policy.check_model(config.num_hidden_layers, config.head_dim)
        except UsageError as error:
            raise UsageError(f"policy '{policy}': {error}") from None
    found: list[Piece] = []
    for name in grid.documents:
        ids = tokenizer.encode(document(name).text)
        limits = config.max_position_embeddings, config.bos_token_id
        found += [piece(name, ids, grid.setting, seed, *limits) for seed in grid.seeds]
    return found


def check_memory(grid: Grid, opened: Opened, parts: Sequence[Piece], workers: int, together: int) -> None:
    """UsageError where the caches that exist at once, of all workers, are more than the memory there is."""
    most = max(len(part.ids) for part in parts) + grid.setting.continuation
    by_size = sorted(grid.policies, key=lambda policy: -sum(policy.nbytes_per_token(1, opened.config.head_dim)[0]))
    times = 2 if grid.setting.regime == "both" else 1  # cells.py ``measure`` holds the sessions of both
    more = [*beside(grid.setting, by_size[0]), *(times * by_size[1:together])]
    check_fits(opened.config, by_size[0], most, beside=more + (workers - 1) * [by_size[0], *more])


def cells_of(grid: Grid, parts: Sequence[Piece], fingerprints: tuple[str, str]) -> list[Cell]:
    """All cells, piece after piece."""
    return [
        Cell(key(grid.setting, fingerprints, part, policy), part, policy) for part in parts for policy in grid.policies
    ]


def tasks_of(cells: Sequence[Cell], together: int) -> list[Task]:
    """Cells of one piece, ``together`` of them at most, for each task."""
    found: list[Task] = []
    for part in dict.fromkeys(id(cell.piece) for cell in cells):
        own = [cell for cell in cells if id(cell.piece) == part]
        for at in range(0, len(own), together):
            some = own[at : at + together]
            found.append(Task(some[0].piece, tuple(cell.policy for cell in some)))
    return found


def run(
    grid: Grid,
    parts: Sequence[Piece],
    journal: Journal,
    workers: Workers,
    about: dict[str, Any],
    *,
    together: int = TOGETHER,
    progress: Callable[[float, int, str], None] | None = None,
) -> Iterator[dict[str, Any] | Failure]:
    """Measure what the journal has not got; each row as it is written.

    Args:
        grid, parts: what to measure; ``pieces`` of it.
        journal, workers: both entered.
        about: what else the rows are to say.
        together: policies beside one pass of the reference.
        progress: called with (cells done, a fraction among them; cells in all; what is being measured).

    Raises:
        MixkvError: a worker that ended, a model that cannot be loaded, a file that cannot be written. What was written
            before stays, and another run goes on from there.

    """
    cells = cells_of(grid, parts, workers.fingerprints())
    named = {(*_name(cell.piece), cell.policy): cell for cell in cells}  # what comes back through a pipe is a copy
    left = [cell for cell in cells if cell.key not in journal.keys]
    done, running = len(cells) - len(left), dict[tuple[str, int, CachePolicy], float]()

    def report(detail: str) -> None:
        if progress is not None:
            progress(done + sum(running.values()), len(cells), detail)

    report("")
    for message in workers.run(tasks_of(left, together)):
        part, policies = message.task.piece, message.task.policies
        first = (*_name(part), policies[0])
        if isinstance(message, Progress):
            running[first] = len(policies) * message.done / message.total
            report(f"{policies[0].spec}{', ...' if len(policies) > 1 else ''} on {part.document}")
            continue
        running.pop(first, None)
        done += len(policies)
        for policy, row in zip(policies, message.rows, strict=True):
            cell = named[*_name(part), policy]
            if isinstance(row, MixkvError):
                yield Failure(cell, row)
                continue
            whole = {"kind": row["kind"], "key": cell.key, **row, **about}
            journal.append(whole)
            yield whole
        report("")


def _name(part: Piece) -> tuple[str, int]:
    return part.document, part.seed


COLUMNS = [
    Column("policy", lambda row: row["spec"], right=False),
    Column("document", lambda row: row["document"] + (f" ({row['seed']})" if row["seed"] else ""), right=False),
    Column("bits", lambda row: f"{row['bits_per_value']:.2f}"),
    Column("kB/token", lambda row: f"{row['kv_bytes_per_old_token'] / 1000:.2f}"),
    Column("mean KL", lambda row: _number(row["kld"]["mean"], ".5f")),
    Column("99.9 %", lambda row: _number(row["kld"]["p999"], ".4f")),
    Column("largest", lambda row: _number(row["kld"]["max"], ".3f")),
    Column("top-1", lambda row: f"{100 * row['top1']:.1f} %"),
    Column("perplexity", lambda row: _number(row["ppl"], ".4g")),
    Column("tokens/s", lambda row: _number(row["decode_tokens_per_second"] or row["prefill_tokens_per_second"], ".0f")),
]
"""Of the table that a sweep ends with."""


def _number(x: float | None, form: str) -> str:
    return "inf" if x is None else format(x, form)


def heading(rows: list[dict[str, Any]]) -> str:
    """The line above that table."""
    row = rows[0]
    speed = "generated" if row["decode_tokens_per_second"] else "read"
    return (
        f"{row['model']}, weights {row['weights']}, beside a cache of float32 and weights {row['reference_weights']}; "
        f"{row['tokens']} tokens a piece; KL in nats; bits and bytes of an old token; tokens {speed} a second by "
        f"{row['threads']} threads, {row['workers']} processes at once"
    )
