"""Sessions under any sequence of appends, truncations, forks, saves and changes of policy, against two oracles.

One is the cache itself: the outputs are, bit for bit, those of a session that reads the tokens that have survived in one
piece, or one by one. The other is a plain model (stateful.py) that keeps every token in every form and picks, in float64,
the one that each query must see. After every step all that every session holds is compared with what was put there.
"""

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import mixkv.engine.layer
from mixkv.engine.layer import LayerCache
from mixkv.engine.policy import CachePolicy
from mixkv.engine.session import Session
from mixkv.kernels.segment import TileStore, seal_job
from mixkv.models.errors import UsageError

from .stateful import (
    BITS,
    DENSE_TYPES,
    LIMIT,
    TILES,
    VOCAB,
    Book,
    Float32,
    LayerBook,
    PlainModel,
    Shape,
    everything,
    group_ranges,
    hadamard,
    new_cache,
    policies,
    shapes,
    steps_off,
    stub_model,
    variations,
)

MOST_LINES, MOST_TOKENS = 4, 1500
CHUNKS = st.sampled_from([512, 512, 64, 7])


@dataclass
class Line:
    """A session, and what must come of it."""

    session: Session
    tokens: np.ndarray
    rows: Float32  # the outputs of all tokens; those before ``base`` are of no account
    base: Session | None = None  # a session that was given its policy in the same place, and then left alone
    high: int = 0  # the furthest that this cache has ever been

    def again(self, model: Any) -> Session:
        """A session that has got as far as ``base``, or nowhere."""
        return Session(model, self.session.policy) if self.base is None else self.base.fork()


class Sessions(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Line] = []
        self.due = self.seed = 0
        self.resources = contextlib.ExitStack()
        patch = mock.patch.object
        self.resources.enter_context(patch(Session, "_new_cache", new_cache))
        self.resources.enter_context(patch(Session, "_fingerprint", staticmethod(lambda model: "stub")))
        self.resources.enter_context(patch(mixkv.engine.layer, "seal_job", self.noting))
        self.folder = Path(self.resources.enter_context(tempfile.TemporaryDirectory()))

    def noting(self, source: TileStore, target: TileStore, tile: int, *rest: Any) -> list[int]:
        self.plain_model.jobs.append((source, target, tile))
        return seal_job(source, target, tile, *rest)

    # --- helpers ------------------------------------------------------------------------------------------------------

    def line(self, at: int) -> Line:
        return self.lines[at % len(self.lines)]

    def some_tokens(self, n: int) -> np.ndarray:
        self.seed += 1
        return np.random.default_rng([self.seed, n]).integers(0, VOCAB, n)

    def read(self, line: Line, tokens: np.ndarray, cut: int) -> None:
        """Read tokens in two calls, and compare with a session that reads everything in one."""
        for part in np.split(tokens, [cut % len(tokens)] if cut % len(tokens) else []):
            rows = line.session.forward(part)
            line.rows = np.concatenate([line.rows, rows])
        line.tokens = np.concatenate([line.tokens, tokens])
        line.high = max(line.high, len(line.tokens))
        assert line.session.position == len(line.tokens)
        other = line.again(self.reference)
        assert line.session.token_ids[: other.position].tolist() == other.token_ids.tolist()
        other.chunk = LIMIT
        start = other.position
        want = other.forward(line.tokens[start:])
        assert want.tobytes() == line.rows[start:].tobytes()

    def take_as_base(self, line: Line) -> None:
        """Behind the place where it was given its policy, a session is compared with what it is now.

        One that went back at once would have to seal anew what this one has kept as codes of the policy before.
        """
        line.base = line.session.fork()
        line.base.model = self.reference

    def plain_truncate(self, line: Line, position: int) -> None:
        self.plain_model.book(line.session.cache).truncate(position)

    # --- rules --------------------------------------------------------------------------------------------------------

    @initialize(data=st.data(), shape=shapes(), seed=st.integers(0, 99), exact=st.booleans(), chunk=CHUNKS)
    def begin(self, data: st.DataObject, shape: Shape, seed: int, exact: bool, chunk: int) -> None:
        policy = data.draw(policies(shape))
        note(f"{policy}")
        self.resources.enter_context(mock.patch.object(LayerCache, "exact", exact))
        self.shape, self.plain_model = shape, PlainModel(shape)
        self.model, self.reference = stub_model(shape, seed, self.plain_model), stub_model(shape, seed)
        session = Session(self.model, policy, context=LIMIT if data.draw(st.booleans()) else MOST_TOKENS, chunk=chunk)
        self.lines.append(Line(session, np.zeros(0, np.int64), np.zeros((0, 0), np.float32)))
        own = [policy.for_layer(i, shape.layers) for i in range(shape.layers)]
        passed = [x.window + 2 * x.tile for x in own]
        line = self.lines[0]
        line.rows = np.zeros((0, shape.layers * shape.kv_heads * shape.n_rep * shape.head_dim), np.float32)
        n = max(passed) + data.draw(st.integers(0, 60))
        self.read(line, self.some_tokens(n), data.draw(st.integers(0, n)))
        # Where a layer has codes in its first tier, and sees that far back, tiles of codes there must be
        self.due = sum(
            min(x.k_bits, x.v_bits) < 16 and (w is None or w > x.window)
            for x, w in zip(own, shape.windows, strict=True)
        )

    @rule(at=st.integers(0, 3), n=st.one_of(st.integers(1, 3), st.integers(1, 200)), cut=st.integers(0, 199))
    def append(self, at: int, n: int, cut: int) -> None:
        line = self.line(at)
        n = min(n, MOST_TOKENS - len(line.tokens))
        if n:
            self.read(line, self.some_tokens(n), cut)

    def cut_back(self, line: Line, position: int) -> None:
        line.tokens, line.rows = line.tokens[:position], line.rows[:position]

    def read_some(self, line: Line, n: int) -> None:
        if n and len(line.tokens) + n <= MOST_TOKENS:
            self.read(line, self.some_tokens(n), 1)

    @rule(
        at=st.integers(0, 3),
        back=st.one_of(st.integers(0, 130), st.just(0.0), st.floats(0, 1)),
        then=st.integers(0, 3),
    )
    def truncate(self, at: int, back: int | float, then: int) -> None:
        self.go_back(self.line(at), back)
        self.read_some(self.line(at), then)

    def go_back(self, line: Line, back: int | float) -> None:
        """By a number of tokens, or to a place between the lowest possible and the end; what is too far is refused."""
        n = len(line.tokens)
        session, lowest = line.session, line.session.cache.lowest
        assert 0 <= lowest <= max(0, line.high - session.policy.rollback)
        position = max(0, n - back) if isinstance(back, int) else min(n, round(lowest + back * (n - lowest)))
        if 0 < position < lowest:
            before = everything(session.cache, n)
            with pytest.raises(UsageError, match=f"position must be {lowest} or more, found {position}"):
                session.truncate(position)
            assert everything(session.cache, n) == before and session.position == n
            assert session.token_ids.tolist() == line.tokens.tolist()
            event("truncate: refused")
            return
        event(f"truncate: {'to 0' if position == 0 else 'within reach'}")
        cache = session.cache
        session.truncate(position)
        self.cut_back(line, position)
        if session.cache is not cache:
            line.base, line.high = None, 0
            assert position == 0
            return
        self.plain_truncate(line, position)
        if line.base is not None and position < line.base.position:
            self.take_as_base(line)

    @rule(at=st.integers(0, 3), to=st.one_of(st.floats(0, 1), st.integers(0, 9)), beyond=st.booleans())
    def replay(self, at: int, to: float | int, beyond: bool) -> None:
        """Back to any place, if need be by reading again: then it is a session that has never been anywhere else."""
        line = self.line(at)
        if beyond:
            for wrong in (-1, len(line.tokens) + 1):
                with pytest.raises(UsageError, match=f"from 0 to {len(line.tokens)}"):
                    line.session.truncate(wrong, replay=True)
        n, cache = len(line.tokens), line.session.cache
        position = min(to, n) if isinstance(to, int) else round(to * n)
        line.session.truncate(position, replay=True)
        self.cut_back(line, position)
        if line.session.cache is cache:
            self.plain_truncate(line, position)
            if line.base is not None and position < line.base.position:
                self.take_as_base(line)
            return
        event("replayed")
        line.base, line.high = None, position
        if position:
            line.rows = line.again(self.reference).forward(line.tokens)

    @precondition(lambda self: len(self.lines) < MOST_LINES)
    @rule(
        at=st.integers(0, 3),
        back=st.one_of(st.none(), st.just(0), st.just(0.0), st.floats(0, 1)),
        reads=st.tuples(st.integers(0, 40), st.integers(0, 40)),
        fork_first=st.booleans(),
    )
    def fork(self, at: int, back: int | float | None, reads: tuple[int, int], fork_first: bool) -> None:
        """One of the two may go back at once, and both go on, in the same tiles."""
        line = self.line(at)
        other = line.session.fork()
        assert other.cache is not line.session.cache and other.position == line.session.position
        self.plain_model.add(self.plain_model.book(line.session.cache).copy(other.cache))
        self.lines.append(Line(other, line.tokens, line.rows, line.base, line.high))
        both = [line, self.lines[-1]]
        if back is not None:
            self.go_back(both[fork_first], back)
        for own, n in zip(both, reads, strict=True):
            self.read_some(own, n)

    @rule(at=st.integers(0, 3), replace=st.booleans(), chunk=CHUNKS)
    def save_and_load(self, at: int, replace: bool, chunk: int) -> None:
        line, (first, second) = self.line(at), (self.folder / name for name in ("first", "second"))
        line.session.save(first, {"who": "the test"})
        loaded = Session.load(self.model, first, chunk=chunk)
        assert loaded.policy == line.session.policy and loaded.context == line.session.context
        assert loaded.token_ids.tolist() == line.tokens.tolist() and loaded.metadata == {"who": "the test"}
        n = len(line.tokens)
        assert everything(loaded.cache, n) == everything(line.session.cache, n)
        assert loaded.cache.lowest == line.session.cache.lowest
        loaded.save(second, loaded.metadata)
        assert first.read_bytes() == second.read_bytes()
        self.plain_model.add(self.plain_model.book(line.session.cache).copy(loaded.cache))
        if replace or len(self.lines) == MOST_LINES:
            line.session = loaded
        else:
            self.lines.append(Line(loaded, line.tokens, line.rows, line.base, line.high))

    @rule(data=st.data(), at=st.integers(0, 3), by_file=st.booleans())
    def retier(self, data: st.DataObject, at: int, by_file: bool) -> None:
        """The same is done to a second session, with which all outputs are compared from then on."""
        line = self.line(at)
        policy = data.draw(st.one_of(policies(self.shape), variations(line.session.policy)))
        note(f"{policy}")
        if by_file:
            line.session.save(self.folder / "twin")
            base = Session.load(self.reference, self.folder / "twin")
        else:
            base = line.session.fork()
            base.model = self.reference
        before = self.plain_model.book(line.session.cache)
        old = line.session.cache
        counts = line.session.retier(policy)
        assert counts == base.retier(policy) and line.session.policy == policy
        n = len(line.tokens)
        assert everything(line.session.cache, n) == everything(base.cache, n)
        assert old is not line.session.cache
        after = self.plain_model.add(Book.of(line.session.cache, self.shape, n))
        for old_book, book, old_layer, layer in zip(
            before.layers, after.layers, old.layers, line.session.cache.layers, strict=True
        ):
            check_retiered(old_book, book, old_layer, layer, n)
        check_counts(before, after, counts, n)
        line.base, line.high = base, n

    @precondition(lambda self: len(self.lines) > 1)
    @rule(at=st.integers(0, 3))
    def drop(self, at: int) -> None:
        """Its memory is free from then on; what others share with it must not be."""
        line = self.line(at)
        self.one_by_one(line)
        self.lines.remove(line)
        self.plain_model.books.pop(id(line.session.cache), None)

    # --- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def nobody_writes_to_what_is_held(self) -> None:
        for line in self.lines:
            assert line.session.token_ids.tolist() == line.tokens.tolist()
            if len(line.tokens):
                self.plain_model.book(line.session.cache).check_held(len(line.tokens))

    def one_by_one(self, line: Line) -> None:
        other = line.again(self.reference)
        start = other.position
        other.chunk = 1
        if len(line.tokens) > start:
            assert other.forward(line.tokens[start:]).tobytes() == line.rows[start:].tobytes()

    def teardown(self) -> None:
        try:
            for line in self.lines:
                self.one_by_one(line)
            if self.lines:
                assert self.plain_model.sealed >= self.due and self.plain_model.queries > 0
                assert self.plain_model.with_codes >= self.due
                event(f"tiles of codes sealed: {'some' if self.plain_model.sealed else 'none'}")
        finally:
            self.resources.close()


def best(book: LayerBook, layer: LayerCache, j: int) -> tuple[int, np.ndarray, np.ndarray]:
    """The most exact form that is held of position j: -1 for dense, or a tier, or -2 for none; and its K and V."""
    t, offset = divmod(j, book.rules.tile)
    if j < layer.sinks or layer.recent.first <= t:
        return -1, book.k[j].astype(float), book.v[j].astype(float)
    for i, tier in enumerate(layer.tiers):
        if tier.first <= t < tier.stop:
            return i, book.forms[i, t].k[offset], book.forms[i, t].v[offset]
    return -2, np.zeros(0), np.zeros(0)


def turned(x: np.ndarray, before: bool, after: bool) -> np.ndarray:
    return hadamard(x) if before != after else x


def check_retiered(old: LayerBook, new: LayerBook, before: LayerCache, after: LayerCache, n: int) -> None:
    """Everything is there in the forms that a query at n may see, and near what the old cache had of it."""
    rules = new.rules
    same_tiles = rules.tile == old.rules.tile and rules.rotates == old.rules.rotates
    eps = {"f16": 2.0**-10, "bf16": 2.0**-7, "f32": 2.0**-21}
    for i in range(len(rules.tiers)):
        entered = rules.tiles_entered(i, n - 1, after.lead) if n and rules.in_reach(i) else 0
        assert new.stops[i] == entered or rules.sliding is not None
    tiles = range(rules.first_seen(n) // rules.tile, -(-n // rules.tile))
    for t in tiles:
        rows = range(t * rules.tile, min((t + 1) * rules.tile, n))
        found = [best(old, before, j) for j in rows]
        assert all(form != -2 for form, _, _ in found if old.rules.sliding is None)
        if any(form == -2 for form, _, _ in found):
            continue
        k, v = (np.stack([x[side] for x in found]) for side in (1, 2))
        x = [turned(y, a, b) for y, a, b in zip((k, v), old.rules.rotates, rules.rotates, strict=True)]
        rounding = [eps[rules.policy.dense] * np.abs(y).max() + 2.0**-24 for y in x]
        dense_rows = [j for j in rows if j < after.sinks or t >= after.recent.first]
        for y, own, bound in zip(x, (new.k, new.v), rounding, strict=True):
            where = [j - rows.start for j in dense_rows]
            assert (np.abs(own[dense_rows] - y[where]) <= bound).all()
        # The form that the query at n sees, or one above, of which it is made then
        held = [-1] * (t >= after.recent.first) + [i for i in range(len(after.tiers)) if (i, t) in new.forms]
        assert held and held[0] <= rules.form_of(n, t)
        for i, tier in enumerate(after.tiers):
            if not tier.first <= t < tier.stop:
                continue
            had = [j for j, other in enumerate(before.tiers) if other.first <= t < other.stop]
            if had and not before.tiers[had[0]].layout.has_codes:  # codes are better made of that than copied
                had = [j for j in had if not before.tiers[j].layout.has_codes]
            sources = [
                j for j in had if same_tiles and before.tiers[j].layout.same_tiles(tier.layout)
                and (after.sinks >= before.sinks or rows.start >= before.sinks)
                and not before.recent.first <= t < before.recent.stop
            ]  # fmt: skip
            if sources:
                assert raw_of(new, i, t) == raw_of(old, sources[0], t)
                continue
            dead = min(max(rules.sinks - rows.start, 0), rules.tile)
            for side, (y, bound) in enumerate(zip(x, rounding, strict=True)):
                own = (new.forms[i, t].k, new.forms[i, t].v)[side]
                for head in range(y.shape[1]):
                    allowed = np.full(y[:, head].shape, bound)
                    for above in range(i + 1):
                        fmt = rules.formats(above)[side]
                        if fmt.kind[0] == "q":
                            spans = group_ranges(y[:, head], fmt, dead if dead < rules.tile else 0)
                            allowed += (
                                1.3 * steps_off(fmt) * spans / (2**fmt.bits - 1)
                                + 2.0**-8 * np.abs(y[:, head]).max()
                                + 2.0**-16
                            )
                        else:
                            allowed += eps[fmt.kind] * np.abs(y).max()
                    assert (np.abs(own[dead:, head] - y[dead:, head]) <= allowed[dead:]).all()


def raw_of(book: LayerBook, tier: int, tile: int) -> bytes:
    return book.forms[tier, tile].bytes


def check_counts(before: Book, after: Book, counts: dict[str, int], n: int) -> None:
    """The numbers that ``retier`` returns, where each layer has one tier and sees everything."""
    assert counts["tokens"] == n
    all_layers = [*before.layers, *after.layers]
    if any(len(book.rules.tiers) > 1 or book.rules.sliding is not None for book in all_layers):
        return
    requantized, not_restored = [], []
    for old, new, layer in zip(before.layers, after.layers, before.cache.layers, strict=True):
        numbers = [0, 0]
        was_coded, is_coded = (min(x.rules.tiers[0].k_bits, x.rules.tiers[0].v_bits) < 16 for x in (old, new))
        for j in range(n):
            t = j // new.rules.tile
            if best(old, layer, j)[0] < 0 or not was_coded:
                continue
            dense = j < new.rules.sinks or t >= new.rules.tiles_in(0, n - 1) or not is_coded
            alike = new.rules.tile == old.rules.tile and new.rules.rotates == old.rules.rotates
            alike &= old.rules.formats(0) == new.rules.formats(0)
            alike &= new.rules.sinks >= old.rules.sinks or t * new.rules.tile >= old.rules.sinks  # sinks have no codes
            if dense:
                numbers[1] += 1
            elif not alike:
                numbers[0] += 1
        requantized.append(numbers[0])
        not_restored.append(numbers[1])
    assert (counts["requantized"], counts["not_restored"]) == (max(requantized), max(not_restored))


STATEFUL = settings(
    max_examples=40,
    stateful_step_count=12,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


def test_sessions_in_any_sequence_of_operations() -> None:
    run_state_machine_as_test(Sessions, settings=STATEFUL)


def test_the_policies_drawn_cover_every_value() -> None:
    """Nothing is run here: so that the test above, over many runs, leaves nothing out."""
    seen: dict[str, set[Any]] = {}

    @settings(max_examples=2000, database=None, derandomize=True, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def collect(data: st.DataObject) -> None:
        shape = data.draw(shapes())
        policy = data.draw(policies(shape))
        for i in range(shape.layers):
            own: CachePolicy = policy.for_layer(i, shape.layers)
            for tier in own.tiers:
                for side in "kv":
                    bits, axis, group = (getattr(tier, f"{side}_{name}") for name in ("bits", "axis", "group"))
                    seen.setdefault(f"{side}_bits", set()).add(bits)
                    if bits < 16:
                        seen.setdefault(f"{side}_axis", set()).add(axis)
                        seen.setdefault(f"{side}_group", set()).add(group)
            for name in ("sinks", "window", "tile", "dense", "rotate_k", "rotate_v", "scales", "rollback"):
                seen.setdefault(name, set()).add(getattr(own, name))
            seen.setdefault("tiers", set()).add(len(own.tiers))
        seen.setdefault("sliding", set()).update(shape.windows)
        seen.setdefault("layers overridden", set()).add(len(policy.overrides))
        seen.setdefault("head_dim", set()).add(shape.head_dim)

    collect()
    for side in "kv":
        assert seen[f"{side}_bits"] == set(BITS) and seen[f"{side}_axis"] == {"channel", "token"}
        assert seen[f"{side}_group"] >= {0, 16, 32, 48, 64}
    assert seen["sinks"] == set(range(9)) and seen["tile"] == set(TILES) and seen["dense"] == set(DENSE_TYPES)
    assert {0, 1, 200} <= seen["window"] <= set(range(201)) and len(seen["window"]) > 120
    assert {0, 1, 100} <= seen["rollback"] <= set(range(101)) and len(seen["rollback"]) > 60
    assert seen["rotate_k"] == seen["rotate_v"] == {True, False} and seen["scales"] == {"fit", "range"}
    assert seen["tiers"] == {1, 2, 3, 4} and seen["layers overridden"] == {0, 1, 2}
    assert len(seen["sliding"]) == 8 and None in seen["sliding"]
