"""The transformer: flat rows of tokens in, logits out. Differences between architectures are fields of the config.

Rows belong to sequences only through ``spans``, and only attention looks at them: one sequence in a chunk, or many in a
batch, are the same code.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..kernels import forks
from ..kernels.crew import ALL_WORKERS
from ..kernels.project import ATTENTIONS, LAYER, run_chain
from ..kernels.state import empty_state
from .chain import Apply, Attend, Buffers, Chain, Link, normalize, rotate
from .config import ModelConfig
from .errors import MixkvError
from .experts import MLP, Experts
from .linear import Linear, Norm
from .rope import Rope

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Softmax:
    """What a layer's attention does with its logits. See ``flash_attention``.

    Attributes:
        scale: by which q.k is multiplied.
        softcap: 0 for none.
        sink_logits: float32 (n_heads,), C order, or None.

    """

    scale: float
    softcap: float = 0.0
    sink_logits: Float32 | None = None

    def first_state(self, n_heads: int, n_queries: int) -> Float32:
        """The state before any key, (n_heads, n_queries, 2): nothing, or the sink logits as partials with O = 0."""
        state = empty_state(n_heads, n_queries)
        if self.sink_logits is not None:
            state[..., 0], state[..., 1] = self.sink_logits[:, None], 1
        return state


class AttentionCache(Protocol):
    """What a layer needs of the cache of a sequence."""

    def attend(self, layer: int, qkv: Float32, position: int, softmax: Softmax, out: Float32, first: int = 0) -> object:
        """Append keys and values from ``position`` on, and attend with the queries there, or with those from ``first`` on.

        qkv: (T, n_heads + 2 * n_kv_heads, head_dim), the queries, keys and values of each token, C order. out: (T, n_heads,
        head_dim), C order, receives the output.
        """

    def attentions(self, qkv: Float32, position: int, softmaxes: Sequence[Softmax]) -> "Attentions | None":
        """``attend`` of all layers for the kernels, or None if they cannot. All layers use the array ``qkv``, in turn."""


class Attentions(Protocol):
    """The attentions of all layers in one step.

    Attributes:
        address: of int64 (layers, 4), what a chain needs of each (kernels/project.py, ATTENTIONS).

    """

    address: int

    def want_last_query(self) -> None:
        """In the last layer the output of the last query is enough."""

    def settle(self, i: int) -> bool:
        """Where the kernels stopped at layer i, False if its attention is to be repeated; there is room for it now."""

    def finish(self) -> None:
        """After the last one."""


@dataclass(frozen=True, slots=True)
class Step:
    """One pass: ``token_ids`` (T,) at ``positions`` (T,); rows start .. stop of each span belong to that span's cache.

    context: the most tokens that these sequences may hold, which some rotary embeddings depend on (rope.py); 0 for the most
    that the model allows.
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    spans: list[tuple[AttentionCache, int, int]]
    context: int = 0


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer. qkv and gate_up are fused: their rows follow one another.

    Norms of inputs belong to the linear layers that they stand in front of; those of queries, of keys, and of what
    attention and MLP give, are there if the architecture has them. sink_logits: float32 (n_heads,).
    """

    qkv: Linear
    o: Linear
    mlp: MLP | Experts
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    attention_norm: Norm | None = None
    mlp_norm: Norm | None = None
    sink_logits: Float32 | None = None

    def linears(self) -> Iterator[Linear]:
        """All its matrices."""
        yield from (self.qkv, self.o)
        if isinstance(self.mlp, Experts):
            yield self.mlp.router
            for expert in self.mlp.experts:
                yield from (expert.gate_up, expert.down)
        else:
            yield from (self.mlp.gate_up, self.mlp.down)

    def norms(self) -> Iterator[Norm]:
        """The norms that stand in front of no matrix."""
        yield from (x for x in (self.q_norm, self.k_norm, self.attention_norm, self.mlp_norm) if x is not None)


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a model."""

    embedding: Linear  # only its rows are taken
    layers: list[Layer]
    head: Linear  # with the last norm in front

    def linears(self) -> Iterator[Linear]:
        """Every matrix but the embedding."""
        for layer in self.layers:
            yield from layer.linears()
        yield self.head

    @property
    def nbytes_a_token(self) -> int:
        """Bytes of matrices that a decode step reads: all but the embedding, and the experts that do not see the token."""
        parts = [part for layer in self.layers for part in (layer.qkv, layer.o)]
        mlps = [layer.mlp.nbytes_a_token for layer in self.layers]
        return sum(part.nbytes for part in (*parts, self.head)) + sum(mlps)


# The buffers of a pass. BRANCH is what attention or an MLP gives where a norm comes before it is added to X. LOGITS is
# empty unless the kernels go on to the output head. From TURNS on there are the cosines and sines of each rotary embedding
X, QKV, ATTENDED, GATE_UP, BRANCH, LOGITS, TURNS = range(7)
# So many rows times layers are one call of the kernels, at least a layer: what Python does in between counts where they are
# few, and an interrupt waits for a call to end
CALL_ROWS = 768
KEPT_TURNS = 64  # positions


@dataclass(frozen=True, slots=True)
class Midway:
    """Where a pass stands before the attention of a layer: x (T, E), and qkv (T, heads, head_dim), float32."""

    layer: int
    x: Float32
    qkv: Float32


class Transformer:
    """A decoder-only transformer."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights
        self._heads = config.num_attention_heads, config.num_attention_heads + 2 * config.num_key_value_heads
        self._widths = (
            config.hidden_size, self._heads[1] * config.head_dim, self._heads[0] * config.head_dim,
            2 * config.intermediate_size, config.hidden_size * config.post_norms, 0,
            *[config.rotary_channels] * len(config.ropes),
        )  # fmt: skip
        # What comes before the first attention, between two, and behind the last
        before = [self._queries(i, layer) for i, layer in enumerate(weights.layers)]
        after = [self._attended(layer) + self._mlp(layer) for layer in weights.layers]
        self.chains = [Chain([*behind, *ahead]) for behind, ahead in zip([[], *after], [*before, []], strict=True)]
        attentions = [Attend(i, QKV, ATTENDED) for i in range(len(weights.layers))]
        between = [
            [*ahead, attention, *behind] for ahead, attention, behind in zip(before, attentions, after, strict=True)
        ]
        self._whole = Chain([*(link for links in between for link in links), Apply(weights.head, X, LOGITS)])
        self._links_behind = len(after[-1]) + 1  # the last attention
        self._spare: list[Buffers] = []  # for one row, which no pass is using now
        self._softmax = [
            Softmax(config.softmax_scale, config.attn_logit_softcapping, layer.sink_logits) for layer in weights.layers
        ]
        self._turning: tuple[int, list[tuple[Rope, Float32]]] = 0, []
        self._turns: tuple[tuple[int, int], Float32] | None = None  # for which context, from where on, and what
        self._embedding_scale = np.float32(config.embedding_multiplier / config.residual_multiplier)

    def _queries(self, i: int, layer: Layer) -> list[Link]:
        """From X to the queries, keys and values of a layer, normed and turned."""
        config, width = self.config, self._widths[QKV]
        links: list[Link] = [Apply(layer.qkv, X, QKV)]
        first = 0
        for norm, heads in ((layer.q_norm, self._heads[0]), (layer.k_norm, config.num_key_value_heads)):
            if norm is not None:
                count = heads * config.head_dim // len(norm.weight)
                links.append(normalize(norm, QKV, QKV, width, first=first, count=count))
            first += heads * config.head_dim
        if i not in config.no_rope_layers:
            turns = TURNS + (config.rope_local is not None and i in config.sliding_layers)
            turned = self._heads[0] + config.num_key_value_heads
            links.append(rotate(turns, QKV, turned, config.head_dim, config.rotary_channels, width))
        return links

    def _attended(self, layer: Layer) -> list[Link]:
        return self._added(lambda target, onto: Apply(layer.o, ATTENDED, target, onto), layer.attention_norm)

    def _mlp(self, layer: Layer) -> list[Link]:
        mlp = layer.mlp
        if isinstance(mlp, Experts):
            return self._added(lambda target, onto: Apply(mlp, X, target, onto), layer.mlp_norm)
        down = self._added(lambda target, onto: Apply(mlp.down, GATE_UP, target, onto), layer.mlp_norm)
        return [Apply(mlp.gate_up, X, GATE_UP), *down]

    def _added(self, apply: Callable[[int, bool], Apply], norm: Norm | None) -> list[Link]:
        """A link onto X, by way of a norm if there is one."""
        if norm is None:
            return [apply(X, True)]
        return [apply(BRANCH, False), normalize(norm, BRANCH, X, self._widths[X], onto=True)]

    def forward(
        self,
        step: Step,
        logits: Literal["all", "last"] | None,
        *,
        watch: Callable[[Float32], None] | None = None,
        on_output: Callable[[Float32], None] | None = None,
        on_layer: Callable[[int, Float32], None] | None = None,
        on_attention: Callable[[Midway], None] | None = None,
        begin: Midway | None = None,
    ) -> Float32 | None:
        """Run the rows of ``step`` through all layers. Many rows end at the last keys and values if no one asks for more.

        Returns logits float32 (T, V) for "all", (len(spans), V) of each span's last row for "last", None for None.
        ``watch`` is called with arrays (T, any) that have a NaN if anything computed has, or anything kept. ``on_output``
        is called with the output (T, E) of the last layer, ``on_layer`` with the number of each and its output, and
        ``on_attention`` before each attention, with arrays that are written to afterwards. ``begin``: where an earlier pass
        of the same rows stood, to go on there.
        MixkvError in a process that was forked from one that had used the kernels.
        """
        if not forks.usable():
            raise MixkvError(forks.MESSAGE)
        weights, n_rows = self.weights, len(step.token_ids)
        buffers = self._buffers(n_rows)
        self._turn(step.positions, step.context or self.config.max_position_embeddings, buffers.arrays[TURNS:])
        x = buffers.arrays[X]
        qkv = buffers.arrays[QKV].reshape(n_rows, self._heads[1], -1)
        if begin is None:
            weights.embedding.take(step.token_ids, x)
            if self._embedding_scale != 1:
                x *= self._embedding_scale
        else:
            x[:], qkv[:] = begin.x, begin.qkv
        watched = on_layer is not None or on_attention is not None
        only_last = logits != "all" and n_rows > len(step.spans) and on_output is None and not watched
        attentions = None if begin is not None or watched else self._attentions(step, qkv)
        found = None
        if attentions is not None:
            x, found = self._run_whole(buffers, attentions, logits, only_last, watch)
        else:
            attended = buffers.arrays[ATTENDED].reshape(n_rows, self._heads[0], -1)
            if begin is None:
                self.chains[0](buffers)
            for i in range(0 if begin is None else begin.layer, len(weights.layers) - only_last):
                if on_attention is not None:
                    on_attention(Midway(i, x, qkv))
                for cache, start, stop in step.spans:
                    position = int(step.positions[start])
                    cache.attend(i, qkv[start:stop], position, self._softmax[i], attended[start:stop])
                self.chains[i + 1](buffers)
                if on_layer is not None:
                    on_layer(i, x)
            if only_last:
                if watch is not None:
                    watch(x)
                    watch(buffers.arrays[QKV])
                x = self._last_layer_of_last_rows(step, buffers, qkv, attended)
        if watch is not None:
            watch(x)
        if on_output is not None:
            on_output(x)
        if logits is not None and found is None:
            some = logits == "last" and len(x) > len(step.spans)
            found = weights.head(x[[stop - 1 for _, _, stop in step.spans]] if some else x)
        if n_rows == 1:
            self._spare.append(buffers)
        return None if found is None else self._scaled(found)

    def _buffers(self, rows: int) -> Buffers:
        """The buffers of a pass."""
        if rows == 1 and self._spare:
            return self._spare.pop()
        return Buffers(rows, self._widths, self._whole.links, self._whole.room_nbytes(rows))

    def _last_layer_of_last_rows(self, step: Step, buffers: Buffers, qkv: Float32, attended: Float32) -> Float32:
        """The last layer, from its attention on: its output (len(spans), E) of each span's last row. All keys are kept."""
        softmax = self._softmax[-1]
        for cache, start, stop in step.spans:
            out, position = attended[start:stop], int(step.positions[start])
            cache.attend(len(self._softmax) - 1, qkv[start:stop], position, softmax, out, stop - start - 1)
        own = self._some_rows(buffers, [stop - 1 for _, _, stop in step.spans])
        self.chains[-1](own)
        return own.arrays[X]

    def _some_rows(self, buffers: Buffers, rows: list[int]) -> Buffers:
        """Buffers of some rows, as they are behind an attention."""
        own = self._buffers(len(rows))
        for which in (X, ATTENDED):
            own.arrays[which][:] = buffers.arrays[which][rows]
        return own

    def _attentions(self, step: Step, qkv: Float32) -> Attentions | None:
        """The attentions of all layers for the kernels, or None where they cannot do all layers of this step."""
        if self._whole.table is None or len(step.spans) > 1:
            return None
        return step.spans[0][0].attentions(qkv, int(step.positions[0]), self._softmax)

    def _run_whole(
        self,
        buffers: Buffers,
        attentions: Attentions,
        logits: Literal["all", "last"] | None,
        only_last: bool,
        watch: Callable[[Float32], None] | None,
    ) -> tuple[Float32, Float32 | None]:
        """All layers, and the output head if all rows that are left then have logits.

        Returns the output of the last layer, and what the head gives.
        """
        assert self._whole.table is not None
        done, stop = 0, len(self._whole.table)
        if only_last:
            done = stop - self._links_behind
            attentions.want_last_query()
            self._run_links(0, done, buffers, attentions)
            if watch is not None:
                watch(buffers.arrays[X])
                watch(buffers.arrays[QKV])
            buffers = self._some_rows(buffers, [buffers.rows - 1])
        with_head = logits == "all" or (logits == "last" and buffers.rows == 1)
        found = np.empty((buffers.rows, self.weights.head.rows), np.float32) if with_head else None
        if found is not None:
            buffers.replace(LOGITS, found)
        self._run_links(done, stop if with_head else stop - 1, buffers, attentions)
        attentions.finish()
        return buffers.arrays[X], found

    def _run_links(self, first: int, stop: int, buffers: Buffers, attentions: Attentions) -> None:
        """Links of the chain of all layers."""
        table = self._whole.table
        assert table is not None
        at_once = max(1, CALL_ROWS // buffers.rows) * (len(table) // len(self.weights.layers) + 1)
        buffers.addresses[ATTENTIONS] = attentions.address
        while first < stop:
            part = table[: min(first + at_once, stop)]
            first = run_chain(part, first, buffers.addresses, buffers.rows, ALL_WORKERS)
            if first < len(part):
                first += attentions.settle(int(table[first, LAYER]))

    def _turn(self, positions: NDArray[np.int64], context: int, targets: Sequence[Float32]) -> None:
        """Write the cosines and sines of each rotary embedding; for one token, those of its neighbours are kept."""
        if len(positions) > 1:
            for (rope, frequencies), turns in zip(self._ropes(context), targets, strict=True):
                rope.turns(positions, frequencies, turns)
            return
        nth = int(positions[0]) % KEPT_TURNS
        first = int(positions[0]) - nth
        kept = self._turns  # another thread may replace it
        if kept is None or kept[0] != (context, first):
            found = np.empty((len(targets), KEPT_TURNS, self.config.rotary_channels), np.float32)
            for (rope, frequencies), turns in zip(self._ropes(context), found, strict=True):
                rope.turns(np.arange(first, first + KEPT_TURNS), frequencies, turns)
            kept = self._turns = (context, first), found
        for turns, target in zip(kept[1], targets, strict=True):
            target[0] = turns[nth]

    def _ropes(self, context: int) -> list[tuple[Rope, Float32]]:
        """Each rotary embedding with its angles a position; those of the last context are kept."""
        found = self._turning  # another thread may replace it
        if found[0] != context:
            channels = self.config.rotary_channels
            found = context, [(r, r.inverse_frequencies(channels, context)) for r in self.config.ropes]
            self._turning = found
        return found[1]

    def logits(self, x: Float32) -> Float32:
        """From the last layer's output, x (T, E), to logits (T, V): the output head, and what is done with them."""
        return self._scaled(self.weights.head(x))

    def _scaled(self, logits: Float32) -> Float32:
        """What is done with the numbers that the output head gives, in place."""
        config = self.config
        if config.logits_scaling != 1:
            logits /= np.float32(config.logits_scaling)
        if config.final_logit_softcapping:
            logits /= np.float32(config.final_logit_softcapping)
            np.tanh(logits, out=logits)
            logits *= np.float32(config.final_logit_softcapping)
        return logits
