"""The description of a model family, and what all Llama-like families share.

The lists follow transformers 5.23: `modeling_llama.py`, `configuration_llama.py` and their siblings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MODEL_MODULES = frozenset({"model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"})

LAYER_MODULES = frozenset(
    {
        "self_attn",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "mlp.act_fn",
        "input_layernorm",
        "post_attention_layernorm",
    }
)

USED_FIELDS = frozenset(
    {
        "dtype",
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "quantization_config",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "vocab_size",
    }
)

FIXED_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0,),
    "hidden_act": ("silu",),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
}

HARMLESS_FIELDS = frozenset(
    {
        # Token ids, initial values, outputs, names.
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "transformers_version",
        "use_cache",
        # Left in config.json by earlier versions or other tools; transformers 5.23 reads none of them.
        "auto_map",
        "finetuning_task",
        "is_llama_config",
        "max_sequence_length",
        "pruned_heads",
        "task_specific_params",
        "tokenizer_class",
        "torchscript",
        "transformers.js_config",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
    }
)

ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


@dataclass(frozen=True)
class Family:
    """Lists what the fast engine understands of a model family. Everything else is refused.

    The defaults are those of Llama-like families.
    """

    model_type: str
    """`model_type` of a transformers configuration."""
    model_modules: frozenset[str] = MODEL_MODULES
    """Modules outside the decoder layers, by their names in the model."""
    layer_modules: frozenset[str] = LAYER_MODULES
    """Submodules of a decoder layer, by their names in the layer."""
    used_fields: frozenset[str] = USED_FIELDS
    """Configuration fields that the engine computes with, whatever their value, or that eligibility checks itself."""
    fixed_fields: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: FIXED_FIELDS)
    """Configuration fields that would change the computation -> the values under which they do not."""
    harmless_fields: frozenset[str] = HARMLESS_FIELDS
    """Configuration fields that do not influence losses or gradients."""
    rope_types: frozenset[str] = ROPE_TYPES
    """Kinds of rotary embeddings whose angles depend on nothing but the position."""
