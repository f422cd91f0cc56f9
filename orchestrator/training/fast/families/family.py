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

EXPERT_FIELDS = frozenset({"num_experts", "num_experts_per_tok", "num_local_experts"})

EXPERT_HARMLESS_FIELDS = frozenset({"output_router_logits", "router_aux_loss_coef"})
"""The loss of a router, which no trial trains with (`base.load_base`)."""

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

Activation = Literal["silu", "gelu_tanh", "clamped_silu"]
"""Activation of the gate in a layer's MLP. "gelu_tanh" is the approximation by tanh (arXiv 1606.08415).

"clamped_silu" is that of gpt-oss: gates and ups alternate; gates are at most 7, ups between -7 and 7; the result is
gate * sigmoid(1.702 gate) * (up + 1)."""


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
class ExpertNames:
    """Names of the router and the experts in a decoder layer, and how experts are chosen and stored.

    The matrices of all experts are one parameter: gate and up together `gate_up_proj`, and `down_proj`.
    """

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    other_modules: frozenset[str] = frozenset({"mlp", "mlp.experts.act_fn"})
    """Other submodules of a layer's MLP."""
    scores: Literal["all", "chosen"] = "all"
    """Whether scores are the softmax over all experts, or over the logits of those that are chosen. Where all scores
    of chosen experts are divided by their sum (`Settings.normalizes_scores`), both are the same but for rounding."""
    is_transposed: bool = False
    """Whether a matrix is (in, out) rather than (out, in)."""
    has_biases: bool = False
    """Whether router and experts have biases."""

    @property
    def modules(self) -> frozenset[str]:
        """Submodules of the MLP, by their names in the layer."""
        return self.other_modules | {self.router, self.experts}

    @property
    def parameters(self) -> frozenset[str]:
        """Parameters of router and experts other than `weight`, by their names in the layer."""
        names = {f"{self.experts}.gate_up_proj", f"{self.experts}.down_proj"}
        biases = {f"{name}_bias" for name in names} | {f"{self.router}.bias"}
        return frozenset(names | biases if self.has_biases else names)


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
    experts: ExpertNames | None = None
    """Router and experts of the layers that have them in place of the MLP in `groups`."""
    sinks: str | None = None
    """Parameter (heads,) of logits that take part in the softmax of each query head without a value; None without."""
    qk_norms: tuple[str, str] | None = None
    """Norms of queries and keys, by their names in the layer."""
    normalizes_all_heads: bool = False
    """Whether these norms are over all heads of a token together, rather than over each head."""
    norm_weight: Literal["plain", "float32", "plus_one"] = "plain"
    """How norms multiply by their weight w: the rounded sum by w, the float32 sum by w, or the float32 sum by 1 + w."""
    has_float32_angles: bool = False
    """Whether the tables of the rotary embedding are in float32, rather than in the compute dtype. The decoder reads
    the tables of the model; this is for kernels that are compiled without one."""
    has_half_tables: bool = False
    """Whether these tables have one column for each pair of features that are rotated together, rather than two."""
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

    def has_experts(self, layer: Any) -> bool:
        """Return whether a decoder layer of transformers has experts."""
        if self.experts is None:
            return False
        parent, _, name = self.experts.experts.rpartition(".")
        return hasattr(layer.get_submodule(parent), name)

    def rotates(self, config: Any) -> bool:
        """Return whether a base with this configuration has a rotary embedding."""
        return not self.may_lack_positions or getattr(config, "position_embedding_type", None) == "rope"

    def groups_of(self, layer: Any) -> tuple[tuple[str, ...], ...]:
        """Return the groups of a layer: empty ones in place of an MLP, where it has experts."""
        return self.groups_beside_experts if self.has_experts(layer) else self.groups

    @property
    def groups_beside_experts(self) -> tuple[tuple[str, ...], ...]:
        """Groups of a layer with experts: empty ones in place of an MLP."""
        return tuple(() if each[0].startswith("mlp.") else each for each in self.groups)

    def layer_modules(self, layer: Any) -> frozenset[str]:
        """Return the submodules that a decoder layer should have, by their names in the layer."""
        linears = {name for group in self.groups_of(layer) for name in group}
        norms = {name for name in (*vars(self.norms).values(), *(self.qk_norms or ())) if name is not None}
        others = self.other_modules
        if self.experts is not None and self.has_experts(layer):
            others = self.experts.modules | {name for name in others if not name.startswith("mlp")}
        return frozenset(others | linears | norms)

    def layer_parameters(self, layer: Any) -> frozenset[str]:
        """Return the parameters that a layer should have beside weights of modules and biases of linear layers."""
        names = set() if self.sinks is None else {self.sinks}
        if self.experts is not None and self.has_experts(layer):
            names |= self.experts.parameters
        return frozenset(names)
