"""Turn a trainer's callbacks into the trial's events: metrics, the best adapter, checkpoints."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import TrainerCallback

from orchestrator.adapters.bundle import Adapter, Origin, save_adapter
from orchestrator.errors import TrialError
from orchestrator.record import RowScores, TrialPaths, TrialResult
from orchestrator.record.checkpoints import seal_checkpoint
from orchestrator.training.attempt.events import Evaluated, Event, Listener, Logged, Noted, Saved, Stepped, Warned
from orchestrator.training.finite import require_finite
from orchestrator.training.write_queue import WriteQueue

STEP_EVERY_S = 3.0
"""Seconds after which the number of steps is reported if no metrics have been."""
SAVE_EVERY_S = 60.0
"""Seconds between checkpoints if `training.save_steps` is not set. They are written at evaluations only."""


class Reporter(TrainerCallback):  # type: ignore[misc]  # mypy skips transformers
    """Reports what happens in a trainer. Each event is emitted after the files that belong to it are written."""

    def __init__(
        self,
        start: TrialResult,
        paths: TrialPaths,
        listener: Listener,
        write_queue: WriteQueue,
        usage: Callable[[float], tuple[float, float]],
        tokenizer: Any,
        data_fingerprint: str,
        stop_tokens: list[int],
        has_packed_experts: bool = False,
    ) -> None:
        """
        Args:
            start: the trial so far; its step is that of the checkpoint to continue from.
            paths: where adapters go.
            listener: receives the events.
            write_queue: writes the files, then emits the events.
            usage: maps the seconds of this attempt to its GPU seconds and the most memory held, in GiB.
            tokenizer: saved with each adapter.
            data_fingerprint: saved with each adapter.
            stop_tokens: ids that end an answer; saved with each adapter.
            has_packed_experts: whether fused experts of the base are in 4 bits; saved with each adapter.
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
        self._write_queue = write_queue
        self._usage = usage
        self._tokenizer = tokenizer
        self._data_fingerprint = data_fingerprint
        self._stop_tokens = stop_tokens
        self._has_packed_experts = has_packed_experts
        self._began = self._saved_at = self._told_at = time.monotonic()
        self._saved_step = start.step
        self._lacks_evaluation = start.lacks_evaluation
        evaluation = start.config.evaluation
        self._answers_after_training = bool(evaluation.metrics) and not evaluation.is_measured_at_evaluations(
            start.metric
        )
        self._training_since: float | None = None
        self._training_s = 0.0
        self._grad_norm = start.grad_norm

    def attach(
        self,
        trainer: Any,
        scores: Callable[[], RowScores | None],
        read_applied: Callable[[], dict[str, Any]],
        adapter: Callable[[], Adapter],
    ) -> None:
        """Add this callback to a trainer.

        Args:
            trainer: the trainer to report on.
            scores: returns the scores of the evaluation that has just run; None if the trial was asked to end before
                all of them were measured.
            read_applied: returns the live values of the configured fields; raises TrialError if they differ.
            adapter: returns the adapter as trained up to an evaluation.
        """
        self._adapter = adapter
        self._scores = scores
        self._read_applied = read_applied
        trainer.add_callback(self)

    def stop(self) -> None:
        """Note that the trial ends here and continues later."""
        self.stopped = True

    def report(self, kind: type[Event], **values: Any) -> None:
        """Queue an event behind the files that were queued before it.

        Args:
            kind: the class of the event.
            values: its fields, except those that all events have.
        """
        seconds = time.monotonic() - self._began
        event = kind(seconds, *self._usage(seconds), **values)
        self._write_queue.do(lambda: self._listener.emit(event))

    def warn(self, warning: str) -> None:
        """Emit a warning at once. A job of the write queue calls this, before the events queued behind it."""
        self._listener.emit(Warned(0.0, 0.0, 0.0, warning))

    def note_progress(self) -> None:
        """Tell the listener that work goes on between steps."""
        self._listener.on_progress()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.note_progress()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # If the experiment gives epochs, the number of steps is known only here.
        if reason := self._start.config.training.schedule_overflow_reason(state.max_steps):
            raise TrialError(f"training.schedule: {reason}")
        self.report(Noted, fields={"total_steps": state.max_steps})

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._training_since is None:
            self._training_since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step
        if self.step == self._start.step + 1:
            self.report(Noted, fields={"applied": self._read_applied()})
        if self.step == state.max_steps:
            control.should_evaluate = True
        if self._start.config.training.save_steps is None and time.monotonic() < self._saved_at + SAVE_EVERY_S:
            control.should_save = False
        if control.should_evaluate and self._paths.pausing.is_file():
            control.should_save = True
        if self.step == state.max_steps and self._answers_after_training:  # which may be interrupted
            control.should_save = True
        if control.should_save or control.should_evaluate:  # so that a checkpoint's metrics are those of its step
            control.should_log = True
        if control.should_log:
            self._told_at = time.monotonic()
        elif time.monotonic() > self._told_at + STEP_EVERY_S:
            self._told_at = time.monotonic()
            self.report(Stepped, step=self.step)
        self._listener.on_step(self.step, state.max_steps)
        self._stop_if_asked(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:  # evaluations are reported in on_evaluate; what remains is the final summary
            return
        # A step may still run on the device at its end. Once the loss has been read, the step is done.
        assert self._training_since is not None
        now = time.monotonic()
        self._training_s += now - self._training_since
        self._training_since = now
        values = {f"train/{name}": logs[name] for name in ("loss", "grad_norm", "learning_rate")}
        tokens = int(logs["num_tokens"])
        self.report(Logged, step=state.global_step, tokens=tokens, training_s=self._training_s, values=values)
        # While fp16's scaler searches for its scale, gradients can be infinite; it skips those steps.
        checked = ("loss",) if args.fp16 else ("loss", "grad_norm")
        require_finite({name: logs[name] for name in checked}, state.global_step)
        if math.isfinite(logs["grad_norm"]):
            self._grad_norm = max(logs["grad_norm"], self._grad_norm or 0.0)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if self._grad_norm == 0.0:
            raise TrialError(f"the gradient has been zero up to step {state.global_step}: the adapter does not train")
        self._training_since = None
        scores = self._scores()
        self._lacks_evaluation = scores is None
        if scores is None:
            self._stop_if_asked(control)
            return
        values = scores.values()
        value, step = values[self._start.metric], state.global_step
        adapter = None
        if self._is_better(value):
            self.best = value, step
            adapter = str(self._paths.adapter(step).relative_to(self._paths.root))
            self._save_adapter(step, values, scores)
        tokens = int(metrics["eval_num_tokens"])
        self.report(Evaluated, step=step, tokens=tokens, values=values, adapter=adapter, saves=control.should_save)
        require_finite({self._start.metric: value}, step)
        self._stop_if_asked(control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._training_since = None
        self._saved_at, self._saved_step = time.monotonic(), state.global_step
        checkpoint = f"checkpoints/checkpoint-{state.global_step}"
        self._write_queue.do(partial(seal_checkpoint, self._paths.root / checkpoint))
        lacks = self._lacks_evaluation
        self.report(Saved, step=state.global_step, checkpoint=checkpoint, lacks_evaluation=lacks)
        self._stop_if_asked(control)

    def _stop_if_asked(self, control: Any) -> None:
        """Stop the trainer if the listener asks for it. A trial that continues later first writes a checkpoint."""
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

    def _save_adapter(self, step: int, values: dict[str, float], scores: RowScores) -> None:
        start, adapter, tokenizer = self._start, self._adapter(), self._tokenizer
        folder = self._paths.adapter(step)
        origin = Origin(
            start.config,
            start.trial_id,
            step,
            start.metric,
            values,
            self._data_fingerprint,
            self._stop_tokens,
            self._has_packed_experts,
        )
        self._write_queue.do(lambda: save_adapter(adapter, tokenizer, folder, origin, scores))
