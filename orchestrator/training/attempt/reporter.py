"""From a trainer's events to the trial's: figures, the best adapter, checkpoints."""

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from orchestrator.adapters.bundle import Adapter, Origin, save_adapter
from orchestrator.errors import TrialError
from orchestrator.record import RowScores, TrialPaths, TrialResult
from orchestrator.training.attempt.events import Evaluated, Event, Listener, Logged, Noted, Saved, Warned, WriteQueue
from orchestrator.training.attempt.finite import require_finite

SAVE_EVERY_S = 60.0
"""Where no steps are given for it, a checkpoint is written at an evaluation, if the last is so old."""


class Reporter(TrainerCallback):  # type: ignore[misc]  # mypy skips transformers
    """Tells what happens, each thing after the files that belong to it are written."""

    def __init__(
        self,
        start: TrialResult,
        paths: TrialPaths,
        listener: Listener,
        aside: WriteQueue,
        usage: Callable[[float], tuple[float, float]],
        tokenizer: Any,
        data_fingerprint: str,
        stop_tokens: list[int],
    ) -> None:
        """
        Args:
            start: the trial so far; its step is that of the checkpoint it goes on from.
            paths: where adapters go.
            listener: hears of it.
            aside: has files written, and the listener told of them afterwards.
            usage: given the seconds of this attempt, its GPU seconds, and the most memory held, in GiB.
            tokenizer: saved with each adapter.
            data_fingerprint: told with each adapter.
            stop_tokens: ids at which answers are over, told with each adapter.
        """
        self.step = start.step
        """Steps done."""
        self.stopped = False
        """Whether the listener has ended the trial."""
        self.best = None if start.best is None else (start.best.value, start.best.step)
        """Value and step of the best evaluation."""
        self._start = start
        self._paths = paths
        self._listener = listener
        self._aside = aside
        self._usage = usage
        self._tokenizer = tokenizer
        self._data_fingerprint = data_fingerprint
        self._stop_tokens = stop_tokens
        self._began = self._saved_at = time.monotonic()
        self._saved_step = start.step
        self._training_since: float | None = None
        self._training_s = 0.0
        self._grad_norm = start.grad_norm

    def attach(
        self,
        trainer: Any,
        scores: Callable[[], RowScores],
        read_applied: Callable[[], dict[str, Any]],
        adapter: Callable[[], Adapter],
    ) -> None:
        """Hear of this trainer's events.

        Args:
            trainer: takes this as a callback.
            scores: of the evaluation that has just run.
            read_applied: live values of the configured fields; raises TrialError if they differ.
            adapter: what has been trained up to an evaluation.
        """
        self._adapter = adapter
        self._scores = scores
        self._read_applied = read_applied
        trainer.add_callback(self)

    def tell(self, kind: type[Event], **values: Any) -> None:
        """An event, after what was written before it."""
        seconds = time.monotonic() - self._began
        event = kind(seconds, *self._usage(seconds), **values)
        self._aside.do(lambda: self._listener.emit(event))

    def warn(self, warning: str) -> None:
        """Tell of what went wrong in a job that is done aside, before what is told of after it."""
        self._listener.emit(Warned(0.0, 0.0, 0.0, warning))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # If the experiment gives epochs, the number of steps is known only here.
        if reason := self._start.config.training.schedule_overflow_reason(state.max_steps):
            raise TrialError(f"training.schedule: {reason}")
        self.tell(Noted, fields={"total_steps": state.max_steps})

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._training_since is None:
            self._training_since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step
        if self.step == self._start.step + 1:
            self.tell(Noted, fields={"applied": self._read_applied()})
        if self.step == state.max_steps:
            control.should_evaluate = True
        if self._start.config.training.save_steps is None and time.monotonic() < self._saved_at + SAVE_EVERY_S:
            control.should_save = False
        if control.should_save or control.should_evaluate:  # a checkpoint's figures are those of its step
            control.should_log = True
        self._listener.on_step(self.step, state.max_steps)
        self._heed(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:  # evaluations are told of in on_evaluate; the rest is a summary
            return
        # Steps may still be on their way at their end; when the loss is there, they are done.
        assert self._training_since is not None
        now = time.monotonic()
        self._training_s += now - self._training_since
        self._training_since = now
        values = {f"train/{name}": logs[name] for name in ("loss", "grad_norm", "learning_rate")}
        tokens = int(logs["num_tokens"])
        self.tell(Logged, step=state.global_step, tokens=tokens, training_s=self._training_s, values=values)
        # fp16's scaler meets infinite gradients while it looks for its scale, and skips those steps.
        checked = ("loss",) if args.fp16 else ("loss", "grad_norm")
        require_finite({name: logs[name] for name in checked}, state.global_step)
        if math.isfinite(logs["grad_norm"]):
            self._grad_norm = max(logs["grad_norm"], self._grad_norm or 0.0)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if self._grad_norm == 0.0:
            raise TrialError(f"the gradient has been zero up to step {state.global_step}: the adapter does not train")
        self._training_since = None
        scores = self._scores()
        values = scores.values()
        value, step = values[self._start.metric], state.global_step
        adapter = None
        if self._is_better(value):
            self.best = value, step
            adapter = str(self._paths.adapter(step).relative_to(self._paths.root))
            self._keep_adapter(step, values, scores)
        tokens = int(metrics["eval_num_tokens"])
        self.tell(Evaluated, step=step, tokens=tokens, values=values, adapter=adapter, saves=control.should_save)
        require_finite({self._start.metric: value}, step)
        self._heed(control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._training_since = None
        self._saved_at, self._saved_step = time.monotonic(), state.global_step
        self.tell(Saved, step=state.global_step, checkpoint=f"checkpoints/checkpoint-{state.global_step}")
        self._heed(control)

    def _heed(self, control: Any) -> None:
        """Have the trainer stop if the listener says so; a trial that goes on later first writes a checkpoint."""
        if self._listener.stopping:
            self.stopped = True
            control.should_training_stop = True
            if self._listener.wants_checkpoint and self._saved_step < self.step:
                control.should_save = control.should_log = True

    def _is_better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        return value < self.best[0] if self._start.mode == "min" else value > self.best[0]

    def _keep_adapter(self, step: int, values: dict[str, float], scores: RowScores) -> None:
        start, adapter, tokenizer = self._start, self._adapter(), self._tokenizer
        folder = self._paths.adapter(step)
        origin = Origin(
            start.config, start.trial_id, step, start.metric, values, self._data_fingerprint, self._stop_tokens
        )
        self._aside.do(lambda: save_adapter(adapter, tokenizer, folder, origin, scores))
