"""SmolLM3: Llama with layers that rotate no queries and keys (NoPE)."""

from orchestrator.training.fast.families.family import HARMLESS_FIELDS, USED_FIELDS, Family

SMOLLM3 = Family(
    model_type="smollm3",
    used_fields=USED_FIELDS | {"attention_bias", "layer_types", "mlp_bias", "no_rope_layers", "sliding_window"},
    # Masks follow `layer_types`, whatever `use_sliding_window` says, and `no_rope_layers` says what
    # `no_rope_layer_interval` does. The others are left in published files; transformers 5.23 does not read them.
    harmless_fields=HARMLESS_FIELDS
    | {"max_window_layers", "no_rope_layer_interval", "pretraining_tp", "use_sliding_window"},
)
