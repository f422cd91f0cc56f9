"""From the trainer's events to a trial's records: points, the best adapter, checkpoints, progress."""

import math
import shutil
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from orchestrator.adapters.bundle import save_adapter
from orchestrator.errors import TrialError
from orchestrator.record import BestPoint, MetricPoint, TrialPaths, TrialResult, write_record
from orchestrator.tracking import Trackers
from orchestrator.training.device import peak_memory_gib
from orchestrator.training.finite import require_finite
from orchestrator.training.watcher import Watcher


class Recorder(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Writes what happens. Its `result` is the trial so far; `stopped` tells whether the watcher ended it."""

    def __init__(
        self,
        result: TrialResult,
        paths: TrialPaths,
        trackers: Trackers,
        watcher: Watcher,
        gpus: float,
        evaluate: Callable[[], dict[str, float]],
        read_applied: Callable[[], dict[str, Any]],
        tokenizer: Any,
    ) -> None:
        """
        Args:
            result: the trial so far; its step, tokens and seconds are those of the checkpoint it goes on from.
            paths: where to write.
            trackers: where points go.
            watcher: who follows.
            gpus: share of GPUs held, for `gpu_seconds`.
            evaluate: values of the evaluation that has just run.
            read_applied: live values of the configured fields; raises TrialError if they differ.
            tokenizer: saved with each adapter.
        """
        self.result = result
        self.stopped = False
        self._start = result
        self._paths = paths
        self._trackers = trackers
        self._watcher = watcher
        self._gpus = gpus
        self._evaluate = evaluate
        self._read_applied = read_applied
        self._tokenizer = tokenizer
        self._began = time.monotonic()
        self._training_since: float | None = None
        self._training_s = result.tokens / result.tokens_per_second if result.tokens_per_second else 0.0
        self._unreported: MetricPoint | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._update(total_steps=state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._training_since is None:
            self._training_since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._update(step=state.global_step)
        if state.global_step == self._start.step + 1:
            self._update(applied=self._read_applied())
        if state.global_step == state.max_steps:
            control.should_evaluate = True
        if control.should_save or control.should_evaluate:  # a checkpoint's figures are those of its step
            control.should_log = True
        if not self._watcher.on_step(state.global_step, state.max_steps):
            self._stop(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:  # evaluations are recorded in on_evaluate; the rest is a summary
            return
        # Steps may still be on their way at their end; when the loss is there, they are done.
        assert self._training_since is not None
        now = time.monotonic()
        self._training_s += now - self._training_since
        self._training_since = now
        values = {f"train/{name}": logs[name] for name in ("loss", "grad_norm", "learning_rate")}
        self._count_tokens(logs["num_tokens"])
        self._record(state.global_step, values)
        # fp16's scaler meets infinite gradients while it looks for its scale, and skips those steps.
        checked = ("loss",) if args.fp16 else ("loss", "grad_norm")
        require_finite({name: logs[name] for name in checked}, state.global_step)
        if math.isfinite(logs["grad_norm"]):
            self._update(grad_norm=max(logs["grad_norm"], self.result.grad_norm or 0.0))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if self.result.grad_norm == 0.0:
            raise TrialError(f"the gradient has been zero up to step {state.global_step}: the adapter does not train")
        self._training_since = None
        self._count_tokens(metrics["eval_num_tokens"])
        values = self._evaluate()
        point = self._record(state.global_step, values)
        value = values[self.result.metric]
        require_finite({self.result.metric: value}, state.global_step)
        if self._is_better(value):
            self._keep_adapter(kwargs["model"], state.global_step, value, values)
        self._write_progress()
        self._drop_older_adapters()
        if control.should_save and not self.stopped:
            self._unreported = point  # reported once its checkpoint is complete
        else:
            self._report(point, control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._training_since = None
        self._update(checkpoint=f"checkpoints/checkpoint-{state.global_step}")
        self._write_progress()
        if self._unreported:
            self._report(self._unreported, control)

    def record_final(self, values: dict[str, float]) -> None:
        """Add what was measured with the best adapter after training."""
        assert self.result.best is not None
        self._record(self.result.step, values)
        self._update(best=self.result.best.model_copy(update={"values": self.result.best.values | values}))

    def _report(self, point: MetricPoint, control: Any) -> None:
        self._unreported = None
        if not self._watcher.on_report(point):
            self._stop(control)

    def _stop(self, control: Any) -> None:
        self.stopped = True
        control.should_training_stop = True

    def _is_better(self, value: float) -> bool:
        best = self.result.best
        return best is None or (value < best.value if self.result.mode == "min" else value > best.value)

    def _keep_adapter(self, model: Any, step: int, value: float, values: dict[str, float]) -> None:
        folder = self._paths.adapter(step)
        save_adapter(
            model, self._tokenizer, folder, self.result.config, self.result.trial_id, step, self.result.metric, value
        )
        relative = str(folder.relative_to(self._paths.root))
        self._update(best=BestPoint(value=value, step=step, values=values, adapter=relative))

    def _drop_older_adapters(self) -> None:
        """Delete all but the best, which the progress on disk must name by now."""
        assert self.result.best is not None
        best = self._paths.root / self.result.best.adapter
        for other in best.parent.iterdir():
            if other != best:
                shutil.rmtree(other)

    def _record(self, step: int, values: dict[str, float]) -> MetricPoint:
        point = MetricPoint(step=step, tokens=self.result.tokens, time_s=round(self._seconds(), 3), values=values)
        self._trackers.log(point)
        return point

    def _count_tokens(self, since_start: float) -> None:
        tokens = self._start.tokens + int(since_start)
        self._update(tokens=tokens, tokens_per_second=round(tokens / self._training_s, 1) if self._training_s else None)

    def _seconds(self) -> float:
        return self._start.seconds + time.monotonic() - self._began

    def _write_progress(self) -> None:
        self.close_books()
        write_record(self._paths.progress, self.result)

    def close_books(self) -> None:
        """Bring time, memory and warnings up to date."""
        seconds = round(self._seconds(), 3)
        probed = (self.result.memory_plan or {}).get("measured_gib", 0.0)  # an engine that stands probes only once
        self._update(
            seconds=seconds,
            gpu_seconds=round(self._start.gpu_seconds + (seconds - self._start.seconds) * self._gpus, 3),
            peak_memory_gib=max(peak_memory_gib(), probed, self._start.peak_memory_gib or 0.0),
            warnings=[*self._start.warnings, *self._trackers.warnings],
        )

    def _update(self, **values: Any) -> None:
        self.result = self.result.model_copy(update=values)
