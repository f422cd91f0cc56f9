"""Qwen2, with biases on q, k and v, and a sliding window in some layers where `use_sliding_window` is set."""

from orchestrator.training.fast.families.family import FIXED_FIELDS, USED_FIELDS, Family

WINDOW_FIELDS = frozenset({"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"})

QWEN2 = Family(
    model_type="qwen2",
    # Left in config.json by earlier versions of the hub's files; transformers 5.23 does not read it.
    fixed_fields={**FIXED_FIELDS, "use_mrope": (False,)},
    used_fields=USED_FIELDS | WINDOW_FIELDS,
)
