"""The kernels: stateful flash attention over dense and quantized segments, and the merge of partial attentions."""

from . import untouched  # noqa: F401  before anything of Numba
from .flash import flash_attention
from .segment import Segment, quantize
from .state import empty_state, merge_states

__all__ = ["Segment", "empty_state", "flash_attention", "merge_states", "quantize"]
