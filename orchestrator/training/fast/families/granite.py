"""Granite 3, a Llama with multipliers of embeddings, residual sums, attention scores and logits, and Granite 4 dense.

Granite 4 (`granitemoehybrid`) may mix Mamba layers, attention and experts. The fast engine computes the bases that have
attention layers and no experts; their MLP is what is called the shared experts in the others.
"""

from dataclasses import replace

from orchestrator.training.fast.families.family import FIXED_FIELDS, HARMLESS_FIELDS, USED_FIELDS, Family

_MULTIPLIERS = frozenset({"attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"})

GRANITE = Family(
    model_type="granite",
    used_fields=USED_FIELDS | _MULTIPLIERS | {"attention_bias", "mlp_bias"},
)

# Settings of Mamba layers and experts, which these bases do not have.
_OF_HYBRIDS = {
    "intermediate_size",
    "mamba_chunk_size",
    "mamba_conv_bias",
    "mamba_d_conv",
    "mamba_d_head",
    "mamba_d_state",
    "mamba_expand",
    "mamba_n_groups",
    "mamba_n_heads",
    "mamba_proj_bias",
    "num_experts_per_tok",
    "router_aux_loss_coef",
    "time_step_limit",
}

GRANITE4 = replace(
    GRANITE,
    model_type="granitemoehybrid",
    groups=(*GRANITE.groups[:2], ("shared_mlp.input_linear",), ("shared_mlp.output_linear",)),
    inner_field="shared_intermediate_size",
    may_lack_positions=True,
    other_modules=frozenset({"self_attn", "shared_mlp", "shared_mlp.activation"}),
    used_fields=USED_FIELDS - {"intermediate_size"}
    | _MULTIPLIERS
    | {"attention_bias", "layer_types", "shared_intermediate_size"},
    # Published files have `normalization_function` and `init_method`, which transformers 5.23 does not read. The MLP
    # has no biases, whatever `mlp_bias` says.
    fixed_fields={
        **FIXED_FIELDS,
        "mlp_bias": (False,),
        "normalization_function": ("rmsnorm",),
        "num_local_experts": (0,),
        "output_router_logits": (False,),
        "position_embedding_type": ("nope", "rope"),
    },
    harmless_fields=HARMLESS_FIELDS | _OF_HYBRIDS | {"init_method"},
)
