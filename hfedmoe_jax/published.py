"""Published sizes: of checkpoints whose weights are not here, what `--dry_run` needs of their config.json."""

from typing import Any

_SWITCH_BASE = dict(
    model_type="switch_transformers", vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_heads=12,
    num_layers=12, num_decoder_layers=12, num_sparse_encoder_layers=6, num_sparse_decoder_layers=6,
    expert_capacity=64,
)  # fmt: skip
_DEEPSEEK = dict(
    vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
    num_attention_heads=16, num_key_value_heads=16, n_routed_experts=64, n_shared_experts=2,
    num_experts_per_tok=6, first_k_dense_replace=1, norm_topk_prob=False, rms_norm_eps=1e-6,
    rope_theta=10000.0,
)  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "switch_base_8": _SWITCH_BASE | dict(num_experts=8),
    "switch_base_64": _SWITCH_BASE | dict(num_experts=64),
    "olmoe_1b_7b": dict(
        model_type="olmoe", vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
        num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
        norm_topk_prob=False, rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=4096,
    ),
    "mixtral_8x7b": dict(
        model_type="mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, num_local_experts=8,
        num_experts_per_tok=2, rms_norm_eps=1e-5, rope_theta=1e6, max_position_embeddings=32768,
    ),
    "deepseek_moe_16b": _DEEPSEEK
    | dict(model_type="deepseek", num_hidden_layers=28, max_position_embeddings=4096),
    "deepseek_v2_lite": _DEEPSEEK
    | dict(
        model_type="deepseek_v2", num_hidden_layers=27, kv_lora_rank=512, q_lora_rank=None,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, topk_method="greedy",
        routed_scaling_factor=1.0, max_position_embeddings=163840,
        rope_scaling=dict(
            type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1,
            mscale=0.707, mscale_all_dim=0.707,
        ),
    ),
}  # fmt: skip
"""By the name in `model.source`."""
