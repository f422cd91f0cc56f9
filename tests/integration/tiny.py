"""Overrides that make the demo experiment small: few rows and few steps."""

from pathlib import Path

from orchestrator.record import MetricPoint

DEMO = Path(__file__).parents[2] / "experiments" / "demo.yaml"

TINY = [
    "data.max_rows=240",
    "data.held_out={count: 40}",
    "training.steps=12",
    "training.eval_steps=4",
    "training.save_steps=4",
    "training.logging_steps=2",
    "training.learning_rate=2e-3",
    "scheduler={kind: asha, grace_steps: 4, reduction_factor: 2}",
    "evaluation.metrics=[]",
    "tracking.tensorboard=false",
    "tracking.wandb.mode=disabled",
]


class Witness:
    """A watcher that stores what it receives. It ends the trial at `stop_at`, or interrupts the process at `die_at`."""

    def __init__(self, stop_at: int | None = None, die_at: int | None = None) -> None:
        self.points: list[MetricPoint] = []
        self.said: list[str] = []
        self._stop_at = stop_at
        self._die_at = die_at

    def on_step(self, step: int, total_steps: int) -> bool:
        if step == self._die_at:
            raise KeyboardInterrupt
        return step != self._stop_at

    def on_report(self, point: MetricPoint) -> bool:
        self.points.append(point)
        return True

    def say(self, sentence: str) -> None:
        self.said.append(sentence)
