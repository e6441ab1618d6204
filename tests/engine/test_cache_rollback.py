"""Interrupts: wherever a step is broken off, the session goes on as if it had never been begun (fault row 27).

The model here is a stub that looks its queries, keys and values up by token: what it returns for a row depends on the
cache only, bit for bit, however rows are grouped. The interrupt is raised by a trace function inside the files of the
cache, before any line, and before every few byte-code instructions - where Ctrl-C may fall.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mixkv
from mixkv.engine.layer import LayerCache
from mixkv.engine.policy import CachePolicy
from mixkv.engine.session import Session
from mixkv.models.transformer import Softmax, Step

from .stored import held_tiles

LAYERS, HEADS, DIM, VOCAB = 2, 1, 16, 50
# Sinks end inside of tile 1, so that the steps below write sinks, dense tiles and codes.
POLICY = CachePolicy(window=20, sinks=40, tile=32)
# Without a window, the last token of a tile seals it, itself included.
NO_WINDOW = CachePolicy(window=0, sinks=3, tile=32)
PACKAGE = Path(mixkv.__file__).parent
TRACED = {
    str(PACKAGE / name)
    for name in ("engine/cache.py", "engine/layer.py", "engine/session.py", "kernels/segment.py", "kernels/quantize.py")
}


class StubTransformer:
    """Attention layers whose q, k and v are looked up by token and position; the "logits" are their outputs."""

    def __init__(self) -> None:
        generator = np.random.default_rng(1)
        self.tables = generator.standard_normal((LAYERS, 3, VOCAB, HEADS, DIM), np.float32)

    def forward(self, step: Step, logits: str | None, watch: Any = None) -> NDArray[np.float32] | None:
        outs = []
        [(cache, start, stop)] = step.spans
        assert (start, stop) == (0, len(step.token_ids))
        phase = np.cos(step.positions).astype(np.float32)[:, None, None]
        for layer, (q, k, v) in enumerate(self.tables[:, :, step.token_ids]):
            qkv = np.concatenate((q + phase, k + phase, v - phase), axis=1)
            outs.append(cache.attend(layer, qkv, int(step.positions[0]), Softmax(0.25)))
        rows = np.concatenate(outs, axis=1).reshape(len(step.token_ids), -1)
        return None if logits is None else rows[-1:] if logits == "last" else rows


def new_session(policy: CachePolicy, chunk: int) -> Session:
    config = SimpleNamespace(
        max_position_embeddings=1000,
        vocab_size=VOCAB,
        num_hidden_layers=LAYERS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        sliding_windows=(None,) * LAYERS,
    )
    model: Any = SimpleNamespace(config=config, transformer=StubTransformer())
    return Session(model, policy, chunk=chunk)


def tokens(seed: int, n: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, VOCAB, n)


def everything_held(session: Session) -> list[bytes]:
    """What the cache holds that a later query may see: coded tiles whole, dense tiles as far as they are filled."""
    held = []
    for layer in session.cache.layers:
        held += held_tiles(layer.old)
        filled = min(session.position, session.policy.sinks)
        held += [layer.sink_k[:filled].tobytes(), layer.sink_v[:filled].tobytes()]
        held += [str((layer.old.first, layer.old.stop, layer.recent.first, layer.recent.stop)).encode()]
        for t in range(layer.recent.first, layer.recent.stop):
            rows = slice(0, min(session.position - t * layer.policy.tile, layer.policy.tile))
            layout, (page, slot) = layer.recent.layout, layer.recent.place(t)
            held += [layout.dense_k(page)[:, slot, :, rows].tobytes(), layout.dense_v(page)[:, slot, rows].tobytes()]
    return held


class Interrupter:
    """Counts the points of the traced files that a run passes, and raises KeyboardInterrupt at one of them."""

    def __init__(self, opcodes: bool) -> None:
        self.opcodes = opcodes
        self.passed = 0
        self.raise_at = -1
        self.where = ""

    def _point(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == ("opcode" if self.opcodes else "line"):
            if self.passed == self.raise_at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
            self.passed += 1
        return self._point

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in TRACED:
            return None
        frame.f_trace_opcodes = self.opcodes
        return self._point

    @contextmanager
    def tracing(self, raise_at: int = -1) -> Iterator[None]:
        self.passed, self.raise_at, self.where = 0, raise_at, ""
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)


def check_every_interrupt(
    first: int, then: int, *, policy: CachePolicy = POLICY, chunk: int = 512, opcodes: bool = False, stride: int = 1
) -> None:
    """Interrupt the step that reads ``then`` tokens behind ``first``, at every ``stride``-th point.

    Afterwards the same tokens (at even points) or others and fewer (at odd ones) are read in two pieces and compared
    with a session that never was interrupted.
    """
    interrupter = Interrupter(opcodes)
    prompt, same, other = tokens(1, first), tokens(2, then), tokens(3, then)

    def started() -> Session:
        session = new_session(policy, chunk)
        if first:
            session.forward(prompt, None)
        return session

    counted = started()
    with interrupter.tracing():
        counted.forward(same, "all")
    points = interrupter.passed
    assert points > (1000 if opcodes else 100)
    expected: dict[tuple[int, int], tuple[bytes, list[bytes]]] = {}

    def continued(session: Session, rest: NDArray[np.int64]) -> tuple[bytes, list[bytes]]:
        logits = [session.forward(part, "all") for part in (rest[:1], rest[1:]) if len(part)]
        return np.concatenate(logits).tobytes(), everything_held(session)

    positions = set()
    for at in range(0, points, stride):
        session = started()
        with interrupter.tracing(raise_at=at), pytest.raises(KeyboardInterrupt):
            session.forward(same, "all")
        done = session.position - first
        assert done == then or done % chunk == 0, f"{interrupter.where}: stopped at {session.position}"
        positions.add(done)
        fewer = other[: (then - done) // 3 + 1]
        rest = same[done:] if at // stride % 2 == 0 and done < then else fewer
        key = (done, at // stride % 2)
        if key not in expected:
            whole = started()
            if done:
                whole.forward(same[:done], None)
            expected[key] = continued(whole, rest)
        assert continued(session, rest) == expected[key], f"interrupted at point {at}, {interrupter.where}"
    assert {0, then} <= positions, "no interrupt before the step counted, or none after it"


def test_an_interrupt_before_any_line_of_a_prefill_leaves_the_session_in_step() -> None:
    check_every_interrupt(first=25, then=100)


def test_an_interrupt_before_any_line_of_a_prefill_in_chunks_leaves_it_at_the_end_of_one() -> None:
    check_every_interrupt(first=0, then=120, chunk=40, stride=3)


@pytest.mark.parametrize("first", [83, 95, 96], ids=lambda first: f"token {first}")
def test_an_interrupt_before_any_line_of_a_decode_step_leaves_the_session_in_step(first: int) -> None:
    """Token 83 seals a tile (its query sees 84 - 20 = 64 positions as old), 95 fills one, 96 begins one."""
    check_every_interrupt(first=first, then=1)


def test_a_tile_sealed_with_a_token_that_then_does_not_count_is_sealed_again() -> None:
    check_every_interrupt(first=95, then=1, policy=NO_WINDOW)
    check_every_interrupt(first=90, then=40, policy=NO_WINDOW, stride=3)


def test_an_interrupt_while_a_view_moves_leaves_no_address_of_memory_that_is_gone() -> None:
    """More splits are seen, and attended to in more parts, whose room is another."""
    layer = LayerCache(CachePolicy(window=64), HEADS, 16)
    qkv = np.zeros((1, 3 * HEADS, 16), np.float32)
    interrupter = Interrupter(opcodes=True)
    with interrupter.tracing():
        layer.view(1000, qkv).go_to(2000)
    for at in range(interrupter.passed):
        view = layer.view(1000, qkv)
        with interrupter.tracing(raise_at=at), suppress(KeyboardInterrupt):
            view.go_to(2000)
        view.go_to(2000)
        fresh = layer.view(2000, qkv)
        assert [x.size for x in view._parts] == [x.size for x in fresh._parts]
        assert view.addresses == (view.state.ctypes.data, *(x.ctypes.data for x in view._parts)), interrupter.where


def test_an_interrupt_between_instructions_leaves_the_session_in_step() -> None:
    check_every_interrupt(first=70, then=46, opcodes=True, stride=17)
