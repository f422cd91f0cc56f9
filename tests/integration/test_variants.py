"""Train each LoRA variant, base form, optimizer and loss, and reproduce its held-out loss with plain PEFT."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from plain import INT8, NF4, another_base, loss_of, reloaded_loss
from safetensors.torch import load_file
from tiny import Witness
from transformers import AutoConfig

from orchestrator.adapters.bundle import Format
from orchestrator.data import load
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.export.export import export
from orchestrator.errors import TrialError
from orchestrator.record import SweepPaths, TrialResult, TrialState, read_metrics, read_sweep
from orchestrator.spec import SweepSpec
from orchestrator.spec.sections.training import Optimizer
from orchestrator.training.local import resume_local_trial, run_local_trial

pytestmark = pytest.mark.slow

Tiny = Callable[..., SweepSpec]

SHORT = [
    "data.max_rows=120", "data.held_out={count: 24}", "training.steps=8", "training.eval_steps=4",
    "training.logging_steps=4", "training.learning_rate=5e-3", "lora.rank=8", "lora.dropout=0.1",
]  # fmt: skip


def trained(spec: SweepSpec, folder: SweepPaths) -> tuple[TrialResult, list[float]]:
    """Train, and return the result and the held-out losses in their order."""
    result = run_local_trial(spec, folder, Witness())
    assert result is not None
    assert result.state == TrialState.COMPLETE
    points = read_metrics(folder.trial(result.trial_id))
    return result, [point.values["eval/loss"] for point in points if "eval/loss" in point.values]


FAST = None
"""The fast engine trains it: there is no reason against that."""

ADAPTERS = {
    "rsLoRA": (["lora.rslora=true", "lora.alpha=8"], NF4, FAST),
    "gaussian": (["lora.init=gaussian"], NF4, FAST),
    "layers": (["lora.layers_to_transform=[1, 3]"], NF4, FAST),
    "DoRA": (["lora.dora=true"], NF4, "lora.dora"),
    "DoRA rsLoRA unquantized": (["lora.dora=true", "lora.rslora=true", "base.quantization=none"], None, "lora.dora"),
    "patterns": (
        ["lora.rank_pattern={down_proj: 4, 'layers.0.self_attn.q_proj': 2}", "lora.alpha_pattern={'.*mlp.*': 3}"],
        NF4,
        FAST,
    ),
    "EVA": (["lora.init=eva", "lora.rank=4"], NF4, "lora.init eva"),
    "OLoRA 4-bit": (["lora.init=olora", "lora.dropout=0", "training.learning_rate=1e-3"], NF4, "lora.init olora"),
    "OLoRA patterns": (
        ["lora.init=olora", "lora.rslora=true", "lora.rank_pattern={down_proj: 4}", "lora.alpha_pattern={up_proj: 3}"],
        NF4,
        "lora.init olora",
    ),
    "PiSSA unquantized": (["lora.init=pissa", "base.quantization=none"], None, "lora.init pissa"),
    "norms": (["lora.modules_to_save=[norm, input_layernorm]"], NF4, "lora.modules_to_save"),
    "new tokens": (["base.new_tokens=['<|reply|>', '~']"], NF4, "base.new_tokens"),
    "8-bit": (["base.quantization=int8"], INT8, "base.quantization int8"),
    "8-bit OLoRA": (["base.quantization=int8", "lora.init=olora"], INT8, "base.quantization int8"),
    "unquantized": (["base.quantization=none"], None, FAST),
    "fp4": (["base.quantization=fp4"], NF4 | {"bnb_4bit_quant_type": "fp4"}, FAST),
    "scales not quantized": (["base.double_quant=false"], NF4 | {"bnb_4bit_use_double_quant": False}, FAST),
    "some layers": (["lora.target_modules=[q_proj, v_proj]"], NF4, FAST),
}


@pytest.mark.parametrize(("overrides", "form", "reason"), ADAPTERS.values(), ids=ADAPTERS)
def test_adapter_trains_and_plain_peft_reproduces_its_loss(
    tiny: Tiny, folder: SweepPaths, overrides: list[str], form: dict[str, Any] | None, reason: str | None
) -> None:
    result, losses = trained(tiny(*SHORT, *overrides), folder)
    assert losses[-1] < losses[0]
    assert (result.engine, result.engine_reason) == ("trl" if reason else "fast", reason)
    assert result.best is not None
    record = read_sweep(folder.root)
    found = reloaded_loss(record.adapter(result), load(folder.data).held_out, form)
    # Activations have 8 bits: a small change before their rounding may move them by a whole step.
    assert found == pytest.approx(result.best.value, rel=1e-3 if form is INT8 else 1e-4)


@pytest.mark.parametrize("base", ["nf4", "none"])
def test_code_in_the_model_card_reproduces_the_loss(tiny: Tiny, folder: SweepPaths, base: str) -> None:
    """The code must keep bitsandbytes from repacking 4-bit weights; DoRA's norms would come from packed bytes."""
    result, _ = trained(tiny(*SHORT, "lora.dora=true", f"base.quantization={base}"), folder)
    assert result.best is not None
    adapter = read_sweep(folder.root).adapter(result)
    lines = (adapter / "README.md").read_text().partition("```python")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(lines.replace("ID_OR_FOLDER", str(adapter)), names)
    assert loss_of(names["model"], load(folder.data).held_out) == pytest.approx(result.best.value, rel=1e-4)
    assert names["model"].generation_config.eos_token_id == 2


SIXTEEN_BITS = {
    "bf16": (["base.compute_dtype=bfloat16"], FAST),
    "bf16 under autocast": (["base.compute_dtype=bfloat16", "training.precision=bf16"], FAST),
    "bf16 PiSSA": (["base.compute_dtype=bfloat16", "lora.init=pissa"], "lora.init pissa"),
    "fp16 PiSSA": (["base.compute_dtype=float16", "lora.init=pissa"], "lora.init pissa"),
    "bf16 DoRA": (["base.compute_dtype=bfloat16", "lora.dora=true"], "lora.dora"),
    "bf16 norms": (
        ["base.compute_dtype=bfloat16", "training.precision=bf16", "lora.modules_to_save=[norm]"],
        "lora.modules_to_save",
    ),
}


@pytest.mark.parametrize(("overrides", "reason"), SIXTEEN_BITS.values(), ids=SIXTEEN_BITS)
def test_loss_on_a_16_bit_base_is_reproduced_within_its_rounding(
    tiny: Tiny, folder: SweepPaths, overrides: list[str], reason: str | None
) -> None:
    spec = tiny(*SHORT, "base.quantization=none", *overrides)
    result, losses = trained(spec, folder)
    assert losses[-1] < losses[0]
    assert (result.engine, result.engine_reason) == ("trl" if reason else "fast", reason)
    assert result.best is not None
    adapter = read_sweep(folder.root).adapter(result)
    weights = load_file(adapter / "adapter_model.safetensors")
    assert {weight.dtype for name, weight in weights.items() if ".lora_" in name} == {torch.float32}
    found = reloaded_loss(adapter, load(folder.data).held_out, None, getattr(torch, spec.base.compute_dtype))
    assert found == pytest.approx(result.best.value, rel=2e-3)


OTHER_BASES: dict[str, tuple[dict[str, bool], list[str], list[str]]] = {
    "biases": (
        {"attention_bias": True, "mlp_bias": True},
        ["lora.bias=all"],
        ["q_proj.base_layer.bias", "down_proj.base_layer.bias"],
    ),
    "biases of adapted layers": (
        {"attention_bias": True, "mlp_bias": True},
        ["lora.bias=lora_only", "lora.target_modules=[q_proj]"],
        ["q_proj.base_layer.bias"],
    ),
    "head": ({"tie_word_embeddings": False}, ["lora.modules_to_save=[lm_head]"], ["lm_head.weight"]),
    "embedding": ({"tie_word_embeddings": False}, ["lora.modules_to_save=[embed_tokens]"], ["embed_tokens.weight"]),
    "head and embedding": (
        {"tie_word_embeddings": False},
        ["lora.modules_to_save=[lm_head, embed_tokens]", "base.new_tokens=['<|reply|>']"],
        ["lm_head.weight", "embed_tokens.weight"],
    ),
    "new tokens": (
        {"tie_word_embeddings": False},
        ["base.new_tokens=['<|reply|>', '~']"],
        ["lm_head.token_adapter.trainable_tokens_delta", "embed_tokens.token_adapter.trainable_tokens_delta"],
    ),
}
"""Changes of the base (it has no biases, and a tied head), overrides, and the weights that must be saved."""


@pytest.mark.parametrize(("form", "overrides", "saved"), OTHER_BASES.values(), ids=OTHER_BASES)
def test_other_trained_weights_are_saved_with_the_adapter(
    tiny: Tiny, tmp_path: Path, form: dict[str, bool], overrides: list[str], saved: list[str]
) -> None:
    base, folder = another_base(tmp_path / "base", **form), SweepPaths(tmp_path / "sweep")
    result, losses = trained(tiny(*SHORT, *overrides, f"base.model={base}"), folder)
    assert losses[-1] < losses[0]
    assert result.best is not None
    adapter = read_sweep(folder.root).adapter(result)
    assert reloaded_loss(adapter, load(folder.data).held_out, NF4) == pytest.approx(result.best.value, rel=1e-4)
    weights = load_file(adapter / "adapter_model.safetensors")
    for name in saved:
        assert any(key.endswith(name) for key in weights), f"{name} is not among {sorted(weights)}"


OPTIMIZERS = {
    "adamw_torch": 5e-3, "adamw_torch_fused": 5e-3, "adamw_8bit": 5e-3, "paged_adamw_32bit": 5e-3,
    "paged_adamw_8bit": 5e-3, "ademamix": 1e-3,
    "ademamix_8bit": 1e-3, "paged_ademamix_32bit": 1e-3, "paged_ademamix_8bit": 1e-3, "lion_32bit": 1e-3,
    "lion_8bit": 1e-3, "paged_lion_32bit": 1e-3, "paged_lion_8bit": 1e-3, "rmsprop": 1e-3, "rmsprop_bnb_32bit": 1e-3,
    "rmsprop_bnb_8bit": 1e-3, "adagrad": 2e-2, "adafactor": 5e-3, "sgd": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(("optimizer", "rate"), OPTIMIZERS.items())
def test_optimizer_trains_as_configured(tiny: Tiny, folder: SweepPaths, optimizer: str, rate: float) -> None:
    """The trial itself compares the live optimizer with its configuration."""
    extra = ["training.momentum=0.5"] if optimizer in ("sgd", "rmsprop") else []
    extra += ["training.beta2=0.98"] if re.search("adam|adema|lion", optimizer) else []
    spec = tiny(*SHORT, "lora.rank=32", f"training.optimizer={optimizer}", f"training.learning_rate={rate}", *extra)
    result, losses = trained(spec, folder)
    assert losses[-1] < losses[0]
    fast = "adamw" in optimizer
    assert (result.engine, result.engine_reason) == (
        ("fast", None) if fast else ("trl", f"training.optimizer {optimizer}")
    )
    assert result.best is not None
    found = reloaded_loss(read_sweep(folder.root).adapter(result), load(folder.data).held_out, NF4)
    assert found == pytest.approx(result.best.value, rel=1e-4)


def test_every_optimizer_of_the_specification_is_tested() -> None:
    assert set(OPTIMIZERS) == set(get_args(Optimizer))


LOSSES = {
    "dft": (["training.loss=dft"], "training.loss dft"),
    "label smoothing": (["training.label_smoothing=0.1"], "training.label_smoothing"),
    "neftune": (["training.neftune_alpha=5"], "training.neftune_alpha"),
}


@pytest.mark.parametrize(("overrides", "reason"), LOSSES.values(), ids=LOSSES)
def test_loss_trains_and_evaluations_stay_comparable(
    tiny: Tiny, tmp_path: Path, overrides: list[str], reason: str
) -> None:
    """Evaluations measure the plain loss, whatever loss is trained."""
    folder = SweepPaths(tmp_path / "one")
    result, losses = trained(tiny(*SHORT, *overrides), folder)
    assert losses[-1] < losses[0]
    assert (result.engine, result.engine_reason) == ("trl", reason)
    assert result.best is not None
    found = reloaded_loss(read_sweep(folder.root).adapter(result), load(folder.data).held_out, NF4)
    assert found == pytest.approx(result.best.value, rel=1e-4), "it is measured as nll, without noise"


SCHEDULES = {
    "cosine_with_restarts": (["training.cycles=2"], [1.0, 0.5, 1.0, 0.5]),
    "cosine_with_min_lr": (["training.final_rate=0.5"], [1.0, 0.926777, 0.75, 0.573223]),
    "polynomial": (["training.final_rate=0.2"], [1.0, 0.8, 0.6, 0.4]),
    "warmup_stable_decay": (["training.decay_steps=2", "training.final_rate=0.5"], [1.0, 1.0, 1.0, 0.75]),
}


@pytest.mark.parametrize("engine", ["fast", "trl"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_is_followed(tiny: Tiny, folder: SweepPaths, schedule: str, engine: str) -> None:
    options, shares = SCHEDULES[schedule]
    spec = tiny(
        *SHORT, f"training.schedule={schedule}", *options, "training.warmup=0", "training.steps=4",
        "training.logging_steps=1", f"training.engine={engine}",
    )  # fmt: skip
    result, _ = trained(spec, folder)
    points = read_metrics(folder.trial(result.trial_id))
    rates = [point.values["train/learning_rate"] for point in points if "train/learning_rate" in point.values]
    assert rates == pytest.approx([5e-3 * share for share in shares], rel=1e-4)


RESUMED = {
    "DoRA": ["lora.dora=true"],
    "OLoRA": ["lora.init=olora"],
    "EVA": ["lora.init=eva", "lora.rank=4"],
    "norms and new tokens": ["lora.modules_to_save=[norm]", "base.new_tokens=['<|reply|>']"],
    "ranks by layer": ["lora.rank_pattern={down_proj: 4, q_proj: 12}", "lora.alpha_pattern={'.*mlp.*': 3}"],
    "8-bit state": ["training.optimizer=paged_adamw_8bit", "lora.rank=64"],
    "8-bit state, by trl": ["training.optimizer=paged_adamw_8bit", "lora.rank=64", "training.engine=trl"],
}


@pytest.mark.parametrize("overrides", RESUMED.values(), ids=RESUMED)
def test_variant_resumed_from_its_checkpoint_is_identical(tiny: Tiny, tmp_path: Path, overrides: list[str]) -> None:
    spec = tiny(*SHORT, *overrides, "evaluation={metrics: [exact_match], rows: 4, max_new_tokens: 4}")
    whole, broken = SweepPaths(tmp_path / "whole"), SweepPaths(tmp_path / "broken")
    uninterrupted, losses = trained(spec, whole)
    with pytest.raises(KeyboardInterrupt):
        run_local_trial(spec, broken, Witness(die_at=6))
    resumed = resume_local_trial(read_sweep(broken.root), Witness())
    assert resumed is not None
    assert resumed.best == uninterrupted.best
    points = read_metrics(broken.trial(resumed.trial_id))
    assert [point.values["eval/loss"] for point in points if "eval/loss" in point.values] == losses


@pytest.mark.parametrize("engine", ["auto", "trl"])
def test_what_this_machine_does_not_support_is_refused_at_the_start(tiny: Tiny, tmp_path: Path, engine: str) -> None:
    for index, (overrides, message) in enumerate(
        [
            (
                ["training.precision=fp16"],
                "training.precision fp16 .* scales its gradients on a GPU, and this process has none",
            ),
            (
                ["training.tf32=true", "training.precision=none"],
                "training.tf32 .* needs a GPU, and this process has none",
            ),
            (["base.quantization=int8", "lora.dora=true"], "lora.dora on base.quantization int8 .* needs a GPU"),
            (["lora.modules_to_save=[lm_head]"], "lm_head shares its weight between embedding and head"),
            (
                ["lora.modules_to_save=[norm]", "base.compute_dtype=bfloat16"],
                "lora.modules_to_save under precision none",
            ),
        ]
    ):
        with pytest.raises(TrialError, match=message):
            run_local_trial(tiny(*overrides, f"training.engine={engine}"), SweepPaths(tmp_path / str(index)), Witness())


@pytest.mark.parametrize("format", ["adapter", "merged"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.dora=true", "lora.rslora=true", "base.new_tokens=['<|reply|>']"],
        ["base.quantization=int8", "lora.init=olora"],
        ["lora.rank_pattern={down_proj: 4, q_proj: 12}", "lora.alpha_pattern={'.*mlp.*': 3}"],
    ],
    ids=["DoRA, new token", "8-bit OLoRA", "ranks by layer"],
)
def test_variant_is_exported(tiny: Tiny, tmp_path: Path, overrides: list[str], format: Format) -> None:
    """The export itself compares its logits with the source, and refuses a wrong merge."""
    folder = SweepPaths(tmp_path / "sweep")
    result, _ = trained(tiny(*SHORT, *overrides), folder)
    subject = AdapterRef.of_trial(read_sweep(folder.root), result)
    made = export(subject, tmp_path / "exported", format)
    assert made.parity.loss_exported == pytest.approx(made.parity.loss_source, rel=0.02)
    if format == "merged":
        config = AutoConfig.from_pretrained(made.folder)
        assert config.vocab_size == (513 if "base.new_tokens=['<|reply|>']" in overrides else 512)
