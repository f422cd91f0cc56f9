"""The fast engine makes the steps of SFTTrainer's own loop: the same rows, numbers and files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from both_engines import FEW_ROWS, Trained, assert_same, difference, largest, train
from safetensors.torch import load_file

from orchestrator.training.fast.plan import memory_plan
from orchestrator.training.fast.step.engine import Engine

pytestmark = pytest.mark.slow


STEPS = 50


LONG = [f"training.steps={STEPS}", "training.eval_steps=10", "training.learning_rate=2e-4", "training.save_steps=30"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Train fifty steps, which are two epochs, with each engine."""
    return {engine: train(engine, tmp_path_factory.mktemp(engine), *LONG) for engine in ("trl", "fast")}


def test_fifty_steps_equal_those_of_sfttrainer(pair: dict[str, Trained]) -> None:
    fast, trl = pair["fast"], pair["trl"]
    assert len(fast.logs) == STEPS
    assert list(fast.evaluations) == [10, 20, 30, 40, 50]
    assert [len(rows) for rows in fast.batches.values()] == [8] * STEPS
    assert fast.batches[0] != fast.batches[25], "each epoch has another order"
    assert_same(fast, trl)
    assert largest(fast.column("mean_token_accuracy"), trl.column("mean_token_accuracy")) <= 1e-7


def test_callbacks_receive_the_same_events_in_the_same_order(pair: dict[str, Trained]) -> None:
    def received(trained: Trained) -> list[str]:
        # In the fast engine, forward, backward and update are one graph, and evaluations have other batches.
        left_out = ("on_pre_optimizer_step", "on_optimizer_step", "on_prediction_step", "on_log summary")
        return [event for event in trained.events if not event.startswith(left_out)]

    assert received(pair["fast"]) == received(pair["trl"])


def test_checkpoint_has_what_the_trainer_saves(pair: dict[str, Trained]) -> None:
    fast, trl = (pair[engine].folder / "checkpoint-30" for engine in ("fast", "trl"))
    # Not needed to resume: the tokenizer is saved with each adapter, the arguments follow from the configuration.
    left_out = {"README.md", "chat_template.jinja", "tokenizer_config.json", "tokenizer.json", "training_args.bin"}
    assert {path.name for path in fast.iterdir()} == {path.name for path in trl.iterdir()} - left_out
    optimizer, expected = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (fast, trl))
    assert optimizer["param_groups"] == expected["param_groups"]
    assert optimizer["state"].keys() == expected["state"].keys()
    for key, state in expected["state"].items():
        assert optimizer["state"][key].keys() == state.keys()
        for name, value in state.items():
            assert optimizer["state"][key][name].shape == value.shape
            assert (optimizer["state"][key][name] - value).norm() <= 1e-4 * value.norm(), name
    fast_schedule, schedule = (torch.load(folder / "scheduler.pt", weights_only=True) for folder in (fast, trl))
    assert fast_schedule == schedule
    fast_weights, weights = (load_file(folder / "adapter_model.safetensors") for folder in (fast, trl))
    assert fast_weights.keys() == weights.keys()


@pytest.mark.parametrize(("saved_by", "resumed_by"), [("trl", "fast"), ("fast", "trl")])
def test_one_engine_continues_from_the_others_checkpoint(
    pair: dict[str, Trained], tmp_path: Path, saved_by: str, resumed_by: str
) -> None:
    checkpoint = str(pair[saved_by].folder / "checkpoint-30")
    resumed, whole = train(resumed_by, tmp_path, *LONG, checkpoint=checkpoint), pair[resumed_by]
    assert resumed.batches == {step: rows for step, rows in whole.batches.items() if step >= 30}
    assert largest(resumed.column("learning_rate"), whole.column("learning_rate")[30:]) <= 1e-15
    assert largest(resumed.column("loss"), whole.column("loss")[30:]) <= 1e-5
    for name, end in whole.end.items():
        assert (resumed.end[name] - end).norm() <= 1e-5 * end.norm(), name


IN_EIGHT_BITS = 1e-4, 1e-2
"""Bounds for a loss, and for an update relative to its norm: two close numbers may round to neighboring bytes."""


@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "paged_adamw_8bit"])
@pytest.mark.parametrize(("saved_by", "resumed_by"), [("trl", "fast"), ("fast", "trl")])
def test_one_engine_continues_from_the_others_bitsandbytes_checkpoint(
    tmp_path: Path, optimizer: str, saved_by: str, resumed_by: str
) -> None:
    settings = [
        f"training.optimizer={optimizer}", "lora.rank=64", "lora.rank_pattern={v_proj: 40}", "training.steps=6",
        "training.save_steps=3",
    ]  # fmt: skip
    train(saved_by, tmp_path / "saved", *settings)
    whole = train(resumed_by, tmp_path / "whole", *settings)
    resumed = train(resumed_by, tmp_path / "on", *settings, checkpoint=str(tmp_path / "saved" / "checkpoint-3"))
    loss, weight = IN_EIGHT_BITS if "8bit" in optimizer else (1e-5, 1e-5)
    assert largest(resumed.column("loss"), whole.column("loss")[3:]) <= loss
    for name, end in whole.end.items():
        assert (resumed.end[name] - end).norm() <= weight * end.norm(), name


SETTINGS = {
    # 40 rows are five batches of 7 and one of 5. An epoch has a step of four batches and one of two.
    "accumulation, a remainder, decay, no clipping": [
        *FEW_ROWS, "training.batch_size=7", "training.accumulation=4", "training.steps=", "training.epochs=2.5",
        "training.weight_decay=0.1", "training.max_grad_norm=0", "training.eval_steps=2",
    ],
    "two modules, a small norm, several passes": [
        "lora.target_modules=[q_proj, v_proj]", "lora.rank=5", "training.max_grad_norm=0.05", "training.batch_size=24",
        "training.schedule=linear", "training.warmup=2", "training.steps=6", "training.eval_steps=3",
    ],
    "rows of similar length": [
        *FEW_ROWS, "training.group_by_length=true", "training.accumulation=2", "training.steps=", "training.epochs=2.5",
        "training.eval_steps=3",
    ],
    "packed rows": [
        "data.packing=true", "data.max_length=128", "training.batch_size=2", "training.steps=6",
        "training.eval_steps=3",
    ],
    "rsLoRA on two layers, gaussian, betas, a floor": [
        "lora.rslora=true", "lora.alpha=8", "lora.layers_to_transform=[0, 2]", "lora.init=gaussian",
        "training.beta1=0.8", "training.beta2=0.95", "training.epsilon=1e-6", "training.schedule=cosine_with_min_lr",
        "training.final_rate=0.3", "training.steps=4",
    ],
    "ranks and alphas by layer": [
        "lora.rank_pattern={down_proj: 4, 'layers.0.self_attn.q_proj': 20, k_proj: 1}",
        "lora.alpha_pattern={v_proj: 3, '.*mlp.(up|down)_proj': 50}", "training.weight_decay=0.1",
        "training.batch_size=4", "training.accumulation=2", "training.steps=8", "training.eval_steps=4",
    ],
    "rsLoRA with ranks and alphas by layer, each layer its own": [
        "lora.rslora=true", "lora.alpha=4", "lora.rank_pattern={'.*attn.*': 3, '.*mlp.*': 20}",
        "lora.alpha_pattern={'layers.[01].*': 7}", "lora.init=gaussian", "training.steps=4",
    ],
    "ranks by layer, moments in eight bits": [
        "training.optimizer=adamw_8bit", "lora.rank=48", "lora.rank_pattern={v_proj: 40, up_proj: 64}",
        "lora.alpha_pattern={up_proj: 20}", "training.weight_decay=0.1", "training.learning_rate=5e-4",
        "training.steps=5", "training.eval_steps=5",
    ],
    "moments in eight bits": [
        "training.optimizer=adamw_8bit", "lora.rank=64", "training.weight_decay=0.1", "training.steps=8",
        "training.eval_steps=4",
    ],
    "the base not quantized, recompute, seed": [
        "base.quantization=none", "training.recompute=true", "training.seed=7", "training.steps=4",
    ],
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_few_steps_equal_those_of_sfttrainer(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0
    if setting.endswith("passes"):
        monkeypatch.setattr(memory_plan, "CPU_TOKENS", 150)
        run = Engine._compute

        def counted(*arguments: Any) -> Any:
            nonlocal passes
            passes += arguments[2]
            return run(*arguments)

        monkeypatch.setattr(Engine, "_compute", counted)
    fast, trl = (train(engine, tmp_path / engine, *SETTINGS[setting]) for engine in ("fast", "trl"))
    loss, update = IN_EIGHT_BITS if setting.endswith("eight bits") else (1e-5, 1e-4)
    assert_same(fast, trl, loss, update)
    if setting.endswith("passes"):
        assert passes >= 6 * 4
    if setting.startswith("accumulation"):
        assert [len(rows) for rows in fast.batches.values()] == [28, 12] * 2 + [28]
    if setting == "packed rows":
        assert all(len(rows) >= 5 for rows in fast.batches.values()), "several sequences in each of two rows"
    norms = fast.column("grad_norm")
    assert all(norm > 0.05 for norm in norms), "the smallest max_grad_norm clips"


def test_with_a_bfloat16_base_the_engines_differ_by_its_rounding(tmp_path: Path) -> None:
    settings = ["base.compute_dtype=bfloat16", "training.steps=8"]
    fast, trl = (train(engine, tmp_path / engine, *settings) for engine in ("fast", "trl"))
    assert fast.batches == trl.batches
    for step, values in trl.evaluations.items():
        assert fast.evaluations[step]["eval/loss"] == pytest.approx(values["eval/loss"], rel=5e-3)
    assert difference(fast, trl) < 0.05
