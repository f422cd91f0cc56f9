"""GPU memory of the fast engine, told beforehand: arithmetic alone, from the shapes of base, adapters and batch.

Formulas follow `fast/decoder.py` (what a layer keeps), `fast/lora.py` (what a slot holds) and bitsandbytes' NF4 layout
(one scale for 64 weights; quantised once more, a byte each and one float32 for 256: arXiv 2305.14314, section 3).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

GIB = 2**30

Recompute = Literal["nothing", "elementwise", "layers"]
"""What the backward computes again: nothing; norms and gated products; all but each layer's input."""

MOST_TOKENS = 16384
"""Of one pass of training: longer ones are no faster."""

EVALUATION_TOKENS = 8192
"""Of one pass of an evaluation, which keeps nothing for a backward."""

MAX_LOGITS = 1 << 26
"""Elements of the logits that exist at a time."""

BF16, FLOAT = 2, 4
SHARED, SMALL = 256, 4096
"""Of moments in eight bits: elements that share a magnitude; elements of a matrix from which on it is in eight bits."""

WORKSPACE = 64 * 2**20
"""cuBLAS's buffers on a Hopper GPU: 32 MiB for each stream that it is used on, here two."""


@dataclass(frozen=True)
class BaseShape:
    """A Llama-like base."""

    hidden: int
    inner: int
    layers: int
    queries: int
    """Query heads."""
    keys: int
    """Key (and value) heads."""
    head_size: int
    vocabulary: int
    tied: bool
    """Whether the LM head is the embedding."""

    @classmethod
    def of(cls, config: Any) -> "BaseShape":
        """From a transformers configuration."""
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            size,
            config.vocab_size,
            config.tie_word_embeddings,
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one decoder layer: name -> (in, out)."""
        attended = self.queries * self.head_size
        return {
            "q_proj": (self.hidden, attended),
            "k_proj": (self.hidden, self.keys * self.head_size),
            "v_proj": (self.hidden, self.keys * self.head_size),
            "o_proj": (attended, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    @property
    def num_linear_weights(self) -> int:
        """Weights of all decoder layers' linear layers."""
        return self.layers * sum(i * o for i, o in self.linears.values())


@dataclass(frozen=True)
class MemoryOption:
    """How a trial is held: what is given up for memory."""

    keeps_base: bool
    """Dequantised once and kept, instead of at each use."""
    recompute: Recompute
    max_tokens: int
    """Of one pass."""

    def relative_time(self) -> float:
        """Of a token, against keeping everything: what choices are ordered by.

        A layer computed again adds its forward: half of the work with a frozen base. Dequantising costs about 237 / T
        of a product at T tokens on an H200, for it moves the same bytes at any T. Short passes do not fill the GPU.
        """
        time = {"nothing": 1.0, "elementwise": 1.03, "layers": 1.5}[self.recompute]
        time *= 1.0 if self.keeps_base else 1 + 237 / self.max_tokens
        return time * (1 + 128 / self.max_tokens)


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes on the GPU at the peak of a step or an evaluation, whichever is larger."""

    base: int
    """The model as loaded, quantised."""
    kept: int
    """Its dequantised weights, where they are kept."""
    adapters: int
    """Weights of the slots, and the trainer's own copy."""
    gradients: int
    optimizer: int
    """Moments."""
    activations: int
    """What the forward keeps for the backward; with graphs, what their pool holds."""
    head: int
    """Logits and their gradient."""
    passing: int
    """The largest of what lives only within a layer's pass; cuBLAS's workspaces."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Name -> bytes."""
        return dict(vars(self))


def predict(
    shape: BaseShape,
    choice: MemoryOption,
    tokens: int,
    evaluation_tokens: int,
    rank: int,
    targets: Collection[str],
    *,
    num_slots: int = 1,
    adapter_bytes: int = FLOAT,
    eight_bit: bool = False,
    quantised: bool = True,
    double_quant: bool = True,
) -> MemoryPrediction:
    """Peak memory of the fast engine on one GPU.

    Args:
        shape: of the base.
        choice: how it is held.
        tokens: of the largest bucket that trains.
        evaluation_tokens: of the largest bucket that evaluates.
        rank: of the stack, padded.
        targets: adapted linear layers, by their last name.
        num_slots: adapters that train together.
        adapter_bytes: of one of the adapters' weights.
        eight_bit: whether the optimizer's moments are.
        quantised: 4-bit weights, or 16-bit ones.
        double_quant: whether the scales are quantised too.
    """
    linears, width = shape.num_linear_weights, shape.queries * shape.head_size
    scales = (1 + FLOAT / 256 if double_quant else FLOAT) / 64
    embedded = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    norms = (2 * shape.layers + 1) * shape.hidden
    base = BF16 * (embedded + norms) + int(linears * (0.5 + scales) if quantised else linears * BF16)
    adapted = {name: sizes for name, sizes in shape.linears.items() if name in targets}
    adapter = shape.layers * rank * sum(i + o for i, o in adapted.values())
    slots = num_slots * adapter
    matrices = [rank * size for sizes in adapted.values() for size in sizes]
    in_eight_bits = shape.layers * sum(num_bytes(each) + FLOAT * num_absmax(each) for each in matrices)
    moment = in_eight_bits if eight_bit else adapter * adapter_bytes

    qkv = (shape.queries + 2 * shape.keys) * shape.head_size
    elementwise = 2 * shape.hidden + shape.inner  # two normed inputs, the gated product
    kept = BF16 * (2 * shape.hidden + qkv + width + 2 * shape.inner + rank * len(adapted)) + FLOAT * (2 + shape.queries)
    whole = kept + BF16 * elementwise
    a_layer = {"nothing": whole, "elementwise": kept, "layers": BF16 * 2 * shape.hidden}[choice.recompute]
    activations = tokens * (shape.layers * a_layer + (whole if choice.recompute == "layers" else 0))

    weights = {"qkv": shape.hidden * qkv, "gate_up": 2 * shape.hidden * shape.inner}
    # Dequantised one by one, then laid together.
    dequantised = 0 if choice.keeps_base else (2 if quantised else 1) * BF16 * max(weights.values())
    in_backward = tokens * BF16 * (3 * shape.inner + 2 * shape.hidden)
    in_evaluation = evaluation_tokens * BF16 * (3 * shape.inner + 3 * shape.hidden)

    def logits(count: int) -> int:
        return BF16 * (min(count * shape.vocabulary, MAX_LOGITS) + 2 * count * shape.hidden)

    head = logits(tokens)
    # The step's peak is at the head, where all layers' activations stand, or in the last layer's backward.
    passing = max(head, in_backward + dequantised) - head
    evaluating = max(logits(evaluation_tokens), in_evaluation + dequantised)
    passing = max(passing, evaluating - activations - head)
    return MemoryPrediction(
        base=base,
        # Of 16-bit weights only those are copied that are laid together.
        kept=BF16 * (linears if quantised else shape.layers * sum(weights.values())) if choice.keeps_base else 0,
        adapters=slots * adapter_bytes + adapter * adapter_bytes,
        gradients=slots * FLOAT,
        optimizer=2 * num_slots * moment,
        activations=activations,
        head=head,
        passing=passing + WORKSPACE,
    )


def num_bytes(most: int) -> int:
    """Of a matrix of at most so many elements, of a moment in eight bits: of fewer, kept in 32, it may be more."""
    size = max(most, FLOAT * min(most, SMALL - 1))
    return size + -size % 16


def num_absmax(elements: int) -> int:
    """Of a moment in eight bits."""
    return -(-elements // SHARED)


def memory_options(
    longest: int, largest_batch: int, *, keeps_base: bool | None, recompute: bool | None, most_tokens: int
) -> list[MemoryOption]:
    """What can be given up, the fastest first.

    Args:
        longest: tokens of the longest row: no pass is shorter.
        largest_batch: tokens of the largest batch: no pass need be longer.
        keeps_base: forced, or None.
        recompute: forced (True is whole layers), or None.
        most_tokens: of one pass.
    """
    tokens = {max(longest, min(largest_batch, most_tokens >> halvings)) for halvings in range(8)}
    levels: list[Recompute] = ["nothing", "elementwise", "layers"]
    if recompute is not None:
        levels = ["layers"] if recompute else ["nothing"]
    options = [
        MemoryOption(keeps, level, count)
        for keeps in ([True, False] if keeps_base is None else [keeps_base])
        for level in levels
        for count in tokens
    ]
    return sorted(options, key=MemoryOption.relative_time)
