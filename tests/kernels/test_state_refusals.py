"""States and outputs that are refused: the message says what was found and wanted, and not a byte has changed."""

from collections.abc import Callable

import numpy as np
import pytest

from mixkv.kernels import empty_state, flash_attention, merge_states

from .oracle import normal


def spoiled(array: np.ndarray) -> dict[str, tuple[object, str]]:
    """Forms of a float32 array that a call must refuse, and what the message says was found."""
    locked = array.copy()
    locked.flags.writeable = False
    wide = np.repeat(array, 2, axis=1)
    return {
        "float64": (array.astype(np.float64), "float32.*float64"),
        "float16": (array.astype(np.float16), "float32.*float16"),
        "other byte order": (array.astype(">f4"), "float32.*>f4"),
        "shape": (array[:, :-1].copy(), r"\(4, 3, (2|16)\).*\(4, 2, (2|16)\)|\(3, 4, 16\).*\(3, 3, 16\)"),
        "flat": (array.ravel(), r"shape.*found.*\(\d+,\)"),
        "Fortran order": (np.asfortranarray(array), "C-contiguous.*strides"),
        "every second": (wide[:, ::2], "C-contiguous.*strides"),
        "read-only": (locked, "writable.*read-only"),
        "list": (array.tolist(), "NumPy array.*list"),
    }


def bad_state(kind: str, state: np.ndarray) -> tuple[object, str]:
    if kind in ("negative", "nan"):
        bad = state.copy()
        bad[1, 2, 1] = -0.5 if kind == "negative" else np.nan
        return bad, "S >= 0.*-0.5" if kind == "negative" else "S >= 0.*nan"
    return spoiled(state)[kind]


SPOILED = [
    "float64",
    "float16",
    "other byte order",
    "shape",
    "flat",
    "Fortran order",
    "every second",
    "read-only",
    "list",
]


@pytest.fixture
def partial() -> tuple[np.ndarray, ...]:
    """q, k, v and a partial attention (out, state), T = 3, H = 4, D = 16."""
    rng = np.random.default_rng(4)
    q, k, v = normal(rng, 3, 4, 16), normal(rng, 10, 2, 16), normal(rng, 10, 2, 16)
    out, state = np.empty_like(q), empty_state(4, 3)
    flash_attention(q, k, v, state=state, out=out)
    return q, k, v, out, state


def refuse(call: Callable[[], object], message: str, *arrays: object) -> None:
    """The call raises ValueError with this message, and not a byte of the arrays changes."""
    held = [x for x in arrays if isinstance(x, np.ndarray)]
    before = [x.tobytes() for x in held]
    with pytest.raises(ValueError, match=message):
        call()
    assert [x.tobytes() for x in held] == before


@pytest.mark.parametrize("kind", [*SPOILED, "negative", "nan"])
def test_a_state_that_does_not_fit_is_refused(partial: tuple[np.ndarray, ...], kind: str) -> None:
    q, k, v, out, state = partial
    bad, message = bad_state(kind, state)
    refuse(lambda: flash_attention(q, k, v, state=bad, out=out), f"^state.*{message}", bad, out)
    if kind != "read-only":
        refuse(lambda: merge_states(out, bad, out, state), f"^state1.*{message}", bad, out)
        refuse(lambda: merge_states(out, state, out, bad, out=out), f"^state2.*{message}", bad, out)


@pytest.mark.parametrize("kind", SPOILED)
def test_an_out_that_does_not_fit_is_refused(partial: tuple[np.ndarray, ...], kind: str) -> None:
    q, k, v, out, state = partial
    bad, message = spoiled(out)[kind]
    refuse(lambda: flash_attention(q, k, v, state=state, out=bad), f"^out.*({message})", bad, state)
    refuse(lambda: flash_attention(q, k, v, out=bad), f"^out.*({message})", bad)
    refuse(lambda: merge_states(out, state, out, state, out=bad), f"^out.*({message})", bad, out, state)
    if kind != "read-only":
        refuse(lambda: merge_states(out, state, bad, state), f"^out2.*({message})", bad, out, state)
    if kind not in ("read-only", "shape"):
        refuse(lambda: merge_states(bad, state, out, state), "^out1 must be", bad, out, state)


def test_a_state_with_keys_but_no_out_is_refused(partial: tuple[np.ndarray, ...]) -> None:
    q, k, v, _, state = partial
    refuse(lambda: flash_attention(q, k, v, state=state), "S > 0.*out", state)
    one_row = empty_state(4, 3)
    one_row[2, 1] = 0.5, 1.0
    refuse(lambda: flash_attention(q, k, v, state=one_row), "S > 0.*out", one_row)


def test_any_other_bad_argument_leaves_state_and_out_alone(partial: tuple[np.ndarray, ...]) -> None:
    q, k, v, out, state = partial
    bad = [
        {"mask": np.zeros((3, 9), np.float32)},
        {"sink_logits": np.zeros(3, np.float32)},
        {"start": [0, 1]},
        {"positions": 0.5},
        {"k_position": 0.5},
        {"softcap": -1.0},
        {"precision": "f64"},
    ]
    for options in bad:
        refuse(
            lambda o=options: flash_attention(q, k, v, state=state, out=out, **o), f"^{next(iter(options))}", state, out
        )
