"""Trials that share an engine on the embedded base, and what is observed of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny import DEMO, TINY
from transformers import TrainerCallback

from orchestrator.data import prepare
from orchestrator.spec import TrialConfig, load_spec
from orchestrator.training.engines.choose import EngineSlot, open_loop
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.fast.drive.joint import engine_for
from orchestrator.training.fast.drive.multi_lora import MultiLora, TrialSteps
from orchestrator.training.model.device import use_device
from orchestrator.training.write_queue import WriteNow, WriteQueue

LOSS, UPDATE = 1e-5, 1e-3
"""How much a trial beside others may differ from the same trial alone: a loss; an update, relative to its norm."""

COMMON = [
    *TINY, "scheduler.kind=none", "search.space={}", "search.tied={}", "data.max_rows=60", "data.held_out={count: 20}",
    "lora.dropout=0.1", "training.logging_steps=1", "training.save_steps=100", "training.batch_size=4",
]  # fmt: skip
"""40 rows, which are ten batches of four in each epoch."""

# Trials that are compared. Each is longer than an epoch.
A = ["lora.rank=8", "lora.alpha=16", "training.steps=14", "training.eval_steps=6", "training.seed=1"]
B = [
    "lora.rank=5", "lora.alpha=9", "lora.rslora=true", "lora.layers_to_transform=[0, 1, 3]",
    "lora.target_modules=[q_proj, up_proj, down_proj]", "training.steps=12",
    "lora.rank_pattern={q_proj: 9, 'layers.1.mlp.up_proj': 2}", "lora.alpha_pattern={'layers.3.*': 20, down_proj: 3}",
    "training.eval_steps=5", "training.seed=2", "training.batch_size=3", "training.accumulation=2",
    "training.weight_decay=0.1", "training.max_grad_norm=0.5", "training.schedule=cosine", "training.warmup=3",
]  # fmt: skip
# Trials that train beside them.
OTHER = [
    "lora.rank=16", "lora.alpha=4", "lora.alpha_pattern={v_proj: 40}", "lora.dropout=0.4",
    "lora.target_modules=[q_proj, v_proj]", "training.steps=7",
    "training.eval_steps=3", "training.seed=11", "training.batch_size=7", "training.accumulation=2",
    "training.learning_rate=5e-3", "training.weight_decay=0.3", "training.max_grad_norm=0.01",
    "training.schedule=linear", "training.warmup=2",
]  # fmt: skip
SINGLE = ["lora.rank=1", "lora.dropout=0", "training.batch_size=1", "training.steps=18", "training.eval_steps=4"]
WILD = ["lora.rank=4", "training.learning_rate=1e30", "training.max_grad_norm=0", "training.steps=9"]
LATE = ["lora.rank=12", "lora.alpha=1", "training.steps=5", "training.eval_steps=2", "training.seed=1"]


def trial(*overrides: str) -> TrialConfig:
    return load_spec(DEMO, [*COMMON, *overrides]).trial_config({})


def open_inputs(*overrides: str) -> TrialInputs:
    """Load the demo's base and rows in this process."""
    use_device(1)
    config = trial(*overrides)
    return TrialInputs.load(config.base, prepare(config.data, config.base))


@dataclass
class Trained:
    """The observations of one trial."""

    loop: Any
    start: dict[str, torch.Tensor]
    losses: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    saved: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """Step of a checkpoint -> weights and moments in the slot at that step."""
    end: dict[str, torch.Tensor] = field(default_factory=dict)
    error: Exception | None = None
    ended_at: int = 0

    @property
    def update(self) -> torch.Tensor:
        return torch.cat([(self.end[name] - start).flatten() for name, start in self.start.items()])


class Observer(TrainerCallback):  # type: ignore[misc]
    """Stores what a trial logs, evaluates and saves, and ends it at a step."""

    def __init__(self, seen: Trained, stop_at: int | None, read: Callable[[], list[torch.Tensor]]) -> None:
        self._seen = seen
        self._stop_at = stop_at
        self._read = read

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seen.ended_at = state.global_step
        if state.global_step == self._stop_at:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self._seen.losses[state.global_step] = logs["loss"]
            self._seen.norms[state.global_step] = logs["grad_norm"]
            self._seen.rates[state.global_step] = logs["learning_rate"]

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seen.evaluations[state.global_step] = self._seen.loop.scores().values()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seen.saved[state.global_step] = self._read()


class Bench:
    """An engine with several slots, and the trials in it, which are observed."""

    def __init__(self, inputs: TrialInputs, folder: Path, num_slots: int, configs: Sequence[TrialConfig]) -> None:
        self._inputs = inputs
        self._folder = folder
        self.engine, self.plan = engine_for(inputs.base, configs, inputs.train, inputs.held_out, num_slots)
        self.multi_lora = MultiLora()

    @property
    def flats(self) -> list[torch.Tensor]:
        """Weights and moments, (slots, size) each. Without moments in eight bits, which have another layout."""
        adapters = self.engine.adapters
        return [adapters.weights, *([adapters.moment1, adapters.moment2] if adapters.eight_bit is None else [])]

    def row(self, slot: int) -> list[torch.Tensor]:
        """Copy the weights and moments of a slot."""
        return [flat[slot].clone() for flat in self.flats]

    def matrices(self, loop: Any) -> list[torch.Tensor]:
        """Copy the weights and moments that belong to the trial in its slot."""
        return [matrix.clone() for flat in self.flats for matrix in loop._view.matrices(flat).values()]

    def join(
        self,
        slot: int,
        config: TrialConfig,
        checkpoint: Path | None = None,
        stop_at: int | None = None,
        write_queue: WriteQueue | None = None,
        name: str = "",
    ) -> Trained:
        """Start a trial in a slot."""
        checkpoints = self._folder / (name or str(slot))
        engine_slot = EngineSlot(slot, self.engine, self.plan)
        loop = open_loop(config, self._inputs, engine_slot, checkpoints, write_queue or WriteNow())
        seen = Trained(loop, adapter(loop))
        loop.trainer.add_callback(Observer(seen, stop_at, lambda: self.matrices(loop)))
        self.multi_lora.join(train_observed(seen, None if checkpoint is None else str(checkpoint)))
        return seen

    def turn(self, times: int) -> None:
        """Let all trials step so many times."""
        for _ in range(times):
            self.multi_lora.turn()

    def run(self) -> None:
        """Train until all trials have ended."""
        while len(self.multi_lora):
            self.multi_lora.turn()


def train_observed(seen: Trained, checkpoint: str | None) -> TrialSteps:
    """Train, and store an error instead of raising it, as an attempt does."""
    try:
        yield from seen.loop.train(checkpoint)
    except Exception as error:
        seen.error = error
    seen.end = adapter(seen.loop)


def adapter(loop: Any) -> dict[str, torch.Tensor]:
    """Copy the adapter in the trainer's model."""
    return {name: p.detach().clone() for name, p in loop.trainer.model.named_parameters() if p.requires_grad}


def train_alone(inputs: TrialInputs, folder: Path, config: TrialConfig, checkpoint: Path | None = None) -> Trained:
    """Train a trial in an engine of one slot."""
    bench = Bench(inputs, folder, 1, [config])
    seen = bench.join(0, config, checkpoint)
    bench.run()
    return seen
