"""Phi-3 and Phi-4: fused linear layers, a window, and heads that are rotated in part."""

from orchestrator.training.fast.families.family import FIXED_FIELDS, HARMLESS_FIELDS, USED_FIELDS, Family

PHI3 = Family(
    model_type="phi3",
    groups=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    other_modules=frozenset({"self_attn", "mlp", "mlp.activation_fn", "resid_attn_dropout", "resid_mlp_dropout"}),
    used_fields=USED_FIELDS | {"original_max_position_embeddings", "partial_rotary_factor", "sliding_window"},
    # Published files have fields of the models' own code; transformers 5.23 reads none of them, nor `embd_pdrop`.
    fixed_fields={
        **FIXED_FIELDS,
        "attention_bias": (False,),
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
        "lm_head_bias": (False,),
        "mlp_bias": (False,),
        "resid_pdrop": (0.0,),
    },
    harmless_fields=HARMLESS_FIELDS | {"embd_pdrop"},
)
