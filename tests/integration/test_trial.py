"""Train one trial for real on the embedded base: its result, its settings, and its errors."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from one_trial import ENGINES, Tiny, curve, run
from tiny import Witness

from orchestrator.embedded import BASE_DIR
from orchestrator.errors import RequestError, TrialError
from orchestrator.record import SweepPaths, TrialState, read_sweep
from orchestrator.spec import TrialConfig
from orchestrator.spec.search import SearchSection
from orchestrator.training.engines import choose as choose_module
from orchestrator.training.fast.step.engine import CPU_TOKENS
from orchestrator.training.local import run_local_trial

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["auto", "trl"])
def test_result_has_what_was_measured_and_applied(tiny: Tiny, folder: SweepPaths, engine: str) -> None:
    settings = [f"training.engine={engine}", "lora.rank=6", "lora.dropout=0.1", "evaluation.metrics=[exact_match]"]
    result = run(tiny(*settings), folder)
    assert result.state == TrialState.COMPLETE
    assert result.engine == ("trl" if engine == "trl" else "fast")
    assert result.engine_reason is None
    assert result.memory_plan == (
        None if engine == "trl" else {"keeps_base": True, "recompute": "nothing", "max_tokens": CPU_TOKENS}
    )
    assert result.step == result.total_steps == 12
    assert result.tokens > 12 * 8 * 10
    assert result.tokens_per_second
    assert result.peak_memory_gib
    assert result.seconds > 0
    assert result.grad_norm
    assert result.gpu_seconds == (0 if result.device == "cpu" else pytest.approx(result.seconds))
    assert result.best is not None
    assert result.best.values.keys() == {
        "eval/loss",
        "eval/token_accuracy",
        "eval/exact_match",
        "eval/exact_match_stderr",
    }
    inner, hidden, layers = 448, 192, 4
    per_layer = 4 * (hidden + hidden) + 3 * (hidden + inner)
    assert result.applied == {
        "lora.rank": 6,
        "lora.alpha": 12.0,  # tied: twice the rank
        "lora.dropout": 0.1,
        "lora.target_modules": sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        "lora.num_modules": 7 * layers,
        "training.learning_rate": 2e-3,
        "training.weight_decay": 0.0,
        "training.max_grad_norm": 1.0,
        "training.adapter_dtype": "float32",
        "training.optimizer": "torch.AdamW fused",
        "training.betas": [0.9, 0.999],
        "training.epsilon": 1e-8,
        "training.momentum": 0.0,
        "training.loss": "nll",
        "training.label_smoothing": 0.0,
        "training.neftune_alpha": None,
        "lora.rslora": False,
        "lora.dora": False,
        "lora.starts_from_base": False,
        "lora.modules_to_save": [],
        "base.new_tokens": {},
        "base.quantization": "nf4",
        "base.double_quant": True,
        "num_trainable_parameters": 6 * per_layer * layers,
    }
    paths = folder.trial(result.trial_id)
    assert json.loads(paths.result.read_text())["state"] == "COMPLETE"
    assert not paths.checkpoints.exists()
    assert [step for step, values in curve(folder) if "eval/loss" in values] == [4, 8, 12]


@pytest.mark.parametrize(
    ("engine", "section", "field", "value", "message"),
    [
        ("trl", "lora", "rank", 3, "lora.rank: configured 16, live 3"),
        ("trl", "training", "weight_decay", 0.5, "training.weight_decay: configured 0.0, live 0.5"),
        ("fast", "training", "weight_decay", 0.5, "training.weight_decay: configured 0.0, live 0.5"),
        ("trl", "lora", "rslora", True, "lora.rslora: configured False, live True"),
        ("fast", "lora", "rslora", True, "lora.rslora: configured False, live True"),
        ("trl", "lora", "dora", True, "lora.dora: configured False, live True"),
        ("trl", "lora", "init", "olora", "lora.starts_from_base: configured False, live True"),
        ("trl", "lora", "alpha_pattern", {"down_proj": 3}, "lora.alpha: configured 32.0, live {'model.layers.0"),
        ("fast", "lora", "alpha_pattern", {"down_proj": 3}, "lora.alpha: configured 32.0, live [{'model.layers.0"),
        ("trl", "lora", "layers_to_transform", [0], "lora.num_modules: configured 28, live 7"),
        (
            "trl",
            "training",
            "optimizer",
            "adamw_8bit",
            "configured 'torch.AdamW fused', live 'bitsandbytes.AdamW 8-bit'",
        ),
        ("trl", "training", "beta2", 0.9, "training.betas: configured [0.9, 0.999], live [0.9, 0.9]"),
        ("fast", "training", "beta2", 0.9, "training.betas: configured [0.9, 0.999], live [0.9, 0.9]"),
        ("trl", "training", "loss", "dft", "training.loss: configured 'nll', live 'dft'"),
        ("trl", "training", "label_smoothing", 0.1, "training.label_smoothing: configured 0.0, live 0.1"),
        ("trl", "training", "neftune_alpha", 5.0, "training.neftune_alpha: configured None, live 5.0"),
    ],
)
def test_setting_that_is_not_applied_fails_the_trial(
    tiny: Tiny,
    folder: SweepPaths,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    section: str,
    field: str,
    value: Any,
    message: str,
) -> None:
    def with_another_value(build: Callable[..., Any]) -> Callable[..., Any]:
        def built(*given: Any, **options: Any) -> Any:
            changed = [
                each.model_copy(update={section: getattr(each, section).model_copy(update={field: value})})
                if isinstance(each, TrialConfig)
                else each
                for each in given
            ]
            return build(*changed, **options)

        return built

    for name in ("build_trainer", "model_from_template", "model_from_peft"):
        monkeypatch.setattr(choose_module, name, with_another_value(getattr(choose_module, name)))
    with pytest.raises(TrialError, match=re.escape(message)):
        run(tiny(f"training.engine={engine}"), folder)
    (trial,) = read_sweep(folder.root).trials()
    assert trial.state == TrialState.FAILED
    assert message in (trial.error or "")


def test_best_is_the_best_evaluation_with_the_adapter_of_its_step(
    tiny: Tiny, folder: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The accuracy rises during training, so that its minimum is the first evaluation, not the last.
    monkeypatch.setattr(SearchSection, "resolved_mode", "min")
    result = run(tiny("search.metric=eval/token_accuracy"), folder)
    evaluations = {step: values for step, values in curve(folder) if "eval/loss" in values}
    assert evaluations[4]["eval/token_accuracy"] < evaluations[12]["eval/token_accuracy"]
    assert result.best is not None
    assert (result.best.step, result.step) == (4, 12)
    assert result.best.values == evaluations[4]
    paths = folder.trial(result.trial_id)
    assert [child.name for child in (paths.root / "adapters").iterdir()] == ["step-4"]
    assert "Step 4" in (paths.root / result.best.adapter / "README.md").read_text()


def test_searched_generation_metric_is_measured_at_every_evaluation(tiny: Tiny, folder: SweepPaths) -> None:
    result = run(
        tiny("evaluation={metrics: [exact_match], rows: 8, max_new_tokens: 8}", "search.metric=eval/exact_match"),
        folder,
    )
    assert result.mode == "max"
    evaluations = [values for _, values in curve(folder) if "eval/loss" in values]
    assert len(evaluations) == 3
    assert all("eval/exact_match" in values for values in evaluations)
    assert result.best is not None
    assert result.best.value == max(values["eval/exact_match"] for values in evaluations)


def test_loss_does_not_depend_on_the_evaluation_batch(tiny: Tiny, tmp_path: Path) -> None:
    losses = []
    for size in (1, 7, 40):
        folder = SweepPaths(tmp_path / str(size))
        result = run(tiny("training.engine=trl", f"training.eval_batch_size={size}", "training.steps=1"), folder)
        assert result.best is not None
        losses.append(result.best.value)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_loss_that_is_not_finite_fails_only_that_trial(tiny: Tiny, tmp_path: Path, engine: str) -> None:
    wild = [f"training.engine={engine}", "training.learning_rate=1e30", "training.max_grad_norm=0"]
    with pytest.raises(TrialError, match=r"at step \d+"):
        run(tiny(*wild), SweepPaths(tmp_path / "bad"))
    (bad,) = read_sweep(tmp_path / "bad").trials()
    assert bad.state == TrialState.FAILED
    good = run(tiny(f"training.engine={engine}", "training.steps=4"), SweepPaths(tmp_path / "good"))
    assert good.state == TrialState.COMPLETE


def test_base_that_cannot_be_loaded_fails_the_trial(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(BASE_DIR, folder)
    (folder / "model.safetensors").unlink()
    paths = SweepPaths(tmp_path / "sweep")
    with pytest.raises(TrialError, match="cannot be loaded"):
        run(tiny(f"base.model={folder}"), paths)
    (trial,) = read_sweep(paths.root).trials()
    assert trial.state == TrialState.FAILED
    assert "cannot be loaded" in (trial.error or "")


@pytest.mark.parametrize("engine", ENGINES)
def test_trial_ended_by_the_watcher_leaves_progress_and_no_result(tiny: Tiny, folder: SweepPaths, engine: str) -> None:
    assert run_local_trial(tiny(f"training.engine={engine}"), folder, Witness(stop_at=6)) is None
    (trial,) = read_sweep(folder.root).trials()
    assert (trial.state, trial.step) == (TrialState.RUNNING, 6)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["base.quantization=fp4"], None),
        (["base.quantization=none"], None),
        (["base.quantization=none", "training.engine=trl"], None),
        (["base.double_quant=false"], None),
        (["base.compute_dtype=bfloat16"], None),
        (["training.precision=bf16"], "base.compute_dtype float32 under precision bf16"),
        (["training.adapter_dtype=bfloat16"], None),
        (["training.adapter_dtype=bfloat16", "training.engine=trl"], None),
        (["training.dequantize=per_layer", "training.recompute=true"], None),
        (["lora.target_modules=[q_proj, v_proj]"], None),
        (["training.optimizer=adamw_torch", "training.weight_decay=0.1", "training.group_by_length=true"], None),
        (
            ["training.optimizer=adafactor", "training.schedule=linear", "training.warmup=3"],
            "training.optimizer adafactor",
        ),
        (["training.optimizer=sgd", "training.learning_rate=0.5"], "training.optimizer sgd"),
        (["training.optimizer=paged_adamw_32bit"], None),
        (["training.steps=null", "training.epochs=0.4"], None),
        (["data.format=messages", "data.template=null"], None),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_settings_train(
    tiny: Tiny, folder: SweepPaths, tmp_path: Path, overrides: list[str], reason: str | None
) -> None:
    if "data.format=messages" in overrides:
        rows = tmp_path / "chat.jsonl"
        turns = [{"role": "user", "content": "largest of 1 2"}, {"role": "assistant", "content": "# 2"}]
        rows.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(60)))
        overrides = [*overrides, f"data.source={rows}"]
    result = run(tiny(*overrides), folder)
    losses = [values["eval/loss"] for _, values in curve(folder) if "eval/loss" in values]
    assert result.state == TrialState.COMPLETE
    assert losses[-1] < losses[0]
    asked_for_trl = "training.engine=trl" in overrides
    assert result.engine == ("trl" if reason or asked_for_trl else "fast")
    assert result.engine_reason == reason


def test_unknown_target_module_is_named_before_the_trial_has_a_folder(tiny: Tiny, folder: SweepPaths) -> None:
    with pytest.raises(RequestError, match=r"'w_proj' names no layer of this base; it has down_proj, "):
        run(tiny("lora.target_modules=[q_proj, w_proj]"), folder)
    assert not folder.root.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["base.quantization=none", "lora.target_modules=[up_proj]", "lora.modules_to_save=[mlp]"],
            "nothing is left to adapt; all layers are in lora.modules_to_save",
        ),
        (
            ["training.steps=null", "training.epochs=0.2", "training.schedule=linear", "training.warmup=50"],
            "training.schedule: warmup (50 steps) must end before the last step (5)",
        ),
    ],
    ids=["nothing to adapt", "epochs shorter than the warmup"],
)
def test_errors_that_base_and_rows_reveal(tiny: Tiny, folder: SweepPaths, overrides: list[str], message: str) -> None:
    with pytest.raises(TrialError) as caught:
        run(tiny(*overrides), folder)
    assert message in str(caught.value)
