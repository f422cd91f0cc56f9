"""Bases with fused experts: quantized and adapted experts, and what transformers and PEFT alone make of the results."""

from pathlib import Path

import pytest
import torch
from both_engines import assert_same, difference, train
from family_bases import write_base
from one_trial import Tiny, curve, run
from peft import PeftModel
from plain import plain_base
from safetensors.torch import load_file
from shared_engine import Bench, open_inputs, train_alone, trial
from tiny import Witness
from transformers import AutoModelForCausalLM

from orchestrator.adapters.bundle import WEIGHTS, read_manifest
from orchestrator.base import load_base
from orchestrator.data import load
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.export.export import export
from orchestrator.deploy.finished import open_sweep
from orchestrator.deploy.scoring.forms import Form, open_form
from orchestrator.deploy.scoring.row_scores import score_rows
from orchestrator.experts import PackedExperts
from orchestrator.record import SweepPaths, TrialResult, read_sweep
from orchestrator.training.local import resume_local_trial, run_local_trial

pytestmark = pytest.mark.slow

SHORT = [
    "data.max_rows=24", "data.held_out={count: 4}", "training.steps=4", "training.eval_steps=4",
    "training.save_steps=2", "training.batch_size=2", "training.learning_rate=1e-2", "base.compute_dtype=float32",
    "lora.dropout=0", "lora.rank=4",
]  # fmt: skip
ADAPTED = "lora.target_modules=[q_proj, experts]"
FAST = {"qwen3_moe": {}, "mixtral": {}, "olmoe": {"moe_intermediate_size": None}, "gpt_oss": {}}
"""Families that the fast engine holds -> changes of the base, because the engine refuses a field of another family."""
OPTIMIZERS = {
    "adamw_torch": [],
    "adamw_8bit": ["training.optimizer=adamw_8bit", "lora.rank=32"],  # smaller matrices stay in 32 bits
}
FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe", "qwen3_next", "gpt_oss", "granitemoe")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapted_experts_train_and_plain_peft_loads_them(
    family: str, quantization: str, tiny: Tiny, tmp_path: Path
) -> None:
    base, folder = write_base(family, tmp_path / "base", **FAST.get(family, {})), SweepPaths(tmp_path / "run")
    target = "lora.target_modules=[experts]" if family == "granitemoe" else ADAPTED
    if family == "deepseek_v3":
        target = "lora.target_modules=[o_proj, experts]"
    result = run(tiny(*SHORT, target, f"base.model={base}", f"base.quantization={quantization}"), folder)
    assert result.engine == ("fast" if family in FAST else "trl")
    assert result.applied["base.quantization"] == quantization
    assert {"experts.down_proj", "experts.gate_up_proj"} <= set(result.applied["lora.target_modules"])
    adapter = folder.trial(result.trial_id).adapter(4)
    assert read_manifest(adapter).facts.has_packed_experts == (quantization == "nf4")
    weights = load_file(adapter / WEIGHTS)
    assert len(weights) == 2 * result.applied["lora.num_modules"]
    assert all(weight.any() for weight in weights.values()), "a matrix did not train"
    (recorded,) = [values["eval/loss"] for _, values in curve(folder) if "eval/loss" in values]
    rows = load(folder.data).held_out
    plain = PeftModel.from_pretrained(plain_base(base, quantization), str(adapter))
    assert score_rows(plain, rows, 8).loss == pytest.approx(recorded, rel=1e-6)
    with plain.disable_adapter():
        assert score_rows(plain, rows, 8).loss != pytest.approx(recorded, rel=1e-4)


def test_a_trial_with_adapted_experts_resumes_to_the_same_result(tiny: Tiny, tmp_path: Path) -> None:
    base = write_base("qwen3_moe", tmp_path / "base")
    spec = tiny(*SHORT, ADAPTED, f"base.model={base}", "base.quantization=nf4")
    whole = run(spec, SweepPaths(tmp_path / "whole"))
    assert whole.engine == "fast"
    broken = SweepPaths(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        run_local_trial(spec, broken, Witness(die_at=3))
    resumed = resume_local_trial(read_sweep(broken.root), Witness())
    assert whole.best is not None
    assert resumed is not None
    assert resumed.best == whole.best


def trained(family: str, folder: Path, tiny: Tiny) -> tuple[SweepPaths, TrialResult]:
    """Train an adapter of attention and experts on a small base in 4 bits."""
    base, paths = write_base(family, folder / "base"), SweepPaths(folder / "run")
    result = run(tiny(*SHORT, ADAPTED, f"base.model={base}", "base.quantization=nf4"), paths)
    return paths, result


def test_an_adapter_of_experts_is_scored_in_every_form_and_exported(tiny: Tiny, tmp_path: Path) -> None:
    paths, result = trained("qwen3_moe", tmp_path, tiny)
    record = read_sweep(paths.root)
    adapter, rows = AdapterRef.of_trial(record, result), load(paths.data).held_out
    assert result.best is not None
    recorded = result.best.value
    forms: list[tuple[Form, float]] = [
        ("adapter", 1e-5),
        ("merged", 1e-5),
        ("merged-4bit", 0.1),
        ("adapter-16bit", 0.1),
    ]
    for form, tolerance in forms:
        with open_form(adapter, form, "float32") as opened:
            packed = [each for each in opened.model.parameters() if isinstance(each, PackedExperts)]
            assert len(packed) == (4 if form in ("adapter", "merged-4bit") else 0)
            assert score_rows(opened.model, rows, 4).loss == pytest.approx(recorded, rel=tolerance)
    for kind in ("adapter", "merged"):
        export(adapter, tmp_path / kind, kind, dtype=None if kind == "adapter" else "fp16")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert score_rows(merged, rows, 4).loss == pytest.approx(recorded, rel=2e-3)


def test_the_record_says_how_much_of_the_base_is_quantized(tiny: Tiny, tmp_path: Path) -> None:
    paths, result = trained("mixtral", tmp_path, tiny)
    model = load_base(result.config.base)
    quantized = sum(
        each.num_weights if isinstance(each, PackedExperts) else each.quant_state.shape.numel()
        for each in model.parameters()
        if hasattr(each, "scales") or hasattr(each, "quant_state")
    )
    plain = AutoModelForCausalLM.from_pretrained(result.config.base.model).num_parameters()
    assert result.base_quantized_share == pytest.approx(quantized / plain, abs=1e-4)
    assert result.base_gib is not None
    assert 0 < result.base_gib < plain * 4 / 2**30
    (warning,) = [each for each in result.warnings if each.startswith("base.quantization")]
    assert "not quantized are model.embed_tokens.weight (" in warning
    best = open_sweep(str(paths.root)).best().as_dict()
    assert best["base_quantized_share"] == result.base_quantized_share


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", sorted(FAST))
def test_both_engines_train_adapted_experts_the_same(family: str, optimizer: str, tmp_path: Path) -> None:
    base = write_base(family, tmp_path / "base", **FAST[family])
    settings = [*SHORT, ADAPTED, f"base.model={base}", "base.quantization=nf4", *OPTIMIZERS[optimizer]]
    fast, exact = (train(engine, tmp_path / engine, *settings) for engine in ("fast", "trl"))
    bound = 1e-5 if optimizer == "adamw_torch" else 1e-3  # 8-bit moments round
    assert_same(fast, exact, update=bound)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_both_engines_train_experts_with_ranks_and_alphas_of_their_own_the_same(optimizer: str, tmp_path: Path) -> None:
    settings = [
        *SHORT, ADAPTED, f"base.model={write_base('qwen3_moe', tmp_path / 'base')}", "base.quantization=nf4",
        "lora.rank_pattern={experts.down_proj: 2, q_proj: 9}", "lora.alpha_pattern={experts.gate_up_proj: 5}",
        f"training.optimizer={optimizer}",
    ]  # fmt: skip
    fast, exact = (train(engine, tmp_path / engine, *settings) for engine in ("fast", "trl"))
    assert_same(fast, exact, update=1e-5 if optimizer == "adamw_torch" else 1e-3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("saved_by", "resumed_by"), [("fast", "trl"), ("trl", "fast")])
def test_one_engine_continues_adapted_experts_from_the_others_checkpoint(
    saved_by: str, resumed_by: str, optimizer: str, tmp_path: Path
) -> None:
    base = write_base("qwen3_moe", tmp_path / "base")
    settings = [*SHORT, ADAPTED, f"base.model={base}", "base.quantization=nf4", *OPTIMIZERS[optimizer]]
    whole = train(saved_by, tmp_path / "saved", *settings)
    checkpoint = str(tmp_path / "saved" / "checkpoint-2")
    resumed = train(resumed_by, tmp_path / "resumed", *settings, checkpoint=checkpoint)
    assert [each["step"] for each in resumed.logs] == [3, 4]
    assert difference(resumed, whole) <= (1e-5 if optimizer == "adamw_torch" else 1e-3)


def test_trials_that_share_an_engine_train_as_each_alone(tmp_path: Path) -> None:
    """Three adapt experts, one of them a part; one without has a rank beyond the stack rank of experts."""
    common = [
        f"base.model={write_base('qwen3_moe', tmp_path / 'base')}", "base.compute_dtype=float32", "lora.dropout=0",
        "training.learning_rate=1e-2", "training.steps=5", "training.eval_steps=5",
    ]  # fmt: skip
    trials = [
        trial(*common, "lora.rank=4", "lora.alpha=16", "training.seed=1", ADAPTED),
        trial(*common, "lora.rank=8", "training.seed=2", "lora.target_modules=[experts.down_proj]"),
        trial(*common, "lora.rank=16", "training.seed=3", "lora.target_modules=[q_proj]"),
        trial(*common, "lora.rank=4", "training.seed=4", ADAPTED, "lora.rank_pattern={experts.gate_up_proj: 2}"),
    ]
    inputs = open_inputs(*common)
    bench = Bench(inputs, tmp_path / "together", len(trials), trials)
    together = [bench.join(slot, config) for slot, config in enumerate(trials)]
    bench.run()
    for index, (config, seen) in enumerate(zip(trials, together, strict=True)):
        alone = train_alone(inputs, tmp_path / str(index), config)
        assert seen.error is None
        assert seen.losses == pytest.approx(alone.losses, abs=1e-5)
        assert seen.norms == pytest.approx(alone.norms, rel=1e-3)
        assert seen.evaluations[5]["eval/loss"] == pytest.approx(alone.evaluations[5]["eval/loss"], abs=1e-5)
        assert (seen.update - alone.update).norm() <= 1e-3 * alone.update.norm()
