"""One trial, trained for real on the embedded base."""

import gc
import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Witness

from orchestrator import base as base_module
from orchestrator.adapters.bundle import verify_adapter
from orchestrator.base import load_base, shared_base
from orchestrator.embedded import BASE_DIR
from orchestrator.errors import TrialError
from orchestrator.record import SweepPaths, TrialResult, TrialState, read_metrics, read_sweep, write_record
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.spec.search import SearchSection
from orchestrator.training.attempt import attempt as attempt_module
from orchestrator.training.engines import choose as choose_module
from orchestrator.training.fast.step.engine import CPU_TOKENS
from orchestrator.training.local import resume_local_trial, run_local_trial
from orchestrator.training.trial import run_trial

pytestmark = pytest.mark.slow

Tiny = Callable[..., SweepSpec]

ENGINES = ["fast", "trl"]


def run(spec: SweepSpec, folder: SweepPaths, witness: Witness | None = None) -> TrialResult:
    result = run_local_trial(spec, folder, witness or Witness())
    assert result is not None
    return result


def curve(folder: SweepPaths) -> list[tuple[int, dict[str, float]]]:
    (trial_id,) = folder.trial_ids()
    return [(point.step, point.values) for point in read_metrics(folder.trial(trial_id))]


@pytest.mark.parametrize("engine", ["auto", "trl"])
def test_result_holds_what_was_measured_and_applied(tiny: Tiny, folder: SweepPaths, engine: str) -> None:
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
    assert result.best.values.keys() == {"eval/loss", "eval/token_accuracy", "eval/exact_match"}
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
def test_a_setting_that_is_not_applied_fails_the_trial(
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
        def built(*given: Any) -> Any:
            changed = [
                each.model_copy(update={section: getattr(each, section).model_copy(update={field: value})})
                if isinstance(each, TrialConfig)
                else each
                for each in given
            ]
            return build(*changed)

        return built

    for name in ("build_trainer", "model_from_template", "model_from_peft"):
        monkeypatch.setattr(choose_module, name, with_another_value(getattr(choose_module, name)))
    with pytest.raises(TrialError, match=re.escape(message)):
        run(tiny(f"training.engine={engine}"), folder)
    (trial,) = read_sweep(folder.root).trials()
    assert trial.state == TrialState.FAILED
    assert message in (trial.error or "")


def test_best_is_the_best_evaluation_with_the_adapter_of_that_step(
    tiny: Tiny, folder: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The accuracy rises while it learns, so that its minimum is the first evaluation, not the last.
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


def test_a_generation_metric_that_is_searched_for_is_taken_at_every_evaluation(tiny: Tiny, folder: SweepPaths) -> None:
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


def test_gradient_is_the_same_after_an_evaluation(tiny: Tiny) -> None:
    """bitsandbytes repacks 4-bit weights in evaluation on a CPU with avx512_bf16; gradients were then 1/8 the size."""
    from peft import LoraConfig, get_peft_model

    def gradient(model: Any) -> torch.Tensor:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    torch.manual_seed(0)
    model = get_peft_model(
        load_base(tiny().base), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False)
    )
    ids = torch.randint(4, 500, (4, 24))
    before = gradient(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradient(model)
    assert torch.nn.functional.cosine_similarity(before, after, dim=0) > 0.9999
    assert float(after.norm()) == pytest.approx(float(before.norm()), rel=1e-4)


@pytest.mark.parametrize(("first", "then"), [("trl", "trl"), ("trl", "fast"), ("fast", "trl"), ("fast", "fast")])
def test_a_reused_base_is_as_good_as_a_fresh_one(tiny: Tiny, tmp_path: Path, first: str, then: str) -> None:
    def second(name: str) -> list[tuple[int, dict[str, float]]]:
        folder = SweepPaths(tmp_path / name)
        settings = ["training.seed=2", "lora.rank=8", "lora.dropout=0.1", "training.steps=6"]
        run(tiny(f"training.engine={then}", *settings), folder)
        return curve(folder)

    base_module.evict()
    base = shared_base(tiny().base)
    settings = ["training.seed=1", "lora.rank=32", "training.recompute=true", "training.steps=4"]
    run(tiny(f"training.engine={first}", *settings), SweepPaths(tmp_path / "first"))
    after_another = second("after_another")
    assert shared_base(tiny().base) is base, "the base was loaded again"
    base_module.evict()
    assert second("fresh") == after_another


@pytest.mark.parametrize("engine", ENGINES)
def test_lease_leaves_nothing_on_the_base(
    tiny: Tiny, folder: SweepPaths, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    build, trained = choose_module.build_trainer, []

    def build_and_watch(*arguments: Any) -> Any:
        trainer = build(*arguments)
        trained.append(weakref.ref(trainer.model))
        return trainer

    monkeypatch.setattr(choose_module, "build_trainer", build_and_watch)
    spec = tiny(f"training.engine={engine}", "training.recompute=true", "training.steps=4")
    base_module.evict()
    base = shared_base(spec.base)
    modules = dict(base.named_modules())
    run(spec, folder)
    assert shared_base(spec.base) is base
    assert dict(base.named_modules()) == modules
    assert "forward" not in base.__dict__
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert not base.is_gradient_checkpointing
    gc.collect()
    assert [reference() for reference in trained] == [None], "what hung on its shell is gone"


@pytest.mark.parametrize("engine", ENGINES)
def test_who_still_names_a_trials_model_holds_no_adapter(
    tiny: Tiny, folder: SweepPaths, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    build, named, adapters = choose_module.build_trainer, [], []

    def build_and_name(*arguments: Any) -> Any:
        trainer = build(*arguments)
        named.append(trainer.model)
        adapters.extend(weakref.ref(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad)
        return trainer

    monkeypatch.setattr(choose_module, "build_trainer", build_and_name)
    run(tiny(f"training.engine={engine}", "training.steps=4"), folder)
    gc.collect()
    assert len(named) == 1
    assert len(adapters) == 56
    assert not any(reference() is not None for reference in adapters)


@pytest.mark.parametrize("engine", ENGINES)
def test_loss_that_is_not_finite_fails_the_trial_and_not_the_next(tiny: Tiny, tmp_path: Path, engine: str) -> None:
    wild = [f"training.engine={engine}", "training.learning_rate=1e30", "training.max_grad_norm=0"]
    with pytest.raises(TrialError, match=r"at step \d+"):
        run(tiny(*wild), SweepPaths(tmp_path / "bad"))
    (bad,) = read_sweep(tmp_path / "bad").trials()
    assert bad.state == TrialState.FAILED
    good = run(tiny(f"training.engine={engine}", "training.steps=4"), SweepPaths(tmp_path / "good"))
    assert good.state == TrialState.COMPLETE


GROUPED = ["training.group_by_length=true", "training.seed=2", "data.max_rows=80"]  # 40 rows: 3 steps an epoch
NOISY = [*GROUPED, "training.neftune_alpha=5"]


@pytest.mark.parametrize(
    ("engine", "step", "save_steps", "more"),
    [("trl", 5, 4, []), ("fast", 9, 3, []), ("trl", 8, 7, NOISY), ("fast", 8, 7, GROUPED), ("trl", 10, 9, NOISY)],
)  # more in test_fast
def test_resumed_trial_is_the_undisturbed_one_to_the_digit(
    tiny: Tiny, tmp_path: Path, engine: str, step: int, save_steps: int, more: list[str]
) -> None:
    settings = [f"training.engine={engine}", f"training.save_steps={save_steps}", "training.logging_steps=1", *more]
    spec = tiny("lora.dropout=0.1", "training.accumulation=2", *settings)
    whole = SweepPaths(tmp_path / "whole")
    undisturbed = run(spec, whole)
    broken = SweepPaths(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        run_local_trial(spec, broken, Witness(die_at=step))
    record = read_sweep(broken.root)
    (interrupted,) = record.trials()
    assert (interrupted.state, interrupted.engine) == (TrialState.RUNNING, engine)
    torch.manual_seed(1234)  # another process has another random state
    resumed = resume_local_trial(record, Witness())
    assert resumed is not None
    assert curve(broken) == curve(whole)
    assert resumed.best == undisturbed.best
    assert (resumed.step, resumed.tokens) == (undisturbed.step, undisturbed.tokens)
    assert resumed.seconds > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_clone_sees_the_rows_that_its_donor_would_have_seen(tiny: Tiny, tmp_path: Path, engine: str) -> None:
    """In batches of similar length, from the second epoch on, in a process that has drawn other numbers."""
    spec = tiny(f"training.engine={engine}", "training.logging_steps=1", "training.save_steps=7", *GROUPED)
    whole, other = SweepPaths(tmp_path / "whole"), SweepPaths(tmp_path / "other")
    run(spec, whole)
    with pytest.raises(KeyboardInterrupt):
        run_local_trial(spec, other, Witness(die_at=8))
    (donor,) = read_sweep(other.root).trials()
    paths = other.trial("clone")
    shutil.copytree(other.trial(donor.trial_id).root, paths.root)
    write_record(paths.progress, donor.model_copy(update={"trial_id": "clone", "parent": "donor", "best": None}))
    torch.manual_seed(99)
    result = run_trial(donor.config, spec, paths, other.data, Witness())
    assert result is not None
    assert (result.engine, result.state) == (engine, TrialState.COMPLETE)
    after = [(point.step, point.values) for point in read_metrics(paths) if point.step > 7]
    assert after == [each for each in curve(whole) if each[0] > 7]


def test_what_a_kill_left_half_done_is_put_right(
    tiny: Tiny, folder: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came while the best adapter was replaced by one of the same step, and while a checkpoint was written."""
    monkeypatch.setattr(SearchSection, "resolved_mode", "max")  # the first evaluation stays the best
    spec = tiny("training.save_steps=4")
    with pytest.raises(KeyboardInterrupt):
        run_local_trial(spec, folder, Witness(die_at=10))
    record = read_sweep(folder.root)
    (before,) = record.trials()
    assert before.best is not None
    best = record.adapter(before)
    best.rename(best.with_name(f".replaced-{best.name}"))
    paths = folder.trial(before.trial_id)
    halves = [paths.adapters / ".building-a", paths.checkpoints / ".building-b"]
    for half in halves:
        half.mkdir()
        (half / "adapter_model.safetensors").write_bytes(b"half")
    (paths.adapters / ".replaced-step-8").mkdir()
    shutil.copytree(best.with_name(f".replaced-{best.name}"), paths.adapter(8))
    result = resume_local_trial(record, Witness())
    assert result is not None
    assert result.best is not None
    assert result.best.step == 4
    verify_adapter(record.adapter(result))
    assert [path.name for path in paths.adapters.iterdir()] == ["step-4"]


@pytest.mark.parametrize("engine", ENGINES)
def test_another_rate_holds_from_the_checkpoint_on(tiny: Tiny, folder: SweepPaths, engine: str) -> None:
    """As under PBT: the checkpoint holds the rate, decay and schedule of before."""
    settings = ["training.schedule=linear", "training.warmup=0", "training.save_steps=4", "training.logging_steps=1"]
    spec = tiny(f"training.engine={engine}", *settings)
    with pytest.raises(KeyboardInterrupt):
        run_local_trial(spec, folder, Witness(die_at=6))
    (before,) = read_sweep(folder.root).trials()
    assert before.checkpoint == "checkpoints/checkpoint-4"
    training = spec.training.model_copy(update={"learning_rate": 5e-4, "weight_decay": 0.1})
    config = before.config.model_copy(update={"training": training})
    paths = folder.trial(before.trial_id)
    write_record(paths.progress, before.model_copy(update={"config": config}))
    result = run_trial(config, spec, paths, folder.data, Witness())
    assert result is not None
    assert result.state == TrialState.COMPLETE
    assert (result.applied["training.learning_rate"], result.applied["training.weight_decay"]) == (5e-4, 0.1)
    rates = {step: values["train/learning_rate"] for step, values in curve(folder) if "train/loss" in values}
    assert rates == pytest.approx({step: (2e-3 if step <= 4 else 5e-4) * (13 - step) / 12 for step in range(1, 13)})


def test_interrupted_while_it_answers_trains_no_step_more(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny("evaluation={metrics: [exact_match], rows: 8, max_new_tokens: 8}")
    whole, broken = SweepPaths(tmp_path / "whole"), SweepPaths(tmp_path / "broken")
    undisturbed = run(spec, whole)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(attempt_module, "exact_matches", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_local_trial(spec, broken, Witness())
    resumed = resume_local_trial(read_sweep(broken.root), Witness())
    assert resumed is not None
    assert (resumed.step, resumed.tokens, resumed.best) == (12, undisturbed.tokens, undisturbed.best)
    assert curve(broken) == curve(whole)


def test_trained_biases_are_the_trials_own(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path / "base"
    shutil.copytree(BASE_DIR, folder)
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    spec = tiny(f"base.model={folder}", "lora.bias=all", "training.steps=4")
    base = shared_base(spec.base)
    fresh = {name: value.clone() for name, value in base.named_parameters() if name.endswith("bias")}
    assert fresh
    result = run(spec, SweepPaths(tmp_path / "biased"))
    assert result.applied["num_trainable_parameters"] > 0
    assert (result.engine, result.engine_reason) == ("trl", "lora.bias all")
    assert shared_base(spec.base) is base
    assert all(torch.equal(value, base.get_parameter(name)) for name, value in fresh.items())


def test_a_base_that_cannot_be_loaded_ends_the_trial(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(BASE_DIR, folder)
    (folder / "model.safetensors").unlink()
    paths = SweepPaths(tmp_path / "sweep")
    with pytest.raises(TrialError, match="cannot be loaded"):
        run(tiny(f"base.model={folder}"), paths)
    (trial,) = read_sweep(paths.root).trials()
    assert trial.state == TrialState.FAILED
    assert "cannot be loaded" in (trial.error or "")


def test_finished_trial_does_not_run_again(tiny: Tiny, folder: SweepPaths) -> None:
    result = run(tiny("training.steps=4"), folder)
    witness = Witness()
    assert resume_local_trial(read_sweep(folder.root), witness) == result
    assert not witness.points


@pytest.mark.parametrize("engine", ENGINES)
def test_stopped_by_the_watcher_leaves_progress_and_no_result(tiny: Tiny, folder: SweepPaths, engine: str) -> None:
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
        (["training.dequantise=per_layer", "training.recompute=true"], None),
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


def test_unknown_target_module_is_named(tiny: Tiny, folder: SweepPaths) -> None:
    with pytest.raises(TrialError, match=r"'w_proj' is not a linear layer of this base; it has down_proj, "):
        run(tiny("lora.target_modules=[q_proj, w_proj]"), folder)


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
def test_what_only_base_and_rows_can_tell(tiny: Tiny, folder: SweepPaths, overrides: list[str], message: str) -> None:
    with pytest.raises(TrialError) as caught:
        run(tiny(*overrides), folder)
    assert message in str(caught.value)
