"""The decoder against the Hugging Face model with the same weights, with PEFT's adapters and autograd."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import FAMILY_CASES, MULTIMODAL_CASES
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.nn.utils.rnn import pad_sequence

from orchestrator.base import load_base, model_class
from orchestrator.spec.sections import BaseSection, LoraSection
from orchestrator.training.fast.families import FAMILIES
from orchestrator.training.fast.ops import reference
from orchestrator.training.fast.sizes import Recompute
from orchestrator.training.fast.step.adapters import Adapters, lora_parameters
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import Engine, EvaluationBatch
from orchestrator.training.fast.step.flat_batch import Span, TokenizedRows
from orchestrator.training.model.targets import expected_modules

pytestmark = pytest.mark.usefixtures("on_cpu")

MakeRows = Callable[..., TokenizedRows]
MakeTable = Callable[..., dict[str, float]]

EMBEDDED = "embedded, nf4"
CASES = FAMILY_CASES | MULTIMODAL_CASES
LENGTHS = (5, 19, 2, 11)
DROPOUT, RANK, ALPHA = 0.1, 4, 12


def test_each_family_is_compared_with_transformers() -> None:
    """What a family lists counts as computed: without a model here, the decoder could leave a module out.

    Settings have other values than those that change nothing: windows are shorter than rows, norms and biases random.
    """
    assert {"llama", *(config.model_type for config, _ in FAMILY_CASES.values())} == set(FAMILIES)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def open_model(name: str, folder: Path) -> Any:
    if name == EMBEDDED:
        return load_base(BaseSection(model="embedded", compute_dtype="float32"))
    config, quantization = CASES[name]
    model = model_class(config).from_config(config, attn_implementation="eager")
    for parameter in model.parameters():  # because a new model has biases of 0 and norms of 1
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return load_base(BaseSection(model=str(folder), quantization=quantization, compute_dtype="float32"))


class Masked(torch.nn.Module):
    """Dropout with a given mask."""

    def __init__(self, kept: torch.Tensor) -> None:
        super().__init__()
        self._kept = kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self._kept / (1 - DROPOUT) if self.training else x


def padded(rows: TokenizedRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (rows, longest) ids, targets and mask, as a collator makes them."""
    ids, targets = (
        [torch.from_numpy(part(index)).long() for index in range(len(rows))] for part in (rows.ids, rows.targets)
    )
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return pad_sequence(ids, batch_first=True), pad_sequence(targets, batch_first=True, padding_value=-100), mask


def loss_of(model: Any, rows: TokenizedRows) -> torch.Tensor:
    ids, targets, mask = padded(rows)
    return cross_entropy(model(input_ids=ids, attention_mask=mask).logits.flatten(0, 1), targets.flatten())


def some_targets(name: str) -> list[str]:
    """Return some of a base's linear layers. A part of a group, unless it is fused."""
    if "phi3" in name:
        return ["qkv_proj"]
    if name.startswith(("mixtral", "olmoe", "gpt_oss", "qwen3_moe")):
        return ["q_proj", "o_proj"]
    return ["q_proj", "input_linear" if "granite 4" in name else "up_proj"]


@pytest.mark.parametrize(
    ("name", "targets"),
    [(name, "all-linear") for name in (EMBEDDED, *CASES)] + [(name, some_targets(name)) for name in (EMBEDDED, *CASES)],
    ids=str,
)
def test_losses_and_gradients_are_those_of_peft(
    name: str, targets: Any, tmp_path: Path, make_rows: MakeRows, make_table: MakeTable, make_row: Callable[..., Any]
) -> None:
    from peft import LoraConfig, get_peft_model

    model = open_model(name, tmp_path)
    modules = expected_modules(model, LoraSection(target_modules=targets))
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=list(modules), init_lora_weights=False
    )
    decoder = Decoder(model, torch.float32, max(LENGTHS), keeps_base=True)
    groups = adapted_layers(model, modules)
    adapters = Adapters(groups, 1, RANK, torch.float32, torch.float32, torch.device("cpu"))
    engine = Engine(decoder, adapters, "nothing", None, on_gpu=False)
    peft = get_peft_model(model, lora)
    parameters = lora_parameters(peft)
    matrices = dict(adapters.matrices(0, RANK, adapters.weights))
    assert matrices.keys() == parameters.keys()
    for key, matrix in matrices.items():
        matrix.copy_(parameters[key].detach())

    rows = make_rows(*LENGTHS)
    num_targets = rows.num_targets(range(len(rows)))
    table = make_table(DROPOUT, scale=ALPHA / RANK, applies=0, loss_weight=1 / num_targets)
    span = Span(0, rows, range(len(rows)), table)
    batch = make_row(span)
    for layers in groups:
        for layer in layers:
            kept = reference.dropout_mask(batch, layer.module_id, layer.in_features)[: span.num_tokens]
            drop = peft.get_submodule(f"base_model.model.{layer.name}").lora_dropout
            drop["default"] = Masked(pad_sequence(list(kept.split(LENGTHS)), batch_first=True))

    peft.train()
    exact = loss_of(peft, rows)
    exact.backward()
    exact = exact.detach()
    metrics = engine.step([span]).read()
    assert metrics.losses[0] == pytest.approx(float(exact), abs=1e-5)
    gradients = dict(adapters.matrices(0, RANK, adapters.gradients))
    for key, gradient in gradients.items():
        expected = parameters[key].grad
        cosine = float(cosine_similarity(gradient.flatten(), expected.flatten(), dim=0))
        assert cosine >= 0.9999, f"{key}: cosine {cosine:.6f}"
    whole, expected = (
        torch.cat([each.flatten() for each in parts])
        for parts in (gradients.values(), [parameters[key].grad for key in gradients])
    )
    assert (whole - expected).norm() <= 2e-5 * expected.norm()
    assert metrics.norms[0] == pytest.approx(float(expected.norm()), rel=2e-5)

    peft.eval()
    with torch.no_grad():
        exact = loss_of(peft, rows)
    (scores,) = engine.evaluate([EvaluationBatch(engine, 0, rows, table)])
    loss, accuracy = scores.loss, scores.token_accuracy
    assert loss == pytest.approx(float(exact), abs=1e-5)
    assert loss != pytest.approx(metrics.losses[0], abs=1e-4), "an evaluation has no dropout"
    ids, wanted, mask = padded(rows)
    hits = (peft(input_ids=ids, attention_mask=mask).logits.argmax(-1) == wanted).sum()
    assert accuracy == pytest.approx(int(hits) / num_targets)


def test_the_mask_of_a_module_does_not_depend_on_other_adapted_modules(base: Any) -> None:
    everything = {layer.name: layer for layers in adapted_layers(base, names(base)) for layer in layers}
    some = [layer for layers in adapted_layers(base, names(base, "v_proj", "down_proj")) for layer in layers]
    assert len(everything) == 4 * 7
    assert len({layer.module_id for layer in everything.values()}) == len(everything)
    assert [layer.name.rpartition(".")[2] for layer in some] == ["v_proj", "down_proj"] * 4
    assert all(layer == everything[layer.name] for layer in some)


def names(model: Any, *leaves: str) -> list[str]:
    """Return the linear layers of the decoder, or those whose names end in `leaves`."""
    return [name for name in expected_modules(model, LoraSection()) if not leaves or name.endswith(leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_options_change_no_bit(
    base: Any, make_rows: MakeRows, make_table: MakeTable, dtype: torch.dtype
) -> None:
    rows, results = make_rows(*LENGTHS, vocabulary=500), []
    table = make_table(DROPOUT, learning_rate=1e-3, max_norm=0.1)
    options: list[tuple[bool, Recompute]] = [
        (keeps, recompute) for keeps in (True, False) for recompute in ("nothing", "elementwise", "layers")
    ]
    model = base if dtype == torch.float32 else load_base(BaseSection(model="embedded"))
    for keeps, recompute in options:
        torch.manual_seed(1)
        adapters = Adapters(adapted_layers(model, names(model)), 1, 8, torch.float32, dtype, torch.device("cpu"))
        adapters.weights.normal_(std=0.02)
        engine = Engine(Decoder(model, dtype, 19, keeps), adapters, recompute, None, on_gpu=False)
        metrics = [engine.step([Span(0, rows, range(4), table)]).read() for _ in range(3)]
        results.append((metrics, engine.evaluate([EvaluationBatch(engine, 0, rows, table)]), adapters.weights))
    metrics, evaluated, weights = results[0]
    assert metrics[0].losses != metrics[2].losses, "the weights must change from step to step"
    for other_metrics, other_evaluated, other_weights in results[1:]:
        assert other_metrics == metrics
        assert other_evaluated == evaluated
        assert torch.equal(other_weights, weights)
