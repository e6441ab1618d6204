"""What ``needle`` is to measure, and the shell line that measures one row of it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ...engine.policy import CachePolicy
from ...models.errors import UsageError
from ...models.limits import MAX_TRIALS
from ...models.pack import check_weights_option
from ..texts import DEFAULT
from .task import Task


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of whom: every policy, at every length, depth and trial.

    Attributes:
        task: see ``Task``.
        policies: of the candidates' caches.
        lengths: of prompts, in tokens.
        depths: from 0 to 1.
        trials: prompts for each length and depth.
        weights, reference_weights: their formats, of the candidates and of the reference.
        document: the name of the text; see texts.py.

    Raises:
        UsageError: a value out of its range, or given twice.

    """

    task: Task
    policies: Sequence[CachePolicy]
    lengths: Sequence[int]
    depths: Sequence[float]
    trials: int = 1
    weights: str = "f32"
    reference_weights: str = "f32"
    document: str = DEFAULT

    def __post_init__(self) -> None:
        for name in (self.weights, self.reference_weights):
            check_weights_option(name)
        if type(self.trials) is not int or not 1 <= self.trials <= MAX_TRIALS:
            raise UsageError(f"trials must be from 1 to {MAX_TRIALS}, found {self.trials!r}")
        if wrong := [depth for depth in self.depths if not 0 <= depth <= 1]:
            raise UsageError(f"depths must be from 0 to 1, found {wrong[0]}")
        for name, values in (("policies", self.policies), ("lengths", self.lengths), ("depths", self.depths)):
            twice = [value for i, value in enumerate(values) if value in values[:i]]
            if twice or not values:
                raise UsageError(
                    f"{name} must be one or more, each once, found {f'{twice[0]} twice' if twice else 'none'}"
                )


def command(model: str, plan: Plan, policy: CachePolicy, length: int, depth: float, trial: int) -> str:
    """The shell line whose last row is the one of this policy, length, depth and trial."""
    task = plan.task
    words = ["mixkv", "needle", "--model", model, "--weights", plan.weights]
    if plan.reference_weights != plan.weights:
        words += ["--reference-weights", plan.reference_weights]
    words += ["--kv", policy.spec, "--lengths", str(length), "--depths", f"{depth:.9f}".rstrip("0").rstrip(".")]
    words += ["--trials", str(trial + 1), "--seed", str(task.seed), "--task", task.name]
    if task.name == "multikey":
        words += ["--keys", str(task.keys)]
    if task.chat:
        words.append("--chat")
    if plan.document != DEFAULT:
        words += ["--text", plan.document]
    return shlex.join([*words, "-o", "jsonl"])
