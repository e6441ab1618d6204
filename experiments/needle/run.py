"""``needle``: sessions of several cache policies look for pass keys in one prompt after the other, beside a reference.

Whether the answer is right is one bit. How likely the right answer was, and how far what is predicted along it is from what
the reference predicts, are numbers, and show what the bit does not.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ...engine import memory
from ...engine.generate import generate
from ...engine.policy import CachePolicy
from ...engine.session import Session
from ...models.load import Model
from .. import machine
from ..cells import Pair
from ..divergence import compare
from ..keys import ids_digest, key
from ..metrics import finite
from ..tables import Row
from .plan import Plan, command
from .task import BEYOND, Prompt, Prompts

Float32 = NDArray[np.float32]

SCHEMA = 1


class Needle:
    """Runs a plan. The prompts are made, and memory is looked at, before anything is read.

    Args:
        models: weight format -> the model in it.
        text: what the keys are hidden in.
        plan: what is measured.
        progress: called with (tokens read, tokens in all, what is being read).

    Raises:
        UsageError, PromptError: as ``Prompts`` does; or a cache that there is no memory for.

    """

    def __init__(
        self,
        models: Mapping[str, Model],
        text: str,
        plan: Plan,
        *,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> None:
        self._plan, self._progress = plan, progress
        self._model, self._reference = models[plan.weights], models[plan.reference_weights]
        self._tokens_read = 0
        prompts = Prompts(self._model, text, plan.task)
        self._prompts = {
            (length, depth, trial): prompts.make(length, depth, trial)
            for length in plan.lengths
            for depth in plan.depths
            for trial in range(plan.trials)
        }
        longest = max(len(prompt.token_ids) + len(prompt.answer_ids) + BEYOND for prompt in self._prompts.values())
        available = memory.available_nbytes()
        for policy in (CachePolicy.full(), *plan.policies):  # one after the other: no two are held at a time
            memory.check_fits(self._model.config, policy, longest, available=available)
        self._fingerprints = Pair(self._model, self._reference).fingerprints
        self._machine = machine.describe()

    def rows(self) -> Iterator[Row]:
        """A row for each length, depth, trial and policy, in this order, as it is measured; docs/needle.md lists the keys.

        Raises:
            NumericalError: logits that are NaN or infinite.

        """
        for where, prompt in self._prompts.items():
            reference = self._ask(self._reference, CachePolicy.full(), prompt, f"{_at(*where)}, reference")
            for policy in self._plan.policies:
                found = self._ask(self._model, policy, prompt, f"{_at(*where)}, {policy.spec}")
                yield self._row(policy, where, prompt, found, reference)

    def _ask(self, model: Model, policy: CachePolicy, prompt: Prompt, what: str) -> tuple[str, Float32]:
        """The answer of a new session, and the logits (tokens of the right answer, V) along the right one."""
        before = self._tokens_read
        total = (len(self._plan.policies) + 1) * sum(len(each.token_ids) for each in self._prompts.values())

        def read(done: int) -> None:
            self._tokens_read = before + done
            if self._progress is not None:
                self._progress(self._tokens_read, total, what)

        read(0)
        found = ask(Session(model, policy), prompt, read)
        read(len(prompt.token_ids))
        return found

    def _row(
        self,
        policy: CachePolicy,
        where: tuple[int, float, int],
        prompt: Prompt,
        found: tuple[str, Float32],
        reference: tuple[str, Float32],
    ) -> Row:
        plan, task = self._plan, self._plan.task
        length, depth, trial = where
        compared = compare(reference[1], found[1], np.array(prompt.answer_ids))
        matters = {
            "kind": "needle", "schema": SCHEMA, "mixkv": self._machine["mixkv"], "models": self._fingerprints,
            "policy": str(policy), "task": task.name, "keys": task.keys, "chat": task.chat, "seed": task.seed,
            "length": length, "depth": depth, "trial": trial, "answer_ids": prompt.answer_ids,
            "prompt": ids_digest(prompt.token_ids),
        }  # fmt: skip
        return finite({
            "kind": "needle", "key": key(matters), "schema": SCHEMA, **self._machine,
            "model": self._model.name, "weights": plan.weights, "reference_weights": plan.reference_weights,
            "policy": str(policy), "spec": policy.spec, "policy_digest": policy.digest,
            "task": task.name, "keys": task.keys, "chat": task.chat, "document": plan.document,
            "length": length, "depth": depth, "trial": trial, "seed": task.seed,
            "prompt_tokens": len(prompt.token_ids), "position": prompt.position,
            "expected": prompt.expected, "answer": found[0], "correct": prompt.is_right(found[0]),
            "nll": float(compared.nll.mean()), "nll_reference": float(compared.nll_reference.mean()),
            "kld": float(compared.kld.mean()),
            "reference_answer": reference[0], "reference_correct": prompt.is_right(reference[0]),
            "command": command(self._model.name, plan, policy, *where),
        })  # fmt: skip


def ask(session: Session, prompt: Prompt, progress: Callable[[int], None] | None = None) -> tuple[str, Float32]:
    """Put a question to a session that has read nothing.

    Returns:
        What it answers, greedily, in as many tokens as the right answer has and a few more; and what it predicts along the
        right answer, whatever it answers itself: logits (tokens of the right answer, V).

    """
    ids, last = prompt.token_ids[:-1], prompt.token_ids[-1:]
    session.forward(ids, None, progress=progress)
    told = session.fork().forward([*last, *prompt.answer_ids[:-1]], "all")
    assert told is not None
    tokens = generate(session, last.tolist(), max_tokens=len(prompt.answer_ids) + BEYOND)
    return "".join(token.text for token in tokens), told


def _at(length: int, depth: float, trial: int) -> str:
    return f"{length} tokens, depth {depth:g}, trial {trial}"
