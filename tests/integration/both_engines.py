"""Train with either engine, and observe the rows, metrics and callbacks of each step."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import DEMO, TINY

from orchestrator.base import guarded
from orchestrator.data import prepare
from orchestrator.spec import load_spec
from orchestrator.training.engines.choose import engine_fields, find_slot, open_loop
from orchestrator.training.engines.loop import Loop
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.fast.drive.multi_lora import MultiLora
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.model.device import use_device
from orchestrator.training.write_queue import WriteNow

PLAIN = ["scheduler.kind=none", "lora.dropout=0", "training.logging_steps=1"]
"""Without dropout both engines do the same arithmetic; every step is logged."""


FEW_ROWS = ["data.max_rows=80", "data.held_out={count: 40}"]


@dataclass
class Trained:
    """The observations of one training."""

    folder: Path
    logs: list[dict[str, float]] = field(default_factory=list)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    """Step -> the metrics, and the norm of the update so far in the trainer's model."""
    events: list[str] = field(default_factory=list)
    batches: dict[int, list[Any]] = field(default_factory=dict)
    """Optimizer steps done -> the sequences of the next step, each as (tokens, labels without the first)."""
    start: dict[str, torch.Tensor] = field(default_factory=dict)
    end: dict[str, torch.Tensor] = field(default_factory=dict)

    def column(self, name: str) -> list[float]:
        return [logs[name] for logs in self.logs]

    @property
    def update(self) -> torch.Tensor:
        return torch.cat([(self.end[name] - self.start[name]).flatten() for name in self.start])


def train(engine: str, folder: Path, *overrides: str, checkpoint: str | None = None) -> Trained:
    """Train on the demo with one of the engines, without the trial's records."""
    config = load_spec(DEMO, [*TINY, *PLAIN, f"training.engine={engine}", *overrides]).trial_config({})
    inputs, seen = TrialInputs.load(config.base, prepare(config.data, config.base)), Trained(folder)
    use_device(1)  # as many threads as a trial has
    with guarded(config.base), pytest.MonkeyPatch.context() as patched:
        slot = find_slot(config, inputs)
        assert engine_fields(slot)["engine"] == engine
        loop = open_loop(config, inputs, slot, folder, WriteNow())
        observe_events(loop, seen)
        observe_rows(loop.trainer, seen.batches, patched)
        seen.start = weights(loop)
        driver = MultiLora()
        driver.join(loop.train(checkpoint))
        while len(driver):
            driver.turn()
        seen.end = weights(loop)
    return seen


def weights(loop: Loop) -> dict[str, torch.Tensor]:
    """Copy the adapter in the trainer's model."""
    return {name: p.detach().clone() for name, p in loop.trainer.model.named_parameters() if p.requires_grad}


def observe_events(loop: Loop, seen: Trained) -> None:
    """Store the events that callbacks receive."""
    handler = loop.trainer.callback_handler
    call_event = handler.call_event

    def observed(event: str, args: Any, state: Any, control: Any, **values: Any) -> Any:
        is_summary = event == "on_log" and "train_runtime" in values["logs"]
        seen.events.append(f"{event} {'summary' if is_summary else state.global_step}")
        if event == "on_log" and "loss" in values["logs"]:
            seen.logs.append({"step": state.global_step, "epochs": state.epoch, **values["logs"]})
        if event == "on_evaluate":
            size = sum(float((weight - seen.start[name]).square().sum()) for name, weight in weights(loop).items())
            seen.evaluations[state.global_step] = {**loop.scores().values(), "update": math.sqrt(size)}
        return call_event(event, args, state, control, **values)

    handler.call_event = observed


def observe_rows(trainer: Any, batches: dict[int, list[Any]], patched: pytest.MonkeyPatch) -> None:
    """Store the rows of each step, whichever loop makes it."""

    def keep(ids: Any, targets: Any) -> None:
        batches.setdefault(trainer.state.global_step, []).append((tuple(map(int, ids)), tuple(map(int, targets))))

    training_step, step = trainer.training_step, Engine.step

    def observed_training_step(model: Any, inputs: Any, *rest: Any) -> Any:
        if "attention_mask" in inputs:
            for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True):
                keep(ids[mask.bool()], labels[mask.bool()][1:])
        else:  # packed rows
            starts = (inputs["position_ids"][0] == 0).nonzero().flatten()[1:].cpu()
            parts = (inputs[name][0].tensor_split(starts) for name in ("input_ids", "labels"))
            for ids, labels in zip(*parts, strict=True):
                keep(ids, labels[1:])
        return training_step(model, inputs, *rest)

    def observed_step(engine: Engine, spans: Any) -> Any:
        for span in spans:
            for index in span.indices:
                ends = span.rows.sequence_ends(index)[:-1]
                parts = (np.split(values(index), ends) for values in (span.rows.ids, span.rows.targets))
                for ids, targets in zip(*parts, strict=True):
                    keep(ids, targets[:-1])
        return step(engine, spans)

    trainer.training_step = observed_training_step
    patched.setattr(Engine, "step", observed_step)


def assert_same(fast: Trained, trl: Trained, loss: float = 1e-5, update: float = 1e-5) -> None:
    """Compare: rows, rates and counts must be equal; losses and update within these bounds."""
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
    """Return the largest difference of two values in the same place; NaN if there is one."""
    return float((torch.tensor(found, dtype=torch.float64) - torch.tensor(expected, dtype=torch.float64)).abs().max())


def difference(fast: Trained, trl: Trained) -> float:
    """Return the norm of the updates' difference, relative to the norm of the reference's update."""
    return float((fast.update - trl.update).norm() / trl.update.norm())
