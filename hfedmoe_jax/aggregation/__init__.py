"""Aggregation at the server: weights by rule, one streaming mean, exact sums."""

from hfedmoe_jax.aggregation.rules import (
    Upload,
    dominant_set,
    expert_rules,
    gating_rules,
    routing_consistency,
)

__all__ = ["Upload", "dominant_set", "expert_rules", "gating_rules", "routing_consistency"]
