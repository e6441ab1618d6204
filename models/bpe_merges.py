"""The merges of a SentencePiece vocabulary: any two tokens that join to a third, the best score first.

This is what transformers' converters do (``generate_merges``), ties included, so the merges are those of the model's own
tokenizer.json, in its order. Vocabularies have up to 262,144 tokens and as many splits as they have characters; looked up
one by one in a dict they take seconds, as arrays of 64-bit hashes a tenth of that.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

_BASE, _MIX = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # odd: they can be divided by, modulo 2**64


def merges_of(tokens: Sequence[str], scores: NDArray[np.float32], merged: NDArray[np.bool_]) -> list[tuple[str, str]]:
    """All pairs of tokens that join to one of those that are ``merged``.

    Args:
        tokens: the vocabulary, each token once, at least one character in all.
        scores: (V,), of each token; better ones are merged first. Then come longer left sides, then longer right sides.
        merged: (V,), whether a token may come out of a merge. Every token may go into one.

    """
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    of_slice = _hasher(np.frombuffer("".join(tokens).encode("utf-32-le", "surrogatepass"), np.uint32))
    whole = of_slice(starts, ends)
    order = np.argsort(whole, kind="stable")
    known = whole[order]

    token = np.repeat(np.arange(len(tokens)), lengths)  # of every character, which is where a token may be split
    split = np.arange(len(token))
    inner = merged[token] & (split > starts[token])
    token, split = token[inner], split[inner]
    for left in (True, False):  # few splits are left once the left side is known
        found = of_slice(starts[token], split) if left else of_slice(split, ends[token])
        place = np.minimum(np.searchsorted(known, found), len(known) - 1)
        is_token = known[place] == found
        token, split = token[is_token], split[is_token]
        if left:
            lefts = order[place[is_token]]
        else:
            lefts, rights = lefts[is_token], order[place[is_token]]
    ranked = np.lexsort((rights, lefts, token, -lengths[rights], -lengths[lefts], -scores[token]))
    pairs = zip(lefts[ranked].tolist(), rights[ranked].tolist(), strict=True)
    return [(tokens[left], tokens[right]) for left, right in pairs]


def _hasher(characters: NDArray[np.uint32]) -> Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.uint64]]:
    """What gives the hashes of slices of a text: characters times powers of a base, summed up, modulo 2**64."""
    mixed = (characters.astype(np.uint64) + np.uint64(1)) * np.uint64(_MIX)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(_BASE)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed * _powers(_BASE, len(mixed)), dtype=np.uint64)])
    shift = _powers(pow(_BASE, -1, 1 << 64), len(sums))
    return lambda start, stop: (sums[stop] - sums[start]) * shift[start]


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    powers = np.full(count, base, np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)
