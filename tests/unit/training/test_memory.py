"""Predicted memory equals the bytes of the tensors that really exist, on the embedded base."""

from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import is_dataclass
from typing import Any

import pytest
import torch
from family_cases import FAMILY_CASES

from orchestrator.base import load_base
from orchestrator.base_size import BaseSize
from orchestrator.spec.sections import BaseSection, LoraSection
from orchestrator.training.fast.families import FAMILIES
from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.plan.memory import MemoryOption, memory_options, predict
from orchestrator.training.fast.sizes import Recompute
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.fast.step.flat_batch import Span, TokenizedRows
from orchestrator.training.fast.step.layer import Layer, SavedActivations
from orchestrator.training.fast.step.modules import FusedLinear
from orchestrator.training.model.targets import adapted_names, expected_modules

pytestmark = pytest.mark.usefixtures("on_cpu")

MIXED = "qwen3_moe with one layer without experts"
"""All layers are taken to have experts, which take more."""

RANK, EXPERT_RANK = 16, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEVELS: list[Recompute] = ["nothing", "elementwise", "layers"]
LLAMA_7B = BaseShape(4096, 11008, 32, 32, 32, 128, 32000, tied=False)


@pytest.fixture(scope="module")
def half() -> Any:
    """The embedded base as a GPU holds it: bfloat16 and NF4."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "device_count", lambda: 0)
        return load_base(BaseSection(model="embedded"))


def predicted_for(
    model: Any, recompute: Recompute = "nothing", keeps: bool = True, tokens: int = 64, **options: Any
) -> Any:
    targets, option = options.pop("targets", TARGETS), MemoryOption(keeps, recompute, 64)
    options["expert_rank"] = EXPERT_RANK
    return predict(BaseShape.of(model.config), option, tokens, tokens, RANK, targets, **options)


def tensors_of(model: Any) -> Iterator[torch.Tensor]:
    """Yield weights and scales, without the tables of quantization levels: a kilobyte for each linear layer."""
    for parameter in model.parameters():
        yield parameter.data
        if state := getattr(parameter, "quant_state", None):
            yield from (state.absmax, state.state2.absmax) if state.nested else (state.absmax,)


@pytest.mark.parametrize(
    "section", [{}, {"double_quant": False}, {"quantization": "none"}], ids=["double", "single", "none"]
)
def test_the_loaded_base(section: dict[str, Any]) -> None:
    model = load_base(BaseSection(model="embedded", **section))
    loaded = BaseSize.of(model).num_bytes
    assert loaded == pytest.approx(sum(tensor.nbytes for tensor in tensors_of(model)), rel=0.001)  # and buffers
    predicted = predicted_for(
        model, quantized=section.get("quantization") != "none", double_quant=section.get("double_quant", True)
    )
    assert predicted.base == pytest.approx(loaded, rel=0.005)
    shapes = expected_modules(model, LoraSection())
    linears = shapes.values()
    assert BaseShape.of(model.config).num_linear_weights == sum(i * o for i, o in linears)
    joined = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # the only 16-bit weights that are copied
    copied = sum(i * o for name, (i, o) in shapes.items() if "quantization" not in section or name.endswith(joined))
    assert predicted.dequantized == 2 * copied


@pytest.mark.parametrize(("quantization", "num_copies"), [("nf4", 4 * 4), ("none", 4 * 2)])
def test_the_dequantized_base(quantization: str, num_copies: int) -> None:
    model = load_base(BaseSection(model="embedded", quantization=quantization))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    decoder = Decoder(model, torch.bfloat16, 8, keeps_base=True)
    parts = [part for layer in decoder._layers for part in (layer.qkv, layer.out, *vars(layer.mlp).values())]
    copies = [
        weight.nbytes
        for weight in (part._weight() for part in parts if isinstance(part, FusedLinear))
        if weight.data_ptr() not in own
    ]
    assert len(copies) == num_copies
    assert predicted_for(model, quantized=quantization == "nf4").dequantized == sum(copies)
    assert predicted_for(model, keeps=False, quantized=quantization == "nf4").dequantized == 0
    assert Decoder(model, torch.bfloat16, 8, keeps_base=False)._layers[0].qkv._kept is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj")], ids=len)
def test_adapters(half: Any, targets: tuple[str, ...], dtype: torch.dtype) -> None:
    adapters = make_adapters(half, targets, 3, dtype)
    predicted = predicted_for(half, targets=targets, num_slots=3, adapter_bytes=dtype.itemsize)
    one = adapters.weights[0].nbytes
    assert predicted.adapters == adapters.weights.nbytes + one  # the trainer's own copy
    assert predicted.gradients == adapters.gradients.nbytes
    assert predicted.optimizer == adapters.moment1.nbytes + adapters.moment2.nbytes


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj")], ids=len)
def test_moments_in_eight_bits(half: Any, targets: tuple[str, ...]) -> None:
    adapters = make_adapters(half, targets, 3, torch.float32, eight_bit=True)
    assert adapters.eight_bit is not None
    kept = adapters.moment1.nbytes + adapters.moment2.nbytes + adapters.eight_bit.absmax.nbytes
    assert predicted_for(half, targets=targets, num_slots=3, eight_bit=True).optimizer == kept


def make_adapters(
    model: Any, targets: tuple[str, ...], num_slots: int, dtype: torch.dtype, eight_bit: bool = False
) -> Adapters:
    names = adapted_names(model, LoraSection(dropout=0, target_modules=list(targets)))
    cpu = torch.device("cpu")
    layers = adapted_layers(model, names)
    return Adapters(layers, num_slots, RANK, dtype, torch.bfloat16, cpu, eight_bit, EXPERT_RANK)


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj")], ids=len)
@pytest.mark.parametrize("recompute", LEVELS)
def test_activations(
    half: Any, kept_by: Callable[..., tuple[int, int]], recompute: Recompute, targets: tuple[str, ...]
) -> None:
    predicted, kept = kept_by(half, recompute, targets)
    assert predicted == kept


@pytest.mark.parametrize("recompute", LEVELS)
@pytest.mark.parametrize("name", [name for name in FAMILY_CASES if name != MIXED])
def test_activations_and_weights_of_each_family(
    kept_by: Callable[..., tuple[int, int]], name: str, recompute: Recompute
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(deepcopy(FAMILY_CASES[name][0]), dtype=torch.bfloat16)
    predicted, kept = kept_by(model, recompute, tuple(BaseShape.of(model.config).linears))
    assert predicted == kept
    # Biases, sinks and norms of heads, some ten thousandths of a large base, are not counted.
    small = ("bias", "sinks", "q_norm.weight", "k_norm.weight")
    weights = sum(each.nbytes for name, each in model.named_parameters() if not name.endswith(small))
    assert predicted_for(model, quantized=False).base == weights


WITH_EXPERTS = [name for name, (config, _) in FAMILY_CASES.items() if FAMILIES[config.model_type].experts is not None]


@pytest.mark.parametrize("recompute", LEVELS)
@pytest.mark.parametrize("targets", [("q_proj", "experts.gate_up_proj", "experts.down_proj"), ("experts.down_proj",)])
@pytest.mark.parametrize("name", [name for name in WITH_EXPERTS if name != MIXED])
def test_adapted_experts(
    kept_by: Callable[..., tuple[int, int]], name: str, targets: tuple[str, ...], recompute: Recompute
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(deepcopy(FAMILY_CASES[name][0]), dtype=torch.bfloat16)
    predicted, kept = kept_by(model, recompute, targets)
    assert predicted == kept
    for eight_bit in (False, True):
        adapters = make_adapters(model, targets, 3, torch.float32, eight_bit)
        memory = predicted_for(model, targets=targets, num_slots=3, eight_bit=eight_bit)
        # Each part of a slot's row is rounded up to a block of 1,024 elements, which counts in a base this small.
        one = 4 * sum(matrix.numel() for _, matrix in adapters.matrices(0, RANK, adapters.weights))
        assert one <= adapters.weights[0].nbytes <= one + 4 * 1024 * len(adapters.groups)
        assert memory.adapters == 4 * one
        assert memory.gradients == 3 * one
        moments = adapters.moment1.nbytes + adapters.moment2.nbytes
        absmax = 0 if adapters.eight_bit is None else adapters.eight_bit.absmax.nbytes
        assert memory.optimizer == (moments + absmax if eight_bit else 2 * 3 * one)


@pytest.fixture
def kept_by(
    make_rows: Callable[..., TokenizedRows],
    make_table: Callable[..., dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[int, int]]:
    """`kept_by(model, "nothing", targets)`: bytes that a forward keeps for its backward, predicted and real."""

    def count(model: Any, recompute: Recompute, targets: tuple[str, ...]) -> tuple[int, int]:
        inputs, kept = [], []
        forward = Layer.forward

        def watched(layer: Layer, states: Any, delta: Any, *rest: Any) -> Any:
            result = forward(layer, states, delta, *rest)
            inputs.append(states.nbytes + (0 if delta is None else delta.nbytes))
            kept.append(result[2])
            return result

        monkeypatch.setattr(Layer, "forward", watched)
        rows = make_rows(32, 32)  # of equal length: on a CPU, attention pads
        every = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
        present = [name for name in targets if any(each.endswith(f".{name}") for each in every)]
        adapters = make_adapters(model, tuple(present), 1, torch.float32)
        engine = Engine(Decoder(model, torch.bfloat16, 32, keeps_base=True), adapters, recompute, None, on_gpu=False)
        engine.step([Span(0, rows, [0, 1], make_table(0.1))]).read()

        layers = model.config.num_hidden_layers
        whole = [bytes_of(each, model.config) for each in kept if each is not None]
        assert len(whole) == layers
        predicted = predicted_for(model, recompute, targets=present).activations
        if recompute != "layers":
            return predicted, sum(whole)
        # The inputs of all layers, and one recomputed layer. The first layer reads no residual sum.
        assert kept[:layers] == [None] * layers
        return predicted, sum(inputs[:layers]) + inputs[0] + whole[0]

    return count


def leaves(value: Any) -> Iterator[Any]:
    """Yield the tensors of nested activations, without the ends of each expert's rows, some thousand bytes."""
    if is_dataclass(value):
        for name, each in vars(value).items():
            if name not in ("ends", "slot_ends"):
                yield from leaves(each)
    elif value is not None:
        yield value


def bytes_of(kept: SavedActivations, config: Any) -> int:
    """Return the bytes on a GPU: attention keeps its output once, and a float32 for each token and head."""
    own = [value for name, value in vars(kept).items() if name not in ("saved_attention", "lora_hidden")]
    parts = [part for each in (*own, *kept.lora_hidden, *kept.saved_attention[:3]) for part in leaves(each)]
    logs = len(kept.residual1) * config.num_attention_heads * 4
    # Without a norm, its result is its input.
    distinct = {part.data_ptr(): part.nbytes for part in parts}
    return logs + sum(distinct.values())


def test_options_are_ordered_by_time() -> None:
    found = list(memory_options(LLAMA_7B, 500, 6000, keeps_base=None, recompute=None, max_pass_tokens=8192))
    assert found[0] == MemoryOption(True, "nothing", 6000)
    times = [option.relative_time(LLAMA_7B) for option in found]
    assert times == sorted(times)
    assert {option.max_tokens for option in found} == {6000, 4096, 2048, 1024, 512, 500}
    assert set(Counter((option.keeps_base, option.recompute) for option in found).values()) == {6}
    assert len({(option.keeps_base, option.recompute) for option in found}) == 6
    assert found[-1] == MemoryOption(False, "layers", 500)


@pytest.mark.parametrize("keeps", [None, True, False])
@pytest.mark.parametrize("recompute", [None, True, False])
def test_options_respect_explicit_settings(keeps: bool | None, recompute: bool | None) -> None:
    found = list(memory_options(LLAMA_7B, 100, 300, keeps_base=keeps, recompute=recompute, max_pass_tokens=8192))
    assert {option.keeps_base for option in found} == ({True, False} if keeps is None else {keeps})
    levels = {None: set(LEVELS), True: {"layers"}, False: {"nothing"}}[recompute]
    assert {option.recompute for option in found} == levels


@pytest.mark.parametrize(
    ("longest", "largest", "tokens"), [(700, 300, {700}), (700, 9000, {8192, 4096, 2048, 1024, 700})]
)
def test_no_pass_is_shorter_than_a_row_nor_longer_than_a_batch(longest: int, largest: int, tokens: set[int]) -> None:
    found = memory_options(LLAMA_7B, longest, largest, keeps_base=None, recompute=None, max_pass_tokens=8192)
    assert {option.max_tokens for option in found} == tokens


def test_options_that_save_memory_need_less() -> None:
    def total(keeps: bool, recompute: Recompute, tokens: int, **options: Any) -> int:
        return predict(LLAMA_7B, MemoryOption(keeps, recompute, tokens), tokens, 4096, RANK, TARGETS, **options).total

    totals = [total(True, level, 4096) for level in LEVELS]
    assert totals == sorted(totals, reverse=True)
    assert total(False, "nothing", 4096) < totals[0] - 12e9  # 13.0 GB of weights, less the transient copies
    assert total(True, "nothing", 2048) < totals[0]
    assert total(True, "nothing", 4096, num_slots=2) > totals[0]
    assert total(True, "nothing", 4096, adapter_bytes=2) < totals[0]
    predicted = predict(LLAMA_7B, MemoryOption(True, "nothing", 4096), 4096, 4096, RANK, TARGETS)
    assert predicted.total == sum(predicted.parts().values())
    assert 3.5e9 < predicted.base < 4e9
