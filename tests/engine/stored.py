"""What a cache has stored, apart from where in memory it lies."""

from mixkv.kernels.segment import TileStore


def held_tiles(store: TileStore) -> list[bytes]:
    """Every tile that a store holds: scales, minima and codes of K and of V, without the page that it lies in."""
    found, layout = [], store.layout
    for t in range(store.first, store.stop):
        page, slot = store.place(t)
        views = [view(page, side) for side in (layout.k, layout.v) for view in (layout.params, layout.codes)]
        found.append(b"".join(view[:, slot].tobytes() for view in views))
        assert len(found[-1]) == layout.nbytes
    return found
