"""What a benchmark is to measure: the cases of its options, and everything they are combined with."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..engine import memory
from ..engine.policy import CachePolicy
from ..models.errors import UsageError
from ..models.limits import MAX_REPETITIONS, MAX_TOKENS
from ..models.load import Model
from ..models.pack import check_weights_option
from .ranges import parse_numbers, parse_pairs, split_words


@dataclass(frozen=True, slots=True)
class Case:
    """One test: behind ``n_depth`` tokens that are not timed, a prompt, generated tokens, or one after the other."""

    n_prompt: int
    n_gen: int
    n_depth: int

    @property
    def name(self) -> str:
        """As llama-bench writes it: "pp512", "tg128 @ d4096", "pp512+tg128"."""
        parts = [f"{kind}{count}" for kind, count in (("pp", self.n_prompt), ("tg", self.n_gen)) if count]
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def n_timed(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt + self.n_gen


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: every weight format, with every number of threads, every policy, every case.

    Raises:
        UsageError: repetitions out of range, a weight format that is none, or nothing to do.

    """

    weights: list[str]
    threads: list[int]
    policies: list[CachePolicy]
    cases: list[Case]
    repetitions: int = 5
    warmup: bool = True

    def __post_init__(self) -> None:
        check_repetitions(self.repetitions)
        for name in self.weights:
            check_weights_option(name)
        if not self.cases:
            raise UsageError("nothing to measure: give -p, -n or -pg a number above 0")

    def check_fits(self, model: Model) -> None:
        """UsageError where a case needs more tokens than the model's context has, or a cache more memory than there is."""
        limit = model.config.max_position_embeddings
        for case in self.cases:
            if case.n_depth + case.n_timed > limit:
                raise UsageError(
                    f"{case.name} needs a context of {case.n_depth + case.n_timed} tokens, model {model.name!r} has {limit}"
                )
        available = memory.available_nbytes()
        for policy in self.policies:
            memory.check_fits(
                model.config, policy, max(case.n_depth + case.n_timed for case in self.cases), available=available
            )


def check_repetitions(repetitions: int) -> None:
    """UsageError for a number of repetitions out of range."""
    if not 1 <= repetitions <= MAX_REPETITIONS:
        raise UsageError(f"-r must be from 1 to {MAX_REPETITIONS}, found {repetitions}")


def parse_cases(
    prompts: Sequence[str], generated: Sequence[str], depths: Sequence[str], pairs: Sequence[str]
) -> list[Case]:
    """The cases of the options -p, -n, -d and -pg: at each depth the prompts, then the generations, then the pairs.

    Each option is a list of texts as it was given; see ranges.py for what they may hold. A 0 in -p or -n is no case.

    Raises:
        UsageError: what is no list of numbers, with the option's name.

    """
    cases = [(n, 0) for n in parse_numbers("-p", prompts, 0, MAX_TOKENS)]
    cases += [(0, n) for n in parse_numbers("-n", generated, 0, MAX_TOKENS)]
    cases += parse_pairs("-pg", pairs, 0, MAX_TOKENS)
    every = parse_numbers("-d", depths, 0, MAX_TOKENS)
    return [Case(prompt, generated, depth) for depth in every for prompt, generated in cases if prompt + generated]


def parse_policies(texts: Sequence[str]) -> list[CachePolicy]:
    """The cache policies of the option --kv, by their short names; UsageError for one that is none."""
    return [CachePolicy.parse(word) for word in split_words("--kv", texts)]
