"""What a model is: its dimensions and the choices of its architecture. All architectures are these fields, and no code."""

from dataclasses import dataclass

from . import limits
from .check import positive_float, shown, whole
from .errors import ModelError
from .linear import GATES
from .rope import Rope

ARCHITECTURES = {  # model_type -> the class of config.json's "architectures"
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
QK_NORMS = ("none", "head", "all")

LARGEST = {
    "vocab_size": limits.MAX_VOCAB_SIZE,
    "hidden_size": limits.MAX_HIDDEN_SIZE,
    "intermediate_size": limits.MAX_INTERMEDIATE_SIZE,
    "num_hidden_layers": limits.MAX_LAYERS,
    "num_attention_heads": limits.MAX_HEADS,
    "num_key_value_heads": limits.MAX_HEADS,
    "head_dim": limits.MAX_HEAD_DIM,
    "max_position_embeddings": limits.MAX_CONTEXT,
}
_POSITIVE = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
_POSITIVE_OR_ZERO = ("attn_logit_softcapping", "final_logit_softcapping", "attention_multiplier", "norm_offset")
_FLAGS = (
    "tie_word_embeddings", "attention_bias", "attention_out_bias", "mlp_bias", "fused_projections", "pre_norms",
    "post_norms", "sink_logits", "norm_topk_prob", "router_bias",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The dimensions and choices of one model; where Hugging Face has a name for a field, it is that one.

    Every field is checked when the object is made; ModelError names the field, the value and what is allowed.

    Attributes:
        architecture: one of ``ARCHITECTURES``.
        max_position_embeddings: the most tokens of a sequence.
        rope: of all layers, or with ``rope_local`` of those that see everything.
        rope_local: of the layers with a sliding window, where it is another.
        rotary_dim: how many of a head's channels turn, the first ones; 0 for all.
        no_rope_layers: layers whose queries and keys do not turn.
        sliding_window, sliding_layers: how many positions a query sees in these layers, itself included.
        attention_bias: of queries, keys and values; attention_out_bias: of the output projection.
        fused_projections: q, k and v are one matrix in the file, gate and up another.
        qk_norm: RMSNorm of queries and keys before they turn: "head" by head, or over "all" heads at once.
        pre_norms, post_norms: RMSNorm of the inputs, and of the outputs, of attention and MLP.
        norm_offset: what is added to the weights of norms as stored.
        activation: of the gate, one of models/linear.py ``GATES``.
        embedding_multiplier: embeddings are multiplied by it; residual_multiplier: so is what a layer adds.
        logits_scaling: logits are divided by it.
        attention_multiplier: the scale of the softmax; 0 for 1 / sqrt(head_dim).
        attn_logit_softcapping, final_logit_softcapping: of attention's logits and of the model's, 0 for none.
        sink_logits: each head has a logit without a value that takes part in its softmax.
        num_experts: 0 for an MLP in every layer; num_experts_per_tok of them see a token.
        moe_intermediate_size: of an expert.
        norm_topk_prob: the weights of a token's experts add up to 1.
        dense_layers: layers with an MLP in a model with experts.
        router_bias: the router has biases, and so have the experts.

    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope: Rope = Rope()
    rope_local: Rope | None = None
    rotary_dim: int = 0
    no_rope_layers: tuple[int, ...] = ()
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    fused_projections: bool = False
    qk_norm: str = "none"
    pre_norms: bool = True
    post_norms: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attention_multiplier: float = 0.0
    attn_logit_softcapping: float = 0.0
    final_logit_softcapping: float = 0.0
    sink_logits: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()
    router_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, str) or self.architecture not in ARCHITECTURES:
            raise ModelError(f"architecture is {shown(self.architecture)}; supported: {', '.join(ARCHITECTURES)}")
        for field, largest in LARGEST.items():
            whole(field, getattr(self, field), 1, largest)
        if self.head_dim % 2:
            raise ModelError(f"head_dim is {self.head_dim}; it must be even, from 2 to {limits.MAX_HEAD_DIM}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"num_attention_heads is {self.num_attention_heads}; it must be a multiple of "
                f"num_key_value_heads, which is {self.num_key_value_heads}"
            )
        most = limits.MAX_HEADS_PER_KV_HEAD * self.num_key_value_heads
        if self.num_attention_heads > most:
            raise ModelError(
                f"num_attention_heads is {self.num_attention_heads}; it must be at most {most} for "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        object.__setattr__(self, "rms_norm_eps", positive_float("rms_norm_eps", self.rms_norm_eps, limits.MAX_NORM_EPS))
        for field in (*_POSITIVE, *_POSITIVE_OR_ZERO):
            value = getattr(self, field)
            if field in _POSITIVE or value != 0:
                object.__setattr__(self, field, positive_float(field, value, limits.MAX_MULTIPLIER))
        for field in _FLAGS:
            if not isinstance(getattr(self, field), bool):
                raise ModelError(f"{field} is {shown(getattr(self, field))}; it must be true or false")
        for field, allowed in (("activation", tuple(GATES)), ("qk_norm", QK_NORMS)):
            if getattr(self, field) not in allowed:
                raise ModelError(f"{field} is {shown(getattr(self, field))}; supported: {', '.join(allowed)}")
        if not self.pre_norms and not self.post_norms:
            raise ModelError("pre_norms and post_norms are both false; a model needs one of them")
        self._check_positions()
        self._check_experts()
        if self.bos_token_id is not None:
            whole("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)
        if not isinstance(self.eos_token_ids, tuple):
            raise ModelError(f"eos_token_ids is {shown(self.eos_token_ids)}; it must be a tuple of token ids")
        for token in self.eos_token_ids:
            whole("eos_token_id", token, 0, self.vocab_size - 1)

    def _check_positions(self) -> None:
        if whole("rotary_dim", self.rotary_dim, 0, self.head_dim) % 2:
            raise ModelError(
                f"rotary_dim is {self.rotary_dim}; it must be even, from 2 to {self.head_dim}, or 0 for all"
            )
        for rope in self.ropes:
            rope.check_dim(self.rotary_channels)
        for field in ("no_rope_layers", "sliding_layers", "dense_layers"):
            if not isinstance(getattr(self, field), tuple):
                raise ModelError(f"{field} is {shown(getattr(self, field))}; it must be a tuple of numbers of layers")
            for layer in getattr(self, field):
                whole(f"a layer of {field}", layer, 0, self.num_hidden_layers - 1)
        if self.sliding_window is not None:
            whole("sliding_window", self.sliding_window, 1, limits.MAX_CONTEXT)
        elif self.sliding_layers:
            raise ModelError("sliding_layers names layers, but there is no sliding_window")

    def _check_experts(self) -> None:
        if self.num_experts == 0:
            return
        whole(
            "num_experts",
            self.num_experts,
            1,
            min(limits.MAX_EXPERTS, limits.MAX_EXPERTS_IN_ALL // self.num_hidden_layers),
        )
        whole("num_experts_per_tok", self.num_experts_per_tok, 1, self.num_experts)
        whole("moe_intermediate_size", self.moe_intermediate_size, 1, limits.MAX_INTERMEDIATE_SIZE)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """Every rotary embedding that there is."""
        return (self.rope,) if self.rope_local is None else (self.rope, self.rope_local)

    @property
    def rotary_channels(self) -> int:
        """How many of a head's channels turn."""
        return self.rotary_dim or self.head_dim

    @property
    def softmax_scale(self) -> float:
        """By what q.k is multiplied."""
        return self.attention_multiplier or self.head_dim**-0.5

    @property
    def sliding_windows(self) -> tuple[int | None, ...]:
        """How many positions a query sees in each layer; None for all."""
        sliding = frozenset(self.sliding_layers)
        return tuple(self.sliding_window if i in sliding else None for i in range(self.num_hidden_layers))

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts, and not an MLP."""
        return self.num_experts > 0 and layer not in self.dense_layers
