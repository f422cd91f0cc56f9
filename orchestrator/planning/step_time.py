"""Foresees the time of a pass of the fast engine on a GPU: a roofline model with few constants.

Each part of a pass takes its FLOP or its bytes at a fixed share of what the GPU can do (Williams et al., "Roofline",
CACM 2009), and each kernel a fixed time beside that. The constants were fitted to passes measured on an H200:
docs/benchmarks.md, "What `plan` foresees".
"""

from dataclasses import dataclass
from math import hypot

from orchestrator.planning.gpus import Gpu
from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.plan.memory import MemoryOption

BF16, FLOAT = 2, 4

PRODUCTS, NARROW = 0.70, 230.0
"""Share of the peak that the base's products reach at infinite width, and the width at which they reach half of it."""
LORA, ELEMENTWISE, ATTENTION = 0.71, 0.62, 0.116
"""Shares of the bandwidth that LoRA's kernels, and norms, activations and AdamW reach; of the peak, attention's."""
KERNEL_S = 7.4e-6
"""Seconds that a kernel takes however little it does."""

PRODUCT_KERNELS, LORA_KERNELS, OTHER_KERNELS = 4, 8, 5
"""Kernels of a layer in one direction, for 4 groups of linear layers: products, LoRA's, and norms, activation,
attention."""

TILE, FINEST = 64, 64
"""Tokens of a tile on a GPU, and smallest distance of two buckets (`step.engine`)."""


@dataclass(frozen=True)
class PassWork:
    """What one pass computes."""

    tokens: int
    """Tokens of the bucket, fillers included."""
    targets: int
    """Tokens of them whose logits are computed."""
    row_tokens: float
    """Mean length of the row of a token: sum of squared lengths over sum of lengths."""
    num_slots: int
    rank: int
    """Stack rank."""
    adapted: frozenset[str]
    """Last parts of the names of the adapted linear layers."""


def bucket_tokens(real: float, num_slots: int) -> int:
    """Return the expected tokens of a bucket that holds a batch of each slot, see `Engine._bucket_of`.

    Args:
        real: tokens of all batches together, on average.
        num_slots: spans, of which each fills half a tile on average.
    """
    filled = int(real + num_slots * TILE / 2)
    return filled + bucket_distance(filled) // 2


def bucket_distance(tokens: int) -> int:
    """Return the tokens by which the bucket of so many tokens is larger than the one before it."""
    return max(FINEST, 1 << max(0, tokens.bit_length() - 5))


def train_seconds(shape: BaseShape, gpu: Gpu, option: MemoryOption, work: PassWork) -> float:
    """Return the seconds of a forward, backward and update."""
    # With a frozen base a backward has as many products as a forward. Recomputed layers take another forward.
    passes = 3 if option.recompute == "layers" else 2
    ins, outs, parameters = _adapted(shape, work)
    update = 7 * FLOAT * parameters / (ELEMENTWISE * gpu.bandwidth)  # weights, gradients and moments, read and written
    return update + _seconds(
        shape,
        gpu,
        option,
        work,
        passes=passes,
        head=2,
        lora=(4 * ins + 3 * outs) * passes / 2,
        elementwise=(16 * shape.hidden + 8 * shape.mlp_features) * passes / 2,
        attention=3.5 + (passes - 2),  # a backward takes 2.5 times a forward (Dao, arXiv 2307.08691)
    )


def evaluation_seconds(shape: BaseShape, gpu: Gpu, option: MemoryOption, work: PassWork) -> float:
    """Return the seconds of a forward pass alone, with adapters."""
    ins, outs, _ = _adapted(shape, work)
    elementwise = 8 * shape.hidden + 3 * shape.mlp_features
    return _seconds(
        shape, gpu, option, work, passes=1, head=1, lora=ins + 2 * outs, elementwise=elementwise, attention=1
    )


def _seconds(
    shape: BaseShape,
    gpu: Gpu,
    option: MemoryOption,
    work: PassWork,
    *,
    passes: int,
    head: int,
    lora: float,
    elementwise: float,
    attention: float,
) -> float:
    """Add the parts of a pass.

    Args:
        shape, gpu, option, work: as in `train_seconds`.
        passes: how often each weight of the base is multiplied.
        head: the same of the LM head.
        lora, elementwise: bfloat16 values of a token in a layer that these kernels read and write.
        attention: FLOP of the attention, in multiples of those of its forward.
    """
    layers, tokens = shape.layers, work.tokens
    weights = shape.num_linear_weights
    flops = 2 * passes * shape.used_share * weights * tokens + 2 * head * shape.hidden * shape.vocabulary * work.targets
    products = max(flops / _products_rate(shape, gpu), passes * BF16 * weights / gpu.bandwidth)
    if not option.keeps_base:  # half a byte of each weight is read, and two are written
        products += passes * 2.5 * weights / (ELEMENTWISE * gpu.bandwidth)
    of_lora = BF16 * layers * tokens * lora / (LORA * gpu.bandwidth)
    others = BF16 * layers * tokens * elementwise / (ELEMENTWISE * gpu.bandwidth)
    others += 2 * head * BF16 * shape.vocabulary * work.targets / (ELEMENTWISE * gpu.bandwidth)  # logits
    others += attention * _attention_flops(shape, work) / (ATTENTION * gpu.peak_flops)
    kernels = passes * layers * KERNEL_S
    return sum(
        hypot(seconds, number * kernels)
        for seconds, number in (
            (products, PRODUCT_KERNELS),
            (of_lora, LORA_KERNELS if work.adapted else 0),
            (others, OTHER_KERNELS),
        )
    )


def _products_rate(shape: BaseShape, gpu: Gpu) -> float:
    """Return the FLOP/s of the base's products. Narrow ones do not fill the GPU."""
    return PRODUCTS * gpu.peak_flops * shape.hidden / (shape.hidden + NARROW)


def _adapted(shape: BaseShape, work: PassWork) -> tuple[int, int, int]:
    """Return the input features of a layer's adapted groups, all their output features, and all slots' parameters."""
    sizes = {name: size for name, size in shape.linears.items() if name in work.adapted}
    groups = [[name.rpartition(".")[2] for name in group] for group in shape.groups]
    ins = sum(max((sizes[name][0] for name in group if name in sizes), default=0) for group in groups)
    outs = sum(out for _, out in sizes.values())
    parameters = work.num_slots * shape.layers * work.rank * sum(i + o for i, o in sizes.values())
    return ins, outs, parameters


def _attention_flops(shape: BaseShape, work: PassWork) -> float:
    """Return the FLOP of causal attention, forward: two products with half of the row, and one tile beyond it.

    The backward takes 2.5 times as many (Dao, arXiv 2307.08691).
    """
    visible = (work.row_tokens + TILE) / 2
    return 4.0 * shape.layers * work.tokens * visible * shape.queries * shape.head_size
