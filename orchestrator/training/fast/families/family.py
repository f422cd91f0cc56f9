"""The description of a model family, and what all Llama-like families share.

The lists follow transformers 5.23: `modeling_llama.py`, `configuration_llama.py` and their siblings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

MODEL_MODULES = frozenset({"model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"})

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
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
        "unk_token_id",
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

Activation = Literal["silu", "gelu_tanh"]
"""Activation of the gate in a layer's MLP. "gelu_tanh" is the approximation by tanh (arXiv 1606.08415)."""


@dataclass(frozen=True)
class LayerNorms:
    """Names of the norms in a decoder layer; None where there is no such norm."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    """Applied before the residual sum."""
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    """Applied before the residual sum."""


@dataclass(frozen=True)
class Family:
    """Describes a model family: what its decoder computes, and what the fast engine understands of it.

    Modules and configuration fields that are not listed are refused. The defaults are those of Llama-like families.
    """

    model_type: str
    """`model_type` of a transformers configuration."""
    groups: tuple[tuple[str, ...], ...] = GROUPS
    """Linear layers of a decoder layer, by their names in the layer, grouped by the input that they share: queries,
    keys and values; output of the attention; gate and up of the MLP; down. A group may be one fused linear layer."""
    inner_field: str = "intermediate_size"
    """Configuration field with the number of features between the MLP's layers."""
    may_lack_positions: bool = False
    """Whether a base rotates queries and keys (RoPE) only if its `position_embedding_type` is "rope"."""
    norms: LayerNorms = LayerNorms()
    qk_norms: tuple[str, str] | None = None
    """Norms of queries and keys, by their names in the layer."""
    normalizes_all_heads: bool = False
    """Whether these norms are over all heads of a token together, rather than over each head."""
    norm_weight: Literal["plain", "float32", "plus_one"] = "plain"
    """How norms multiply by their weight w: the rounded sum by w, the float32 sum by w, or the float32 sum by 1 + w."""
    has_float32_angles: bool = False
    """Whether the tables of the rotary embedding are in float32, rather than in the compute dtype. The decoder reads
    the tables of the model; this is for kernels that are compiled without one."""
    activation: Activation = "silu"
    """Activation of the gate in the MLP."""
    scales_embedding: bool = False
    """Whether embeddings are multiplied by the square root of the hidden size, rounded to their dtype."""
    other_modules: frozenset[str] = frozenset({"self_attn", "mlp", "mlp.act_fn"})
    """Submodules of a decoder layer that have no weights of their own and change nothing."""
    model_modules: frozenset[str] = MODEL_MODULES
    """Modules outside the decoder layers, by their names in the model."""
    used_fields: frozenset[str] = USED_FIELDS
    """Configuration fields that the engine computes with, whatever their value, or that eligibility checks itself."""
    fixed_fields: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: FIXED_FIELDS)
    """Configuration fields that would change the computation -> the values under which they do not."""
    harmless_fields: frozenset[str] = HARMLESS_FIELDS
    """Configuration fields that do not influence losses or gradients."""

    def rotates(self, config: Any) -> bool:
        """Return whether a base with this configuration has a rotary embedding."""
        return not self.may_lack_positions or getattr(config, "position_embedding_type", None) == "rope"

    @property
    def layer_modules(self) -> frozenset[str]:
        """Submodules of a decoder layer, by their names in the layer."""
        linears = {name for group in self.groups for name in group}
        norms = {name for name in (*vars(self.norms).values(), *(self.qk_norms or ())) if name is not None}
        return self.other_modules | linears | norms
