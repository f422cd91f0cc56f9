"""Run one attempt at a trial: open its loop, train, let the best adapter answer, and report how it ended."""

import gc
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import load_peft_weights

from orchestrator.adapters.bundle import add_metrics, recover_interrupted_saves
from orchestrator.base import device_name, guarded
from orchestrator.base_size import BaseSize
from orchestrator.errors import OrchestratorError, StorageError
from orchestrator.experts import has_packed_experts
from orchestrator.record import RowScores, TrialPaths, TrialResult
from orchestrator.record.models import metric_values
from orchestrator.storage import storage_fault
from orchestrator.training.attempt.events import Answered, Completed, Failed, Left, Listener, Noted, fault_fields
from orchestrator.training.attempt.log_file import log_traceback
from orchestrator.training.attempt.reporter import Reporter
from orchestrator.training.engines.choose import EngineSlot, engine_fields, find_slot, open_loop
from orchestrator.training.engines.loop import Loop
from orchestrator.training.engines.memory_limits import MemoryLimits
from orchestrator.training.engines.position_checks import check_positions
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.fast.drive.multi_lora import MultiLora, TrialSteps
from orchestrator.training.model.device import peak_memory_gib
from orchestrator.training.model.precision import require_device
from orchestrator.training.model.rank_change import checkpoint_at_rank
from orchestrator.training.model.readback import require_applied
from orchestrator.training.model.targets import (
    expected,
    expected_extra_trainables,
    expected_modules,
    left_out_layers,
    target_warnings,
)
from orchestrator.training.questions import Questions
from orchestrator.training.write_queue import WriteQueue


class Attempt:
    """Trains one trial, and reports its progress as events."""

    def __init__(
        self,
        start: TrialResult,
        paths: TrialPaths,
        inputs: TrialInputs,
        listener: Listener,
        write_queue: WriteQueue,
        gpu_seconds: Callable[[float], float],
        limits: MemoryLimits | None,
    ) -> None:
        """
        Args:
            start: the trial so far, as at the checkpoint to continue from; `start.config` is what to train.
            paths: where adapters and checkpoints go.
            inputs: what the trial trains on.
            listener: receives the events.
            write_queue: writes the files.
            gpu_seconds: maps the seconds since the attempt began to the GPU seconds that it has used.
            limits: what has run out of memory in this process. None for a trial that shares an engine, because the
                owner of the engine then makes a smaller one.
        """
        self._start = start
        self._config = start.config
        self._paths = paths
        self._inputs = inputs
        self._listener = listener
        self._write_queue = write_queue
        self._gpu_seconds = gpu_seconds
        self._reporter = Reporter(
            start,
            paths,
            listener,
            write_queue,
            self._usage,
            inputs.tokenizer,
            inputs.data.fingerprint,
            inputs.stop_tokens,
            has_packed_experts(inputs.base),
        )
        self._probed_gib = 0.0
        self._limits = limits
        self._slot: EngineSlot | str | None = None
        self._has_engine = False
        """Whether `_slot` has been found."""
        self.ran_out = False
        """Whether the attempt has run out of GPU memory."""

    def run(self, find_slot: Callable[[], EngineSlot | str | None]) -> TrialSteps:
        """Train as a generator of steps. The last event says how the trial ended.

        Args:
            find_slot: returns its slot, or why it has none; see `engines.choose.find_slot`.

        Raises:
            StorageError: the process that records the trial is this one, and cannot write.
            BaseException: the process ends, or the generator is closed.
        """
        report = self._reporter.report
        for folder in (self._paths.adapters, self._paths.checkpoints):
            self._write_queue.do(partial(recover_interrupted_saves, folder))
        try:
            yield from self._train(find_slot())
        except StorageError:  # raised by the recorder in this process, which cannot record another event
            raise
        except OrchestratorError as error:
            report(Failed, error=error.message, remedy=error.remedy, traceback=None, cause=error.cause)
        except Exception as error:
            log_traceback()
            self.ran_out = isinstance(error, torch.OutOfMemoryError)
            if self.ran_out and (why := self._why_nothing_smaller()) is not None:
                report(
                    Failed,
                    error=f"{why}: {error}",
                    remedy="Lower data.max_length or lora.rank, set training.recompute: true, or end other processes "
                    "that hold memory of this GPU.",
                    traceback=None,
                    cause="out_of_memory",
                )
            else:
                report(Left, step=self._reporter.step, is_memory=self.ran_out, **fault_fields(error))
        except BaseException:  # Ctrl-C, or the generator is closed
            report(Left, step=self._reporter.step, lost=None)
            raise
        else:
            if self._reporter.stopped:
                report(Left, step=self._reporter.step, lost=None)
            else:
                report(Completed)

    def _why_nothing_smaller(self) -> str | None:
        """Say why a trial that is alone has failed, if it has no smaller form; None if it may have one."""
        if self._limits is None:  # the owner of the engine makes a smaller one
            return None
        if not self._has_engine:  # each smaller form has been tried already
            return "out of GPU memory before the trial had an engine"
        if self._limits.lower(self._config, self._slot):
            return None
        return "out of GPU memory with one row in a forward pass"

    def _train(self, slot: EngineSlot | str | None) -> TrialSteps:
        """Open the trial's loop, train, and release its model at the end."""
        config, limits, self._slot, self._has_engine = self._config, self._limits, slot, True
        if isinstance(slot, EngineSlot):
            self._probed_gib = slot.plan.measured_gib  # a cached engine is not probed again
        size = BaseSize.of(self._inputs.base)
        fields = engine_fields(slot) | {
            "base_gib": round(size.gib, 6),
            "base_quantized_share": round(size.quantized_share, 4),
            "data_fingerprint": self._inputs.data.fingerprint,
            "device": device_name(),
            "worker": f"{socket.gethostname()}:{os.getpid()}",
        }
        self._reporter.report(Noted, fields=fields)
        base = self._inputs.base
        require_device(config)
        modules = expected_modules(base, config.lora)
        about_base = (*target_warnings(base, config.lora), size.warning(config.base))
        about_memory = None if limits is None else limits.warning(config, slot)
        for warning in (*check_positions(config, self._inputs), *filter(None, (*about_base, about_memory))):
            self._write_queue.do(partial(self._reporter.warn, warning))
        extra = expected_extra_trainables(base, config, modules, self._inputs.tokenizer)
        wanted = expected(config, modules, extra, left_out_layers(base, modules))
        inputs, metric = self._inputs, self._start.metric
        questions = Questions(
            config.evaluation,
            inputs.data.prompts,
            inputs.tokenizer,
            inputs.stop_tokens,
            metric,
            lambda: self._listener.stopping,
        )
        micro_batch = None if limits is None else limits.micro_batch(config)
        paths = self._paths
        initial = paths.initial_adapter if paths.initial_adapter.is_dir() else None
        loop = open_loop(
            config,
            inputs,
            slot,
            paths.checkpoints,
            self._write_queue,
            questions,
            initial,
            micro_batch,
            self._reporter.note_progress,
        )
        try:
            yield from self._follow(loop, wanted, questions)
        finally:  # a remaining reference to the model must not keep its adapter's memory
            loop.trainer.model.get_base_model()._modules.clear()

    def _follow(self, loop: Loop, wanted: dict[str, Any], questions: Questions) -> TrialSteps:
        """Train; then the best adapter answers, unless each evaluation has asked.

        Args:
            loop: the trial's loop.
            wanted: the values that the live model must have, from `model.targets.expected`.
            questions: the prompts to answer.
        """
        start, reporter = self._start, self._reporter

        def scores() -> RowScores | None:
            measured = loop.scores()
            if questions.at_evaluations:
                self._report_cost(questions)
            return measured

        def read_applied() -> dict[str, Any]:
            live = loop.read_back()
            require_applied(wanted, live)
            return live

        reporter.attach(loop.trainer, scores, read_applied, loop.adapter)
        # With no step and no evaluation left, the Trainer would still do a step.
        if start.step != start.total_steps or start.lacks_evaluation:
            if start.checkpoint is None:
                yield from loop.train(None)
            else:
                folder, seed = self._paths.root / start.checkpoint, self._config.training.seed
                with checkpoint_at_rank(folder, loop.trainer, seed) as checkpoint:
                    yield from loop.train(str(checkpoint), start.lacks_evaluation)
        if questions.after_training and not reporter.stopped:
            assert reporter.best is not None
            self._write_queue.wait()  # until the best adapter is written
            folder = self._paths.adapter(reporter.best[1])
            metrics = yield from loop.answer(load_peft_weights(str(folder)))
            if metrics is None:
                reporter.stop()
                return
            self._report_cost(questions)
            self._write_queue.do(partial(self._keep_metrics, folder, metrics))
            reporter.report(Answered, values=metric_values(metrics))

    def _report_cost(self, questions: Questions) -> None:
        """Report what the answers have cost so far, in all attempts."""
        tokens = self._start.generated_tokens + questions.num_tokens
        seconds = round(self._start.generation_s + questions.seconds, 3)
        self._reporter.report(Noted, fields={"generated_tokens": tokens, "generation_s": seconds})

    def _keep_metrics(self, folder: Path, metrics: dict[str, list[float]]) -> None:
        """Add metrics to the best adapter's folder. If that fails, folder and trial are complete without them."""
        try:
            add_metrics(folder, self._start.metric, metrics)
        except OSError as error:
            if not folder.exists() or storage_fault(error):
                raise
            self._reporter.warn(
                f"{folder}: the answers are only in the trial's record; the folder cannot be rewritten: {error}"
            )

    def _usage(self, seconds: float) -> tuple[float, float]:
        return self._gpu_seconds(seconds), max(peak_memory_gib(), self._probed_gib)


def run_alone(
    start: TrialResult,
    paths: TrialPaths,
    inputs: TrialInputs,
    listener: Listener,
    write_queue: WriteQueue,
    gpus: float,
    limits: MemoryLimits,
) -> None:
    """Run a trial that has the process to itself.

    Args:
        start, paths, inputs, listener, write_queue: see `Attempt`.
        gpus: the number of GPUs that the process holds, for the count of GPU seconds.
        limits: what has run out of memory in this process.
    """
    config, driver = start.config, MultiLora(listener.on_progress)
    attempt = Attempt(start, paths, inputs, listener, write_queue, lambda seconds: gpus * seconds, limits)
    with guarded(config.base):
        driver.join(attempt.run(partial(find_slot, config, inputs, limits)))
        try:
            while len(driver):
                driver.turn()
        finally:
            driver.close()
    del attempt, driver
    gc.collect()  # what a trial that ran out of memory leaves in cycles
