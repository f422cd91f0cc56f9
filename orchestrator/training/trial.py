"""One trial, from its configuration to its result on disk."""

import os
import socket
import traceback
from pathlib import Path
from typing import Any

from peft import load_peft_weights, set_peft_model_state_dict

from orchestrator.adapters.generate import exact_match
from orchestrator.base import lease, load_tokenizer
from orchestrator.data import PreparedData, load
from orchestrator.errors import OrchestratorError, TrialError
from orchestrator.record import TrialPaths, TrialResult, TrialState, end_trial, read_result, resumable, write_record
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.tracking import Trackers, open_trackers
from orchestrator.tracking.protocol import TrialIdentity
from orchestrator.training.applied import compare, expected, expected_modules, num_expected_biases
from orchestrator.training.device import device_name, reset_peak_memory, use_device
from orchestrator.training.log_file import output_to
from orchestrator.training.loop import open_loop
from orchestrator.training.recorder import Recorder
from orchestrator.training.watcher import Watcher


def run_trial(
    config: TrialConfig,
    spec: SweepSpec,
    paths: TrialPaths,
    data_folder: Path,
    watcher: Watcher,
    *,
    sharing: int = 1,
    is_last_attempt: bool = True,
) -> TrialResult | None:
    """Run a trial to its end, from its last checkpoint if it has one.

    What libraries print meanwhile, on this process's standard output and error, goes to the trial's log.

    Args:
        config: what to train.
        spec: the sweep, for its metric, tracking and resources.
        paths: where the trial writes. A `result.json` that is there already is returned as it is.
        data_folder: tokenised rows, from `data.save`.
        watcher: follows, and may end the trial.
        sharing: trials that share this process's GPU, this one included.
        is_last_attempt: whether a fault from outside (CUDA, the disk) ends the trial, or is left for another attempt.

    Returns:
        The result, also on disk, or None if the watcher ended the trial: whoever ended it knows why, and says so.

    Raises:
        TrialError: the trial failed for good; its result is on disk as FAILED.
    """
    if paths.result.is_file():
        result = read_result(paths)
        if result.state == TrialState.FAILED:
            raise TrialError(result.error or "failed in an earlier attempt")
        return result
    write_record(paths.config, config)
    with output_to(paths.log):
        attempt = _Attempt(config, spec, paths, watcher, sharing)
        try:
            return attempt.run(data_folder)
        except OrchestratorError as error:
            attempt.fail(str(error))
            raise TrialError(error.message, error.remedy) from error
        except Exception as error:
            if _is_out_of_memory(error):  # it will come again
                message = f"out of GPU memory at batch_size={config.training.batch_size}: {error}"
                remedy = "Lower training.batch_size and raise accumulation, or set training.recompute: true."
            elif is_last_attempt:
                message, remedy = f"{type(error).__name__}: {error}", f"Its log: {paths.log}"
                traceback.print_exc()
            else:
                attempt.leave()
                raise
            attempt.fail(message)
            raise TrialError(message, remedy) from error
        except BaseException:  # Ctrl-C
            attempt.leave()
            raise


class _Attempt:
    """One go at a trial."""

    def __init__(self, config: TrialConfig, spec: SweepSpec, paths: TrialPaths, watcher: Watcher, sharing: int) -> None:
        fresh = TrialResult(
            trial_id=paths.trial_id,
            state=TrialState.RUNNING,
            config=config,
            metric=spec.search.metric,
            mode=spec.search.resolved_mode,
        )
        self._start = (resumable(paths, config) or fresh).model_copy(
            update={"worker": f"{socket.gethostname()}:{os.getpid()}"}
        )
        self._config = config
        self._spec = spec
        self._paths = paths
        self._watcher = watcher
        self._sharing = sharing
        self._trackers: Trackers | None = None
        self._recorder: Recorder | None = None
        write_record(paths.progress, self._start)

    def run(self, data_folder: Path) -> TrialResult | None:
        """Train, evaluate, answer; None if the watcher ended it."""
        config = self._config
        gpus = use_device(self._spec.resources.cpus_per_trial) / self._sharing
        data = load(data_folder)
        tokenizer = load_tokenizer(config.base)
        self._trackers = open_trackers(
            TrialIdentity(self._paths, config, self._spec.tracking, self._start.metric, self._start.step)
        )
        reset_peak_memory()
        with lease(config.base, trains_biases=config.lora.bias != "none") as base:
            self._adapt(base, tokenizer, data, gpus)
        if self._recorder is None or self._recorder.stopped:
            self.leave()
            return None
        return self._finish(self._outcome(TrialState.COMPLETE))

    def _adapt(self, base: Any, tokenizer: Any, data: PreparedData, gpus: float) -> None:
        """Train an adapter on `base`, and measure the best one by generation."""
        config, start = self._config, self._start
        modules = expected_modules(base, config.lora)
        wanted = expected(config, modules, num_expected_biases(base, config.lora, modules))
        loop, about_loop = open_loop(config, base, modules, tokenizer, data, self._paths.checkpoints, self._sharing)
        model = loop.trainer.model
        metrics = config.evaluation.metrics
        is_searched = start.metric.removeprefix("eval/") in metrics

        def generation_metrics() -> dict[str, float]:
            prompts = data.prompts[: config.evaluation.rows]
            new, batch = config.evaluation.max_new_tokens, config.training.eval_batch_size
            return {"eval/exact_match": exact_match(model, tokenizer, prompts, new, batch)}

        def evaluate() -> dict[str, float]:
            return loop.measured() | (generation_metrics() if is_searched else {})

        def read_applied() -> dict[str, Any]:
            live = loop.read_back()
            compare(wanted, live)
            return live

        assert self._trackers is not None
        recorder = self._recorder = Recorder(
            result=start.model_copy(
                update={"data_fingerprint": data.fingerprint, "device": device_name()} | about_loop
            ),
            paths=self._paths,
            trackers=self._trackers,
            watcher=self._watcher,
            gpus=gpus,
            evaluate=evaluate,
            read_applied=read_applied,
            tokenizer=tokenizer,
        )
        loop.trainer.add_callback(recorder)
        trains = start.step != start.total_steps  # the Trainer would make one step more than are left
        if trains:
            checkpoint = str(self._paths.root / start.checkpoint) if start.checkpoint else None
            loop.train(checkpoint)
        if metrics and not is_searched and not recorder.stopped:
            best = recorder.result.best
            assert best is not None
            if not trains or best.step != recorder.result.step:
                set_peft_model_state_dict(model, load_peft_weights(str(self._paths.root / best.adapter)))
            recorder.record_final(generation_metrics())

    def fail(self, error: str) -> None:
        """End the trial as FAILED."""
        self._finish(self._outcome(TrialState.FAILED, error))

    def leave(self) -> None:
        """Close what is open of a trial that was stopped or will go on later."""
        if self._paths.result.is_file():  # the driver has said why it was stopped
            ended = read_result(self._paths)
        else:
            ended = self._outcome(TrialState.RUNNING)
            write_record(self._paths.progress, ended)
        if self._trackers:
            self._trackers.finish(ended)

    def _outcome(self, state: TrialState, error: str | None = None) -> TrialResult:
        if self._recorder:
            self._recorder.close_books()
        result = self._recorder.result if self._recorder else self._start
        return result.model_copy(update={"state": state, "error": error})

    def _finish(self, result: TrialResult) -> TrialResult:
        """Close the trackers, then put the result down: once it exists, nothing of the trial is still to come."""
        if self._trackers:
            self._trackers.finish(result)
            warnings = dict.fromkeys([*result.warnings, *self._trackers.warnings])
            result = result.model_copy(update={"warnings": list(warnings)})
        return end_trial(self._paths, result)


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)
