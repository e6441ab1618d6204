"""The tensors of a model under Hugging Face's names: which there are, and of what shape."""

from .config import ModelConfig

Shape = tuple[int, ...]


def layer_prefix(layer: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"model.layers.{layer}."


def norm_names(config: ModelConfig) -> dict[str, str]:
    """The norms of a layer by their place: before and behind attention, before and behind the MLP."""
    if config.pre_norms and config.post_norms:
        return {
            "attention_in": "input_layernorm",
            "attention_out": "post_attention_layernorm",
            "mlp_in": "pre_feedforward_layernorm",
            "mlp_out": "post_feedforward_layernorm",
        }
    if config.pre_norms:
        return {"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}
    return {"attention_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}


def qkv_names(config: ModelConfig) -> list[str]:
    """The matrices that give queries, keys and values."""
    return ["self_attn.qkv_proj"] if config.fused_projections else [f"self_attn.{part}_proj" for part in "qkv"]


def gate_up_names(config: ModelConfig) -> list[str]:
    """The matrices that give gate and up of an MLP."""
    return ["mlp.gate_up_proj"] if config.fused_projections else ["mlp.gate_proj", "mlp.up_proj"]


def expert_name(expert: int, matrix: str) -> str:
    """One of an expert's matrices: gate_proj, up_proj or down_proj."""
    return f"mlp.experts.{expert}.{matrix}"


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor that a model of this config has."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for i in range(config.num_hidden_layers):
        shapes |= {layer_prefix(i) + name: shape for name, shape in _layer(config, i).items()}
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _layer(config: ModelConfig, layer: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{norm}.weight": (config.hidden_size,) for norm in norm_names(config).values()}
    shapes |= _attention(config)
    inner = config.intermediate_size
    if not config.has_experts(layer):
        up = (
            {"mlp.gate_up_proj": 2 * inner} if config.fused_projections else dict.fromkeys(gate_up_names(config), inner)
        )
        for name, rows in up.items():
            shapes |= _linear(name, rows, config.hidden_size, config.mlp_bias)
        return shapes | _linear("mlp.down_proj", config.hidden_size, inner, config.mlp_bias)
    shapes |= _linear("mlp.gate", config.num_experts, config.hidden_size, config.router_bias)
    inner = config.moe_intermediate_size
    for expert in range(config.num_experts):
        for matrix in ("gate_proj", "up_proj"):
            shapes |= _linear(expert_name(expert, matrix), inner, config.hidden_size, config.router_bias)
        shapes |= _linear(expert_name(expert, "down_proj"), config.hidden_size, inner, config.router_bias)
    return shapes


def _attention(config: ModelConfig) -> dict[str, Shape]:
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    rows = {"self_attn.qkv_proj": q + 2 * kv}
    if not config.fused_projections:
        rows = dict(zip(qkv_names(config), (q, kv, kv), strict=True))
    shapes: dict[str, Shape] = {}
    for name, count in rows.items():
        shapes |= _linear(name, count, config.hidden_size, config.attention_bias)
    shapes |= _linear("self_attn.o_proj", config.hidden_size, q, config.attention_out_bias)
    if config.qk_norm != "none":
        whole = config.qk_norm == "all"
        shapes["self_attn.q_norm.weight"] = (q if whole else config.head_dim,)
        shapes["self_attn.k_norm.weight"] = (kv if whole else config.head_dim,)
    if config.sink_logits:
        shapes["self_attn.sinks"] = (config.num_attention_heads,)
    return shapes


def _linear(name: str, rows: int, columns: int, biased: bool) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.weight": (rows, columns)}
    return {**shapes, f"{name}.bias": (rows,)} if biased else shapes
