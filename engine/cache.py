"""The caches of all layers of a sequence, one layer after the other or all at once."""

from collections.abc import Sequence

import numpy as np

from ..kernels.quantize import Float32
from ..kernels.segment import Int64
from ..kernels.sight import renew_calls
from ..kernels.simd import LANES
from ..kernels.tables import FIRST_QUERY, N_QUERIES
from ..models.errors import NumericalError
from ..models.transformer import Softmax
from .layer import LayerCache, View, lead_of
from .ledger import MassLedger
from .policy import CachePolicy


class Attentions:
    """The attentions of all layers in one step, described before the first one begins.

    Args:
        layers: of the cache.
        views: what the queries see in some of them.
        like: of each layer, the number of one of those.
        qkv, softmaxes: what ``LayerCache.attend`` takes; the array has each layer's numbers in turn.

    Attributes:
        address: of int64 (layers, 4), what a chain of the kernels needs of each (kernels/project.py, ATTENTIONS).
        unsettled: the layers that the next step finds otherwise than this one, because tiles have entered a tier, or that
            keep a ledger.
        is_intact: whether everything fitted where it was to go.

    """

    def __init__(
        self,
        layers: Sequence[LayerCache],
        views: dict[int, View],
        like: Sequence[int],
        qkv: Float32,
        softmaxes: Sequence[Softmax],
    ) -> None:
        self._layers, self._like = layers, like
        self._views, self._qkv, self._softmaxes = views, qkv, softmaxes
        self.is_intact = True
        self._calls = [
            layer.describe(views[i], softmax) for layer, i, softmax in zip(layers, like, softmaxes, strict=True)
        ]
        self._table: Int64 = np.array([(layer.call_address, 0, 0, 0) for layer in layers], np.int64)
        self.address = self._table.ctypes.data
        self._fields: Int64 = np.empty(len(layers), np.int64)  # addresses of the views' fields
        self._placed: dict[int, tuple[int, ...]] = {}  # the views' other addresses, which the table has
        self._place(views)
        self.unsettled = [i for i, layer in enumerate(layers) if not layer.is_settled]
        self._lets_in_at = [layer.lets_in_at for layer in layers]
        self._next_in = min(self._lets_in_at)
        self._room = min(layer.room for layer in layers)

    def _place(self, views: dict[int, View]) -> None:
        """Note where views are that have moved, or are others than before."""
        for i, view in views.items():
            if self._placed.get(i) is not view.addresses:
                own = np.equal(self._like, i)
                self._table[own, 1:], self._fields[own] = view.addresses, view.fields.ctypes.data
                self._placed[i] = view.addresses

    def renew(self, views: dict[int, View], qkv: Float32, softmaxes: Sequence[Softmax]) -> bool:
        """Describe another step, anew in layers where tiles enter a tier, or did.

        Returns False, and nothing is done, if it takes more.
        """
        if not self.is_intact or softmaxes is not self._softmaxes or qkv.shape[1:] != self._qkv.shape[1:]:
            return False
        stop = views[0].stop
        if stop > self._room:
            return False
        self._views, self._qkv = views, qkv
        self._place(views)
        renew_calls(self._table, self._fields)
        anew = self.unsettled
        if stop >= self._next_in:
            anew = sorted({*anew, *(i for i, at in enumerate(self._lets_in_at) if stop >= at)})
        for i in anew:
            layer = self._layers[i]
            self._calls[i] = layer.describe(views[self._like[i]], softmaxes[i])
            self._table[i, 0], self._lets_in_at[i] = layer.call_address, layer.lets_in_at
        if anew:
            self._next_in = min(self._lets_in_at)
        self.unsettled = [i for i in anew if not self._layers[i].is_settled]
        return True

    def want_last_query(self) -> None:
        """In the last layer the output of the last query is enough, unless a ledger counts them all."""
        if self._layers[-1].ledger is None:
            call = self._calls[-1]
            call[FIRST_QUERY] = call[N_QUERIES] - 1

    def settle(self, i: int) -> bool:
        """Where the kernels stopped at layer i: ``LayerCache.settle``. If it is to be repeated, it is described anew.

        Raises:
            NumericalError: a tile that cannot be quantized.

        """
        layer, view = self._layers[i], self._views[self._like[i]]
        self.is_intact = False
        try:
            if layer.settle(self._qkv[:, view.heads :]):
                return True
        except NumericalError as error:
            self.finish(i)
            raise NumericalError(f"layer {i}, position {view.position}: {error}") from None
        layer.describe_again(view, self._softmaxes[i])
        self._table[i, 0] = layer.call_address
        return False

    def finish(self, stop: int | None = None) -> None:
        """Count the tiles of the layers that are done, all or those before ``stop``."""
        for i in self.unsettled:
            if stop is None or i < stop:
                self._layers[i].count_tiles()


class Cache:
    """The caches of all layers of one sequence. This is what a model's layers see (``AttentionCache``).

    Args:
        sliding_windows: of each layer, None where it sees everything.
        layer_type: the class of the layers' caches.

    """

    def __init__(
        self,
        policy: CachePolicy,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        context: int | None = None,
        sliding_windows: Sequence[int | None] | None = None,
        layer_type: type[LayerCache] = LayerCache,
    ) -> None:
        self.policy = policy
        windows = [None] * n_layers if sliding_windows is None else sliding_windows
        policies = [policy.for_layer(i, n_layers) for i in range(n_layers)]
        self.layers = [
            layer_type(own, n_kv_heads, head_dim, context, window, lead_of(i, n_layers, own.tile))
            for i, (own, window) in enumerate(zip(policies, windows, strict=True))
        ]
        self.ledger: MassLedger | None = None
        self._plain = layer_type is LayerCache
        keys = [layer.view_key for layer in self.layers]
        self._like = [keys.index(key) for key in keys]  # the first layer whose queries see the same positions
        self._kinds = sorted(set(self._like))
        self._views: dict[int, View] = {}  # of these layers
        self._still_seen: dict[int, list[int]] = {}  # of these layers, at the last commit that had anything to forget
        self._awaited = 0  # the position up to which memory is kept for tokens; if fewer come, it is to go
        self._attentions: Attentions | None = None  # of the last step, unless anything else has changed the cache since

    def attend(
        self, layer: int, qkv: Float32, position: int, softmax: Softmax, out: Float32 | None = None, first: int = 0
    ) -> Float32:
        """Append and attend in one layer; see ``LayerCache.attend``."""
        self._attentions = None
        try:
            return self.layers[layer].attend(qkv, position, softmax, out, self._view(layer, position, qkv), first)
        except NumericalError as error:
            raise NumericalError(f"layer {layer}, position {position}: {error}") from None

    def _view(self, layer: int, position: int, qkv: Float32) -> View:
        """What the queries of a step see in a layer."""
        like = self._like[layer]
        view = self._views.get(like)
        if layer == 0 or view is None or (view.position, view.n_queries) != (position, len(qkv)):
            return self._look(like, position, qkv)
        return view

    def _look(self, like: int, position: int, qkv: Float32) -> View:
        """What queries at a position see in the layers like one; of as many queries it is the same object."""
        view = self._views.get(like)
        if view is None or not view.fits(qkv):
            view = self._views[like] = self.layers[like].view(position, qkv)
        else:
            view.go_to(position)
        return view

    def attentions(self, qkv: Float32, position: int, softmaxes: Sequence[Softmax]) -> "Attentions | None":
        """``attend`` of all layers in one step, for the kernels; None where a layer needs more than they do.

        qkv: the array (T, n_heads + 2 * n_kv_heads, head_dim), C order, that has each layer's queries, keys and values in
        turn.
        """
        if not self._plain or qkv.shape[2] % LANES:
            return None
        views = {i: self._look(i, position, qkv) for i in self._kinds}
        if self._attentions is None or not self._attentions.renew(views, qkv, softmaxes):
            if any(softmax.sink_logits is not None for softmax in softmaxes):
                return None
            self._attentions = Attentions(self.layers, views, self._like, qkv, softmaxes)
        return self._attentions

    def commit(self, position: int, coming: int = 0) -> None:
        """Make everything below ``position`` final, in all layers.

        coming: the position up to which tokens follow at once; their tiles get the memory of those that go.
        """
        states = [layer.ledger for layer in self.layers if layer.ledger is not None] if self.ledger is not None else []
        if self.ledger is not None and states:
            self.ledger.add(position - states[0].shape[2], states)
        still_seen = {i: self.layers[i].still_seen(position) for i in self._kinds}
        which: Sequence[int] = range(len(self.layers))
        as_before = still_seen == self._still_seen and coming >= self._awaited
        if self._attentions is not None and self._attentions.is_intact and as_before:
            which = self._attentions.unsettled  # in the others no tile has entered a tier, and none has left sight
        else:
            self._attentions, self._awaited = None, 0
        for i in which:
            self.layers[i].forget(still_seen[self._like[i]], coming)
            if self.layers[i].recent.keeps_memory:
                self._awaited = coming
        self._still_seen = still_seen

    def keep_ledger(self, on: bool) -> MassLedger | None:
        """Begin a new ledger of the segments' shares of attention, or end it."""
        self._attentions = None
        for layer in self.layers:
            layer.keeps_ledger = on
        most = max(len(layer.tiers) for layer in self.layers)
        names = ["sink", *(f"old{i + 1 if i else ''}" for i in reversed(range(most))), "recent"]
        self.ledger = MassLedger(names) if on else None
        return self.ledger

    def continue_ledger(self, other: "Cache", position: int) -> None:
        """Go on with the ledger of another cache of the same policy, if it has one, from a position on."""
        if other.ledger is not None:
            self.keep_ledger(True)
            self.ledger = other.ledger
            self.ledger.truncate(position)

    @property
    def lowest(self) -> int:
        """The first position that ``truncate`` can go back to in all layers."""
        return max(layer.lowest for layer in self.layers)

    def truncate(self, position: int) -> None:
        """Forget the tokens from ``position`` on, in all layers; ``lowest`` or more, or the last one committed."""
        self._attentions, self._still_seen = None, {}  # a step that failed may have let tiles in and forgotten none
        for layer in self.layers:
            layer.truncate(position)
        if self.ledger is not None:
            self.ledger.truncate(position)

    def take_over(self, other: "Cache", position: int) -> dict[str, int]:
        """Fill this cache, which is empty, from another one; see ``Session.retier``."""
        found = [own.take_over(layer, position) for own, layer in zip(self.layers, other.layers, strict=True)]
        return {"tokens": position, **{name: max(counts[name] for counts in found) for name in found[0]}}

    def fork(self) -> "Cache":
        """A cache of the same tokens that goes its own way; see ``LayerCache.fork``."""
        other = Cache.__new__(Cache)
        other.policy, other._plain = self.policy, self._plain
        other._like, other._kinds = self._like, self._kinds
        other._views, other._still_seen, other._awaited, other.ledger = {}, {}, 0, None
        self._attentions = other._attentions = None  # what is written to next may be copied
        other.layers = [layer.fork() for layer in self.layers]
        other.keep_ledger(False)
        return other

    def nbytes(self) -> dict[str, int]:
        """Bytes in use: {"sink", "old", "recent", "total"}."""
        parts = [layer.nbytes() for layer in self.layers]
        sums = {name: sum(part[name] for part in parts) for name in ("sink", "old", "recent")}
        return {**sums, "total": sum(sums.values())}
