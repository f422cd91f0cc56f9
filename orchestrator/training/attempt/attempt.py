"""One go at a trial, from its base to its last event."""

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from peft import load_peft_weights

from orchestrator.adapters.bundle import add_answers, recover_interrupted_saves
from orchestrator.adapters.generate import exact_matches
from orchestrator.adapters.stops import stop_at
from orchestrator.base import device_name, guarded
from orchestrator.errors import OrchestratorError, StorageError
from orchestrator.record import RowScores, TrialPaths, TrialResult
from orchestrator.storage import storage_fault
from orchestrator.training.attempt.events import Answered, Completed, Failed, Left, Listener, Noted, WriteQueue, lost_by
from orchestrator.training.attempt.log_file import log_traceback
from orchestrator.training.attempt.reporter import Reporter
from orchestrator.training.engines.loop import EngineSlot, Loop, TrialInputs, about, find_slot, open_loop
from orchestrator.training.fast.drive.multi_lora import MultiLora, TrialSteps
from orchestrator.training.model.device import peak_memory_gib
from orchestrator.training.model.peft_model import load_adapter_weights
from orchestrator.training.model.precision import require_device
from orchestrator.training.model.readback import require_applied
from orchestrator.training.model.targets import expected, expected_beside, expected_modules


class Attempt:
    """Trains one trial, and tells how it goes."""

    def __init__(
        self,
        start: TrialResult,
        paths: TrialPaths,
        ground: TrialInputs,
        listener: Listener,
        aside: WriteQueue,
        gpu_seconds: Callable[[float], float],
        is_alone: bool,
    ) -> None:
        """
        Args:
            start: the trial so far, as at the checkpoint that it goes on from; `start.config` is what to train.
            paths: where adapters and checkpoints go.
            ground: what it trains on.
            listener: hears of it.
            aside: has files written.
            gpu_seconds: the GPU seconds that it has had, given the seconds since it began.
            is_alone: whether no other trial can train in this process at the same time.
        """
        self._start = start
        self._config = start.config
        self._paths = paths
        self._ground = ground
        self._aside = aside
        self._gpu_seconds = gpu_seconds
        self._reporter = Reporter(
            start, paths, listener, aside, self._usage, ground.tokenizer, ground.data.fingerprint, ground.stop_tokens
        )
        self._probed_gib = 0.0
        self._is_alone = is_alone

    def run(self, find_slot: Callable[[], EngineSlot | str | None]) -> TrialSteps:
        """The trial as a pack's work. Nothing is raised but what ends the process: the last event says how it ended.

        Args:
            find_slot: its slot, or why it has none; see `loop.find_slot`.
        """
        tell = self._reporter.tell
        for folder in (self._paths.adapters, self._paths.checkpoints):
            self._aside.do(partial(recover_interrupted_saves, folder))
        try:
            yield from self._train(find_slot())
        except StorageError:  # of whoever keeps the records in this process, and cannot be told
            raise
        except OrchestratorError as error:
            tell(Failed, error=error.message, remedy=error.remedy, traceback=None, cause=error.cause)
        except Exception as error:
            if _is_out_of_memory(error) and self._is_alone:  # it will come again
                tell(
                    Failed,
                    error=f"out of GPU memory at batch_size={self._config.training.batch_size}: {error}",
                    remedy="Lower training.batch_size and raise accumulation, or set training.recompute: true.",
                    traceback=None,
                    cause="out_of_memory",
                )
            else:
                log_traceback()
                tell(Left, step=self._reporter.step, **lost_by(error))
        except BaseException:  # Ctrl-C, or its pack ends
            tell(Left, step=self._reporter.step, lost=None)
            raise
        else:
            if self._reporter.stopped:
                tell(Left, step=self._reporter.step, lost=None)
            else:
                tell(Completed)

    def _train(self, seat: EngineSlot | str | None) -> TrialSteps:
        """Open the trial's loop, and let go of its model at the end."""
        config = self._config
        if isinstance(seat, EngineSlot):
            self._probed_gib = seat.plan.measured_gib  # an engine that stands does not probe again
        fields = about(seat) | {
            "data_fingerprint": self._ground.data.fingerprint,
            "device": device_name(),
            "worker": f"{socket.gethostname()}:{os.getpid()}",
        }
        self._reporter.tell(Noted, fields=fields)
        base = self._ground.base
        require_device(config)
        modules = expected_modules(base, config.lora)
        wanted = expected(config, modules, expected_beside(base, config, modules, self._ground.tokenizer))
        loop = open_loop(config, self._ground, seat, self._paths.checkpoints, self._aside)
        try:
            yield from self._follow(loop, wanted)
        finally:  # who still names the model must not hold its adapter's memory
            loop.trainer.model.get_base_model()._modules.clear()

    def _follow(self, loop: Loop, wanted: dict[str, Any]) -> TrialSteps:
        """Train, and have the best adapter answer.

        Args:
            loop: of the trial.
            wanted: from `expected.expected`.
        """
        config, start, reporter = self._config, self._start, self._reporter

        def scores() -> RowScores:
            is_searched = start.metric.removeprefix("eval/") in config.evaluation.metrics
            return loop.scores().model_copy(update={"answers": self._answers(loop)} if is_searched else {})

        def read_applied() -> dict[str, Any]:
            live = loop.read_back()
            require_applied(wanted, live)
            return live

        reporter.attach(loop.trainer, scores, read_applied, loop.adapter)
        trains = start.step != start.total_steps  # the Trainer would make one step more than are left
        if trains:
            yield from loop.train(str(self._paths.root / start.checkpoint) if start.checkpoint else None)
        metrics = config.evaluation.metrics
        if metrics and start.metric.removeprefix("eval/") not in metrics and not reporter.stopped:
            assert reporter.best is not None
            self._aside.wait()  # until the best adapter is written
            folder = self._paths.adapter(reporter.best[1])
            load_adapter_weights(loop.trainer.model, load_peft_weights(str(folder)))
            answers = self._answers(loop)
            self._aside.do(partial(self._keep_answers, folder, answers))
            reporter.tell(Answered, values={"eval/exact_match": sum(answers) / len(answers)})

    def _keep_answers(self, folder: Path, answers: list[bool]) -> None:
        """Write into the best adapter's folder how it answers. Without, both the folder and the trial are whole."""
        try:
            add_answers(folder, self._start.metric, answers)
        except OSError as error:
            if not folder.exists() or storage_fault(error):
                raise
            self._reporter.warn(
                f"{folder}: the answers are in the record alone, for it cannot be written anew: {error}"
            )

    def _answers(self, loop: Loop) -> list[bool]:
        """Whether the adapter in the trainer's model answers the held-out prompts as wanted."""
        model, data, config = loop.trainer.model, self._ground.data, self._config
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.device.type == "cpu":  # the fast engine lays it on the host
                parameter.data = parameter.data.to(model.device)
        stop_at(model, self._ground.stop_tokens)
        prompts = data.prompts[: config.evaluation.rows]
        new, batch = config.evaluation.max_new_tokens, config.training.eval_batch_size
        return exact_matches(model, self._ground.tokenizer, prompts, new, batch)

    def _usage(self, seconds: float) -> tuple[float, float]:
        return self._gpu_seconds(seconds), max(peak_memory_gib(), self._probed_gib)


def run_alone(
    start: TrialResult,
    paths: TrialPaths,
    ground: TrialInputs,
    listener: Listener,
    aside: WriteQueue,
    gpus: float,
) -> None:
    """Run a trial that has the process to itself, which holds so many GPUs. The other arguments are `Attempt`'s."""
    config, pack = start.config, MultiLora()
    attempt = Attempt(start, paths, ground, listener, aside, lambda seconds: gpus * seconds, is_alone=True)
    with guarded(config.base):
        pack.join(attempt.run(partial(find_slot, config, ground)))
        try:
            while len(pack):
                pack.turn()
        finally:
            pack.close()


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)
