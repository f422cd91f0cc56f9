"""Predicts the GPU memory of the fast engine from the shapes of base, adapters and batch: arithmetic alone.

The formulas follow `step/layer.py`, `mlp.py` and `experts.py` (what a layer keeps), `step/adapters.py` (what a slot
holds) and bitsandbytes' NF4 layout: one scale for 64 weights; quantized again, the scales take a byte each and one
float32 for 256 of them (arXiv 2305.14314, section 3).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.sizes import FLOAT, MAX_GROUPS, MAX_LOGITS, Recompute, num_absmax, num_bytes

GIB = 2**30

MAX_PASS_TOKENS = 16384
"""Most tokens of one training pass. Longer passes are no faster."""

INT64 = 8

BF16 = 2
"""Bytes of a bfloat16."""

WORKSPACE = 64 * 2**20
"""Bytes of cuBLAS's workspaces on a Hopper GPU: 32 MiB for each of the two streams."""


@dataclass(frozen=True)
class MemoryOption:
    """One way to hold a trial on its device: what is given up for memory."""

    keeps_base: bool
    """Whether the base is dequantized once and kept, rather than at each use."""
    recompute: Recompute
    max_tokens: int
    """Most tokens of one pass."""

    def relative_time(self, shape: BaseShape) -> float:
        """Estimate the time of a token, relative to keeping everything. Options are ordered by it.

        Recomputing a layer repeats its forward, which is half of the work with a frozen base. Dequantizing moves the
        same bytes whatever the number of tokens: on an H200 it costs about 237 / T of a product of T tokens, and more
        where a token uses only a part of what is dequantized. Short passes do not fill the GPU.

        Args:
            shape: sizes of the base.
        """
        time = {"nothing": 1.0, "elementwise": 1.03, "layers": 1.5}[self.recompute]
        time *= 1.0 if self.keeps_base else 1 + 237 / self.max_tokens / shape.used_share
        return time * (1 + 128 / self.max_tokens)


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes on the GPU at the peak of a step or of an evaluation, whichever is larger."""

    base: int
    """The model as loaded, quantized."""
    dequantized: int
    """The base's dequantized weights, where they are kept."""
    adapters: int
    """LoRA weights of all slots, and the trainer's own copy of one adapter."""
    gradients: int
    optimizer: int
    """Moments of the optimizer."""
    activations: int
    """What the forward keeps for the backward; with CUDA graphs, what their memory pool holds."""
    head: int
    """Logits and their gradient."""
    transient: int
    """The largest of the tensors that live only within a layer's pass, and cuBLAS's workspaces."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return name -> bytes."""
        return dict(vars(self))


def predict(
    shape: BaseShape,
    option: MemoryOption,
    tokens: int,
    evaluation_tokens: int,
    rank: int,
    targets: Collection[str],
    *,
    expert_rank: int = 0,
    num_slots: int = 1,
    adapter_bytes: int = FLOAT,
    eight_bit: bool = False,
    quantized: bool = True,
    double_quant: bool = True,
) -> MemoryPrediction:
    """Predict the peak memory of the fast engine on one GPU.

    Args:
        shape: sizes of the base.
        option: how the trial is held.
        tokens: tokens of the largest training bucket.
        evaluation_tokens: tokens of the largest evaluation bucket.
        rank: stack rank, padded.
        targets: adapted linear layers and matrices of experts, by their names in `BaseShape`.
        expert_rank: stack rank of experts, where any are adapted.
        num_slots: number of adapters that train together.
        adapter_bytes: bytes of one LoRA weight.
        eight_bit: whether the optimizer's moments are in eight bits.
        quantized: whether the base's weights are in 4 bits rather than 16.
        double_quant: whether the base's scales are quantized too.
    """
    linears = [sizes for name, sizes in shape.linears.items() if name in targets]
    experts = [sizes for name, sizes in shape.expert_matrices.items() if name in targets]
    matrices = [rank * size for sizes in linears for size in sizes]
    matrices += [shape.experts * expert_rank * size for sizes in experts for size in sizes]
    adapter = shape.layers * sum(matrices)
    slots = num_slots * adapter
    in_eight_bits = shape.layers * sum(num_bytes(each) + FLOAT * num_absmax(each) for each in matrices)
    moment = in_eight_bits if eight_bit else adapter * adapter_bytes

    hidden = rank * len(linears) + shape.experts_per_token * expert_rank * len(experts)
    activations = tokens * _activations_per_token(shape, option.recompute, hidden)
    dequantized = 0 if option.keeps_base else _dequantized_at_use(shape, quantized)
    # A product with the base and one with the adapters follow each other.
    in_parts = num_slots * shape.experts > MAX_GROUPS
    at_use = max(dequantized, num_slots * expert_rank * shape.experts * converted_at_use(experts, in_parts))
    features = _transient_features(shape, bool(experts), in_parts)
    in_backward, in_evaluation = (
        count * BF16 * each + at_use for count, each in zip((tokens, evaluation_tokens), features, strict=True)
    )

    def logits(count: int, states: int) -> int:
        return BF16 * (min(count * shape.vocabulary, MAX_LOGITS) + states * count * shape.hidden)

    # All tokens may have a loss. Beside the logits there are normed states, those of tokens with a loss, and gradients.
    head = logits(tokens, 3)
    # A step peaks either at the head, where the activations of all layers exist, or in the last layer's backward.
    transient = max(head, in_backward) - head
    evaluating = max(logits(evaluation_tokens, 2), in_evaluation)
    transient = max(transient, evaluating - activations - head)
    # Of 16-bit weights, only those that are concatenated are copied.
    copied = shape.num_linear_weights if quantized else shape.layers * sum(_concatenated(shape))
    return MemoryPrediction(
        base=_loaded_base(shape, quantized, double_quant),
        dequantized=BF16 * copied if option.keeps_base else 0,
        adapters=slots * adapter_bytes + adapter * adapter_bytes,
        gradients=slots * FLOAT,
        optimizer=2 * num_slots * moment,
        activations=activations,
        head=head,
        transient=transient + WORKSPACE,
    )


def _concatenated(shape: BaseShape) -> list[int]:
    """Return the numbers of weights of a layer that are concatenated, because several layers read the same input."""
    weights = zip(shape.groups, (shape.hidden * shape.qkv, 0, 2 * shape.hidden * shape.inner, 0), strict=False)
    return [number for group, number in weights if len(group) > 1]


def _dequantized_at_use(shape: BaseShape, quantized: bool) -> int:
    """Return the bytes of the largest weights that exist dequantized, within one product."""
    mlp = 0 if shape.experts else 2 * shape.hidden * shape.inner
    # Layers that read the same input are dequantized one by one, then concatenated.
    layers = (2 if quantized else 1) * BF16 * max(shape.hidden * shape.qkv, mlp)
    if not quantized:
        return layers
    # All experts are one tensor. Their scales exist in four forms while double quantization is undone.
    experts = 2 * shape.experts * shape.hidden * shape.expert_inner
    return max(layers, experts * BF16 + experts // 64 * 4 * FLOAT)


def converted_at_use(experts: Sequence[tuple[int, int]], in_parts: bool) -> int:
    """Return the bytes, for each rank, slot and expert, of the adapters of one matrix within its backward.

    A and B exist in the compute dtype beside the larger of their gradients in it.

    Args:
        experts: (in, out features) of each adapted matrix.
        in_parts: whether a gradient is computed in parts, which exist beside the whole.
    """
    return BF16 * max((i + o + max(i, o) * (2 if in_parts else 1) for i, o in experts), default=0)


def _transient_features(shape: BaseShape, adapts_experts: bool, in_parts: bool) -> tuple[int, int]:
    """Return how many features of a token live only within the backward of a layer's MLP, and within its forward.

    Args:
        shape: sizes of the base.
        adapts_experts: whether any matrix of experts has adapters. Their products exist beside those of the base.
        in_parts: whether such a product is made in parts, so that there is another one beside it.
    """
    if not shape.experts:
        return 3 * shape.inner + 2 * shape.hidden, 3 * shape.inner + 3 * shape.hidden
    # Rows of the grouped products, sorted by expert and by token.
    row = shape.experts_per_token * shape.hidden
    backward, forward = (5 * shape.mlp_features + 2 * row, 3 * shape.mlp_features + 2 * row)
    if adapts_experts:
        backward += row * (2 if in_parts else 1)
        forward += shape.mlp_features * (3 if in_parts else 1)
    return backward + 3 * shape.hidden, forward + 3 * shape.hidden


def bytes_in_pieces(shape: BaseShape, base_bytes: int, num_shards: int, quantized: bool, double_quant: bool) -> int:
    """Return the bytes of a base of which one process holds a piece (`shard.base`).

    Beside its piece of each layer there are two buffers for whole layers, and all that is not cut.

    Args:
        shape: sizes of the base.
        base_bytes: the whole base.
        num_shards: pieces.
        quantized: whether the base's weights are in 4 bits rather than 16.
        double_quant: whether the base's scales are quantized too.
    """
    linears = _linear_bytes(shape, quantized, double_quant)
    return base_bytes - linears + linears // num_shards + 2 * linears // shape.layers


def _linear_bytes(shape: BaseShape, quantized: bool, double_quant: bool) -> int:
    """Return the bytes of the linear layers' weights and scales as loaded."""
    scales = (1 + FLOAT / 256 if double_quant else FLOAT) / 64
    return int(shape.num_linear_weights * (0.5 + scales if quantized else BF16))


def _loaded_base(shape: BaseShape, quantized: bool, double_quant: bool) -> int:
    """Return the bytes of the model as loaded."""
    embedded = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    norms = ((shape.norms_before + shape.norms_after) * shape.layers + 1) * shape.hidden
    routers = shape.layers * shape.experts * shape.hidden
    return BF16 * (embedded + norms + routers) + _linear_bytes(shape, quantized, double_quant)


def _activations_per_token(shape: BaseShape, recompute: Recompute, lora_features: int) -> int:
    """Return the bytes that the forward keeps for each token, in all layers.

    Args:
        shape: sizes of the base.
        recompute: what the backward computes again. With "layers", one whole layer exists beside all inputs.
        lora_features: features between A and B of all adapters in a decoder layer.
    """
    width, norms = shape.queries * shape.head_size, shape.norms_before + shape.norms_after + shape.qk_norms
    features = (2 + shape.norms_after) * shape.hidden + shape.qkv + width + 2 * shape.mlp_features + lora_features
    if shape.qk_norms:  # queries and keys are kept before and after their norms
        features += shape.qkv
    # For each expert of a token: its score, its adapter's scale, its number, and the places of its row.
    routing = (2 * FLOAT + 3 * INT64) * shape.experts_per_token
    kept = BF16 * features + FLOAT * (norms + shape.queries) + routing
    # Also the gated product and the normed inputs. Without a norm the input is the residual sum.
    whole = kept + BF16 * (shape.norms_before * shape.hidden + shape.mlp_features)
    a_layer = {"nothing": whole, "elementwise": kept, "layers": BF16 * 2 * shape.hidden}[recompute]
    return shape.layers * a_layer + (whole if recompute == "layers" else 0)


def memory_options(
    shape: BaseShape,
    longest: int,
    largest_batch: int,
    *,
    keeps_base: bool | None,
    recompute: bool | None,
    max_pass_tokens: int,
) -> list[MemoryOption]:
    """List the ways to hold a trial, the fastest first.

    Args:
        shape: sizes of the base.
        longest: tokens of the longest row. No pass is shorter.
        largest_batch: tokens of the largest batch. No pass needs to be longer.
        keeps_base: whether the dequantized base is kept; None leaves it open.
        recompute: whether whole layers are recomputed; None leaves it open.
        max_pass_tokens: most tokens of one pass.
    """
    tokens = {max(longest, min(largest_batch, max_pass_tokens >> halvings)) for halvings in range(8)}
    levels: list[Recompute] = ["nothing", "elementwise", "layers"]
    if recompute is not None:
        levels = ["layers"] if recompute else ["nothing"]
    options = [
        MemoryOption(keeps, level, count)
        for keeps in ([True, False] if keeps_base is None else [keeps_base])
        for level in levels
        for count in tokens
    ]
    return sorted(options, key=lambda option: option.relative_time(shape))
