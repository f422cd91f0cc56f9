"""The arithmetic of memory against what is really held, byte for byte, on the embedded base."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from orchestrator.base import load_base
from orchestrator.spec.sections import BaseSection, LoraSection
from orchestrator.training.fast.plan.memory import BaseShape, MemoryOption, Recompute, memory_options, predict
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.fast.step.decoder import Decoder, Layer, SavedActivations, adapted_layers
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.fast.step.flat_batch import Span, TokenizedRows
from orchestrator.training.model.targets import expected_modules

pytestmark = pytest.mark.usefixtures("on_cpu")

RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEVELS: list[Recompute] = ["nothing", "elementwise", "layers"]
LLAMA_7B = BaseShape(4096, 11008, 32, 32, 32, 128, 32000, tied=False)


@pytest.fixture(scope="module")
def half() -> Any:
    """The embedded base as a GPU would hold it: bfloat16 beside NF4."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "device_count", lambda: 0)
        return load_base(BaseSection(model="embedded"))


def foreseen(model: Any, recompute: Recompute = "nothing", keeps: bool = True, tokens: int = 64, **options: Any) -> Any:
    targets = options.pop("targets", TARGETS)
    return predict(
        BaseShape.of(model.config), MemoryOption(keeps, recompute, 64), tokens, tokens, RANK, targets, **options
    )


def tensors_of(model: Any) -> Iterator[torch.Tensor]:
    """Weights and scales; not the tables of levels, a kilobyte a layer whatever its size."""
    for parameter in model.parameters():
        yield parameter.data
        if state := getattr(parameter, "quant_state", None):
            yield from (state.absmax, state.state2.absmax) if state.nested else (state.absmax,)


@pytest.mark.parametrize(
    "section", [{}, {"double_quant": False}, {"quantization": "none"}], ids=["double", "single", "none"]
)
def test_the_base(section: dict[str, Any]) -> None:
    model = load_base(BaseSection(model="embedded", **section))
    held = sum(tensor.nbytes for tensor in tensors_of(model))
    told = foreseen(
        model, quantised=section.get("quantization") != "none", double_quant=section.get("double_quant", True)
    )
    assert told.base == pytest.approx(held, rel=0.005)
    shapes = expected_modules(model, LoraSection())
    linears = shapes.values()
    assert BaseShape.of(model.config).num_linear_weights == sum(i * o for i, o in linears)
    joined = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # only there are 16-bit weights copied
    copied = sum(i * o for name, (i, o) in shapes.items() if "quantization" not in section or name.endswith(joined))
    assert told.kept == 2 * copied


@pytest.mark.parametrize(("quantization", "num_copies"), [("nf4", 4 * 4), ("none", 4 * 2)])
def test_the_kept_base(quantization: str, num_copies: int) -> None:
    model = load_base(BaseSection(model="embedded", quantization=quantization))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    decoder = Decoder(model, torch.bfloat16, 8, keeps_base=True)
    parts = [part for layer in decoder._layers for part in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    copies = [weight.nbytes for weight in (part._weight() for part in parts) if weight.data_ptr() not in own]
    assert len(copies) == num_copies
    assert foreseen(model, quantised=quantization == "nf4").kept == sum(copies)
    assert foreseen(model, keeps=False, quantised=quantization == "nf4").kept == 0
    assert Decoder(model, torch.bfloat16, 8, keeps_base=False)._layers[0].qkv._kept is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj")], ids=len)
def test_adapters(half: Any, targets: tuple[str, ...], dtype: torch.dtype) -> None:
    adapters = make_adapters(half, targets, 3, dtype)
    told = foreseen(half, targets=targets, num_slots=3, adapter_bytes=dtype.itemsize)
    one = adapters.weights[0].nbytes
    assert told.adapters == adapters.weights.nbytes + one  # the trainer's own
    assert told.gradients == adapters.gradients.nbytes
    assert told.optimizer == adapters.moment1.nbytes + adapters.moment2.nbytes


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj")], ids=len)
def test_moments_in_eight_bits(half: Any, targets: tuple[str, ...]) -> None:
    adapters = make_adapters(half, targets, 3, torch.float32, eight_bit=True)
    assert adapters.eight_bit is not None
    kept = adapters.moment1.nbytes + adapters.moment2.nbytes + adapters.eight_bit.absmax.nbytes
    assert foreseen(half, targets=targets, num_slots=3, eight_bit=True).optimizer == kept


def make_adapters(
    model: Any, targets: tuple[str, ...], num_slots: int, dtype: torch.dtype, eight_bit: bool = False
) -> Adapters:
    modules = expected_modules(model, LoraSection(target_modules=list(targets)))
    cpu = torch.device("cpu")
    return Adapters(adapted_layers(model, modules), num_slots, RANK, dtype, torch.bfloat16, cpu, eight_bit)


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj")], ids=len)
@pytest.mark.parametrize("recompute", LEVELS)
def test_activations(
    half: Any,
    make_rows: Callable[..., TokenizedRows],
    make_table: Callable[..., dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    recompute: Recompute,
    targets: tuple[str, ...],
) -> None:
    """What the forward of one step leaves for its backward."""
    inputs, kept = [], []
    forward = Layer.forward

    def watched(layer: Layer, states: Any, delta: Any, *rest: Any) -> Any:
        result = forward(layer, states, delta, *rest)
        inputs.append(states.nbytes + (0 if delta is None else delta.nbytes))
        kept.append(result[2])
        return result

    monkeypatch.setattr(Layer, "forward", watched)
    rows = make_rows(32, 32, vocabulary=500)  # of one length: on a CPU, attention pads
    adapters = make_adapters(half, targets, 1, torch.float32)
    engine = Engine(Decoder(half, torch.bfloat16, 32, keeps_base=True), adapters, recompute, None, on_gpu=False)
    engine.step([Span(0, rows, [0, 1], make_table(0.1))]).read()

    layers, whole = half.config.num_hidden_layers, [bytes_of(each, half.config) for each in kept if each is not None]
    assert len(whole) == layers
    told = foreseen(half, recompute, targets=targets).activations
    if recompute == "layers":
        # All layers' inputs, and one layer computed again. The first layer reads no sum of two.
        assert kept[:layers] == [None] * layers
        assert told == sum(inputs[:layers]) + inputs[0] + whole[0]
    else:
        assert told == sum(whole)


def bytes_of(kept: SavedActivations, config: Any) -> int:
    """As on a GPU: attention's output lies there once, with one float32 a token and head for its backward."""
    parts = [
        *(value for name, value in vars(kept).items() if name not in ("saved_attention", "lora_hidden")),
        *kept.lora_hidden,
        *kept.saved_attention[:3],
    ]
    logs = len(kept.residual1) * config.num_attention_heads * 4
    return logs + sum(part.nbytes for part in parts if part is not None)


def test_choices_are_ordered_by_their_cost_in_time() -> None:
    found = list(memory_options(500, 6000, keeps_base=None, recompute=None, most_tokens=8192))
    assert found[0] == MemoryOption(True, "nothing", 6000)
    times = [choice.relative_time() for choice in found]
    assert times == sorted(times)
    assert {choice.max_tokens for choice in found} == {6000, 4096, 2048, 1024, 512, 500}
    assert set(Counter((choice.keeps_base, choice.recompute) for choice in found).values()) == {6}
    assert len({(choice.keeps_base, choice.recompute) for choice in found}) == 6
    assert found[-1] == MemoryOption(False, "layers", 500)


@pytest.mark.parametrize("keeps", [None, True, False])
@pytest.mark.parametrize("recompute", [None, True, False])
def test_choices_respect_what_is_forced(keeps: bool | None, recompute: bool | None) -> None:
    found = list(memory_options(100, 300, keeps_base=keeps, recompute=recompute, most_tokens=8192))
    assert {choice.keeps_base for choice in found} == ({True, False} if keeps is None else {keeps})
    levels = {None: set(LEVELS), True: {"layers"}, False: {"nothing"}}[recompute]
    assert {choice.recompute for choice in found} == levels


@pytest.mark.parametrize(
    ("longest", "largest", "tokens"), [(700, 300, {700}), (700, 9000, {8192, 4096, 2048, 1024, 700})]
)
def test_no_pass_is_shorter_than_a_row_nor_longer_than_a_batch(longest: int, largest: int, tokens: set[int]) -> None:
    found = memory_options(longest, largest, keeps_base=None, recompute=None, most_tokens=8192)
    assert {choice.max_tokens for choice in found} == tokens


def test_what_is_given_up_takes_less() -> None:
    def total(keeps: bool, recompute: Recompute, tokens: int, **options: Any) -> int:
        return predict(LLAMA_7B, MemoryOption(keeps, recompute, tokens), tokens, 4096, RANK, TARGETS, **options).total

    kept = [total(True, level, 4096) for level in LEVELS]
    assert kept == sorted(kept, reverse=True)
    assert total(False, "nothing", 4096) < kept[0] - 12e9  # of 13.0 GB, less what passes
    assert total(True, "nothing", 2048) < kept[0]
    assert total(True, "nothing", 4096, num_slots=2) > kept[0]
    assert total(True, "nothing", 4096, adapter_bytes=2) < kept[0]
    told = predict(LLAMA_7B, MemoryOption(True, "nothing", 4096), 4096, 4096, RANK, TARGETS)
    assert told.total == sum(told.parts().values())
    assert 3.5e9 < told.base < 4e9
