"""SmolLM3: Llama with layers that rotate no queries and keys (NoPE)."""

from orchestrator.training.fast.families.family import HARMLESS_FIELDS, USED_FIELDS, Family

SMOLLM3 = Family(
    model_type="smollm3",
    used_fields=USED_FIELDS
    | {"attention_bias", "layer_types", "mlp_bias", "no_rope_layers", "sliding_window", "use_sliding_window"},
    # Only says which layers are in `no_rope_layers`.
    harmless_fields=HARMLESS_FIELDS | {"no_rope_layer_interval"},
)
