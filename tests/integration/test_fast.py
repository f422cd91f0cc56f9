"""The fast engine against SFTTrainer's own loop: the same rows, numbers and files; and what it alone does."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import DEMO, TINY, Witness

from orchestrator.base import guarded
from orchestrator.data import prepare
from orchestrator.errors import TrialError
from orchestrator.record import SweepPaths, TrialState, read_metrics, read_sweep
from orchestrator.spec import SweepSpec, load_spec
from orchestrator.training.attempt.events import WriteNow
from orchestrator.training.engines.loop import Loop, TrialInputs, about, find_slot, open_loop
from orchestrator.training.fast.drive.multi_lora import MultiLora
from orchestrator.training.fast.plan import factory
from orchestrator.training.fast.step.engine import AHEAD, Engine, StepMetrics
from orchestrator.training.local import resume_local_trial, run_local_trial
from orchestrator.training.model.device import use_device

pytestmark = pytest.mark.slow

Tiny = Callable[..., SweepSpec]

PLAIN = ["scheduler.kind=none", "lora.dropout=0", "training.logging_steps=1"]
"""Both engines do the same arithmetic, and each step is seen."""


@dataclass
class Trained:
    """What one training showed."""

    folder: Path
    logs: list[dict[str, float]] = field(default_factory=list)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    """Step -> what was measured, and the norm of the update so far in the trainer's model."""
    events: list[str] = field(default_factory=list)
    batches: dict[int, list[Any]] = field(default_factory=dict)
    """Optimizer steps done -> the rows of the next, those of packed ones too: (tokens, labels but the first), each."""
    start: dict[str, torch.Tensor] = field(default_factory=dict)
    end: dict[str, torch.Tensor] = field(default_factory=dict)

    def column(self, name: str) -> list[float]:
        return [logs[name] for logs in self.logs]

    @property
    def update(self) -> torch.Tensor:
        return torch.cat([(self.end[name] - self.start[name]).flatten() for name in self.start])


def train(engine: str, folder: Path, *overrides: str, checkpoint: str | None = None) -> Trained:
    """Train on the demo by one of the engines, without the trial's records."""
    config = load_spec(DEMO, [*TINY, *PLAIN, f"training.engine={engine}", *overrides]).trial_config({})
    ground, seen = TrialInputs.of(config.base, prepare(config.data, config.base)), Trained(folder)
    use_device(1)  # threads as a trial has them
    with guarded(config.base), pytest.MonkeyPatch.context() as patched:
        seat = find_slot(config, ground)
        assert about(seat)["engine"] == engine
        loop = open_loop(config, ground, seat, folder, WriteNow())
        watch_events(loop, seen)
        watch_rows(loop.trainer, seen.batches, patched)
        seen.start = weights(loop)
        pack = MultiLora()
        pack.join(loop.train(checkpoint))
        while len(pack):
            pack.turn()
        seen.end = weights(loop)
    return seen


def weights(loop: Loop) -> dict[str, torch.Tensor]:
    """The adapter in the trainer's model, now."""
    return {name: p.detach().clone() for name, p in loop.trainer.model.named_parameters() if p.requires_grad}


def watch_events(loop: Loop, seen: Trained) -> None:
    """Keep what callbacks are told."""
    handler = loop.trainer.callback_handler
    tell = handler.call_event

    def told(event: str, args: Any, state: Any, control: Any, **values: Any) -> Any:
        is_summary = event == "on_log" and "train_runtime" in values["logs"]
        seen.events.append(f"{event} {'summary' if is_summary else state.global_step}")
        if event == "on_log" and "loss" in values["logs"]:
            seen.logs.append({"step": state.global_step, "epochs": state.epoch, **values["logs"]})
        if event == "on_evaluate":
            size = sum(float((weight - seen.start[name]).square().sum()) for name, weight in weights(loop).items())
            seen.evaluations[state.global_step] = {**loop.scores().values(), "update": math.sqrt(size)}
        return tell(event, args, state, control, **values)

    handler.call_event = told


def watch_rows(trainer: Any, batches: dict[int, list[Any]], patched: pytest.MonkeyPatch) -> None:
    """Keep the rows of each step, whichever loop makes it."""

    def keep(ids: Any, targets: Any) -> None:
        batches.setdefault(trainer.state.global_step, []).append((tuple(map(int, ids)), tuple(map(int, targets))))

    training_step, step = trainer.training_step, Engine.step

    def watched_training_step(model: Any, inputs: Any, *rest: Any) -> Any:
        if "attention_mask" in inputs:
            for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True):
                keep(ids[mask.bool()], labels[mask.bool()][1:])
        else:  # packed rows
            starts = (inputs["position_ids"][0] == 0).nonzero().flatten()[1:].cpu()
            parts = (inputs[name][0].tensor_split(starts) for name in ("input_ids", "labels"))
            for ids, labels in zip(*parts, strict=True):
                keep(ids, labels[1:])
        return training_step(model, inputs, *rest)

    def watched_step(engine: Engine, spans: Any) -> Any:
        for span in spans:
            for index in span.indices:
                ends = span.rows.sequence_ends(index)[:-1]
                parts = (np.split(values(index), ends) for values in (span.rows.ids, span.rows.targets))
                for ids, targets in zip(*parts, strict=True):
                    keep(ids, targets[:-1])
        return step(engine, spans)

    trainer.training_step = watched_training_step
    patched.setattr(Engine, "step", watched_step)


def assert_same(fast: Trained, trl: Trained, loss: float = 1e-5, update: float = 1e-5) -> None:
    """The same rows, rates and counts; losses and update within these bounds."""
    assert fast.batches == trl.batches
    for exact in ("step", "epochs", "num_tokens"):
        assert fast.column(exact) == trl.column(exact)
    assert largest(fast.column("learning_rate"), trl.column("learning_rate")) <= 1e-15
    assert largest(fast.column("loss"), trl.column("loss")) <= loss
    assert fast.column("grad_norm") == pytest.approx(trl.column("grad_norm"), rel=1e-4)
    assert fast.evaluations.keys() == trl.evaluations.keys()
    for name, bound in (("eval/loss", loss), ("eval/token_accuracy", 1e-9), ("update", loss)):
        assert largest(*([values[name] for values in each.evaluations.values()] for each in (fast, trl))) <= bound
    assert all(torch.equal(fast.start[name], start) for name, start in trl.start.items())
    assert difference(fast, trl) <= update


def largest(found: list[float], expected: list[float]) -> float:
    """Difference, at any place; NaN if there is one."""
    return float((torch.tensor(found, dtype=torch.float64) - torch.tensor(expected, dtype=torch.float64)).abs().max())


def difference(fast: Trained, trl: Trained) -> float:
    """Norm of the updates' difference, to that of the reference's update."""
    return float((fast.update - trl.update).norm() / trl.update.norm())


STEPS = 50
LONG = [f"training.steps={STEPS}", "training.eval_steps=10", "training.learning_rate=2e-4", "training.save_steps=30"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Fifty steps, two epochs, by each engine."""
    return {engine: train(engine, tmp_path_factory.mktemp(engine), *LONG) for engine in ("trl", "fast")}


def test_fifty_steps_are_those_of_sfttrainer(pair: dict[str, Trained]) -> None:
    fast, trl = pair["fast"], pair["trl"]
    assert len(fast.logs) == STEPS
    assert list(fast.evaluations) == [10, 20, 30, 40, 50]
    assert [len(rows) for rows in fast.batches.values()] == [8] * STEPS
    assert fast.batches[0] != fast.batches[25], "another order each epoch"
    assert_same(fast, trl)
    assert largest(fast.column("mean_token_accuracy"), trl.column("mean_token_accuracy")) <= 1e-7


def test_callbacks_are_told_the_same_in_the_same_order(pair: dict[str, Trained]) -> None:
    def told(trained: Trained) -> list[str]:
        # Forward, backward and update are one graph, evaluations have batches of their own.
        left_out = ("on_pre_optimizer_step", "on_optimizer_step", "on_prediction_step", "on_log summary")
        return [event for event in trained.events if not event.startswith(left_out)]

    assert told(pair["fast"]) == told(pair["trl"])


def test_a_checkpoint_holds_what_the_trainer_saves(pair: dict[str, Trained]) -> None:
    fast, trl = (pair[engine].folder / "checkpoint-30" for engine in ("fast", "trl"))
    # The tokenizer lies beside each adapter, the arguments follow from the configuration: nobody resumes from them.
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


@pytest.mark.parametrize(("saved_by", "goes_on_by"), [("trl", "fast"), ("fast", "trl")])
def test_one_engine_goes_on_from_the_others_checkpoint(
    pair: dict[str, Trained], tmp_path: Path, saved_by: str, goes_on_by: str
) -> None:
    checkpoint = str(pair[saved_by].folder / "checkpoint-30")
    resumed, whole = train(goes_on_by, tmp_path, *LONG, checkpoint=checkpoint), pair[goes_on_by]
    assert resumed.batches == {step: rows for step, rows in whole.batches.items() if step >= 30}
    assert largest(resumed.column("learning_rate"), whole.column("learning_rate")[30:]) <= 1e-15
    assert largest(resumed.column("loss"), whole.column("loss")[30:]) <= 1e-5
    for name, end in whole.end.items():
        assert (resumed.end[name] - end).norm() <= 1e-5 * end.norm(), name


IN_EIGHT_BITS = 1e-4, 1e-2
"""What a loss, and an update to its norm, may differ by: of two near numbers one may round to a byte's neighbour."""


@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "paged_adamw_8bit"])
@pytest.mark.parametrize(("saved_by", "goes_on_by"), [("trl", "fast"), ("fast", "trl")])
def test_one_engine_goes_on_from_the_others_checkpoint_of_bitsandbytes(
    tmp_path: Path, optimizer: str, saved_by: str, goes_on_by: str
) -> None:
    settings = [f"training.optimizer={optimizer}", "lora.rank=64", "training.steps=6", "training.save_steps=3"]
    train(saved_by, tmp_path / "saved", *settings)
    whole = train(goes_on_by, tmp_path / "whole", *settings)
    resumed = train(goes_on_by, tmp_path / "on", *settings, checkpoint=str(tmp_path / "saved" / "checkpoint-3"))
    loss, weight = IN_EIGHT_BITS if "8bit" in optimizer else (1e-5, 1e-5)
    assert largest(resumed.column("loss"), whole.column("loss")[3:]) <= loss
    for name, end in whole.end.items():
        assert (resumed.end[name] - end).norm() <= weight * end.norm(), name


FEW_ROWS = ["data.max_rows=80", "data.held_out={count: 40}"]
SETTINGS = {
    # 40 rows: five batches of 7 and one of 5; four of these a step, then two; two and a half epochs.
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
    "moments in eight bits": [
        "training.optimizer=adamw_8bit", "lora.rank=64", "training.weight_decay=0.1", "training.steps=8",
        "training.eval_steps=4",
    ],
    "the base not quantised, recompute, seed": [
        "base.quantization=none", "training.recompute=true", "training.seed=7", "training.steps=4",
    ],
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_few_steps_are_those_of_sfttrainer(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0
    if setting.endswith("passes"):
        monkeypatch.setattr(factory, "CPU_TOKENS", 150)
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
        assert all(len(rows) >= 5 for rows in fast.batches.values()), "several rows in each of two sequences"
    norms = fast.column("grad_norm")
    assert all(norm > 0.05 for norm in norms), "clipped where it is small"


def test_with_a_base_in_bfloat16_they_differ_by_its_rounding(tmp_path: Path) -> None:
    settings = ["base.compute_dtype=bfloat16", "training.steps=8"]
    fast, trl = (train(engine, tmp_path / engine, *settings) for engine in ("fast", "trl"))
    assert fast.batches == trl.batches
    for step, values in trl.evaluations.items():
        assert fast.evaluations[step]["eval/loss"] == pytest.approx(values["eval/loss"], rel=5e-3)
    assert difference(fast, trl) < 0.05


# What the engine does by itself


class Late:
    """Figures that come as late as they may."""

    is_ready = False

    def __init__(self, pending: Any) -> None:
        self._pending = pending

    def read(self) -> StepMetrics:
        figures: StepMetrics = self._pending.read()
        return figures


def test_figures_that_come_late_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["lora.dropout=0.1", "training.logging_steps=3", "training.eval_steps=5", "training.steps=14"]
    at_once = train("fast", tmp_path / "at_once", *settings)
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine, spans: Late(step(engine, spans)))
    late = train("fast", tmp_path / "late", *settings)
    assert late.logs == at_once.logs
    assert late.evaluations == at_once.evaluations
    assert late.events == at_once.events
    assert all(torch.equal(late.end[name], end) for name, end in at_once.end.items())


@pytest.mark.parametrize("is_late", [False, True])
def test_a_loss_that_becomes_nan_between_logs_is_caught_within_a_few_steps(
    tiny: Tiny, folder: SweepPaths, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    settings = ["training.logging_steps=1000", "training.eval_steps=10", "scheduler.kind=none", "training.steps=30"]
    step, done = Engine.step, 0

    def poisoned(engine: Engine, spans: Any) -> Any:
        nonlocal done
        done += 1
        if done == 12:
            engine.adapters.weights[0, :100] = math.nan
        return Late(step(engine, spans)) if is_late else step(engine, spans)

    monkeypatch.setattr(Engine, "step", poisoned)
    with pytest.raises(TrialError, match="loss is nan at step 12"):
        run_local_trial(tiny(*settings), folder, Witness())
    assert done <= 12 + (AHEAD if is_late else 0)
    (trial,) = read_sweep(folder.root).trials()
    assert trial.state == TrialState.FAILED
    assert "loss is nan at step 12" in (trial.error or "")
    assert trial.best is not None
    assert trial.best.step == 10
    weights = load_file(folder.trial(trial.trial_id).root / trial.best.adapter / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_trial_that_is_broken_again_and_again_is_the_undisturbed_one(tiny: Tiny, tmp_path: Path) -> None:
    """Five steps an epoch; it goes on within the first epoch, within the second, and between two."""
    spec = tiny(*FEW_ROWS, "lora.dropout=0.2", "training.logging_steps=1", "training.save_steps=2", "training.seed=3")
    whole, broken = SweepPaths(tmp_path / "whole"), SweepPaths(tmp_path / "broken")
    undisturbed = run_local_trial(spec, whole, Witness())
    assert undisturbed is not None
    assert undisturbed.engine == "fast"
    with pytest.raises(KeyboardInterrupt):
        run_local_trial(spec, broken, Witness(die_at=3))
    for saved, die_at in ((2, 7), (6, 11)):
        assert read_sweep(broken.root).trials()[0].checkpoint == f"checkpoints/checkpoint-{saved}"
        with pytest.raises(KeyboardInterrupt):
            resume_local_trial(read_sweep(broken.root), Witness(die_at=die_at))
    assert read_sweep(broken.root).trials()[0].checkpoint == "checkpoints/checkpoint-10"
    resumed = resume_local_trial(read_sweep(broken.root), Witness())
    assert resumed is not None
    assert resumed.best is not None
    assert undisturbed.best is not None
    assert resumed.best.value == undisturbed.best.value
    assert (resumed.best, resumed.tokens, resumed.step) == (undisturbed.best, undisturbed.tokens, 12)
    (one,), (other,) = points(whole), points(broken)
    assert len(one) == 12 + 3
    assert other == one
    adapters = [
        paths.trial(result.trial_id).root / resumed.best.adapter / "adapter_model.safetensors"
        for paths, result in ((whole, undisturbed), (broken, resumed))
    ]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def points(folder: SweepPaths) -> Iterator[Sequence[tuple[int, int, dict[str, float]]]]:
    for trial_id in folder.trial_ids():
        yield [(point.step, point.tokens, point.values) for point in read_metrics(folder.trial(trial_id))]


def test_fast_that_the_base_forbids_is_told_when_the_trial_begins(tiny: Tiny, folder: SweepPaths) -> None:
    reason = "training.engine: fast cannot hold base.compute_dtype float32 under precision bf16"
    with pytest.raises(TrialError, match=reason):
        run_local_trial(tiny("training.engine=fast", "training.precision=bf16"), folder, Witness())
    (trial,) = read_sweep(folder.root).trials()
    assert trial.state == TrialState.FAILED
    assert reason in (trial.error or "")


def test_a_searched_dropout_of_many_digits_is_read_back(tiny: Tiny, folder: SweepPaths) -> None:
    result = run_local_trial(tiny("training.engine=fast", "lora.dropout=0.0734521938"), folder, Witness())
    assert result is not None
    assert result.applied["lora.dropout"] == pytest.approx(0.0734521938, rel=1e-9)
