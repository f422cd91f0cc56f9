"""One trial, from its configuration to its result on disk."""

import os
import shutil
import socket
from pathlib import Path
from typing import Any

from orchestrator.base import lease, load_tokenizer
from orchestrator.data import PreparedData, load
from orchestrator.errors import TrialError
from orchestrator.record import TrialPaths, TrialResult, TrialState, read_metrics, write_record
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.tracking import Trackers, open_trackers
from orchestrator.tracking.protocol import TrialIdentity
from orchestrator.training.applied import compare, expected, expected_modules, num_expected_biases, read_back
from orchestrator.training.device import device_name, reset_peak_memory, use_device
from orchestrator.training.generate import exact_match
from orchestrator.training.log_file import output_to
from orchestrator.training.loss_meter import LossMeter
from orchestrator.training.recorder import Recorder
from orchestrator.training.trl import build_trainer
from orchestrator.training.watcher import Watcher


def run_trial(
    config: TrialConfig, spec: SweepSpec, paths: TrialPaths, data_folder: Path, watcher: Watcher
) -> TrialResult | None:
    """Run a trial to its end, from its last checkpoint if it has one.

    Args:
        config: what to train.
        spec: the sweep, for its metric, tracking and resources.
        paths: where the trial writes. A `result.json` that is there already is returned as it is.
        data_folder: tokenised rows, from `data.save`.
        watcher: follows, and may end the trial.

    Returns:
        The result, also on disk, or None if the watcher ended the trial: whoever ended it knows why, and says so.

    Raises:
        TrialError: the trial failed by a fault of its own; its result is on disk as FAILED.
    """
    if paths.result.is_file():
        return _finished(paths)
    write_record(paths.config, config)
    with output_to(paths.log):
        worker = f"{socket.gethostname()}:{os.getpid()}"
        so_far = _so_far(config, spec, paths).model_copy(update={"worker": worker})
        write_record(paths.progress, so_far)
        tracking = TrialIdentity(paths, config, spec.tracking, so_far.metric, so_far.step)
        trackers = open_trackers(tracking)
        attempt = _Attempt(config, paths, trackers, watcher, use_device(spec.resources), so_far)
        try:
            result = attempt.run(load(data_folder))
        except TrialError as error:
            _write_result(paths, attempt.outcome(TrialState.FAILED, str(error)), trackers)
            raise
        except BaseException as error:
            # Out of memory will come again; anything else (a lost node, Ctrl-C) is worth another attempt.
            if _is_out_of_memory(error):
                _write_result(paths, attempt.outcome(TrialState.FAILED, f"out of GPU memory: {error}"), trackers)
                raise TrialError(
                    f"out of GPU memory at batch_size={config.training.batch_size}: {error}",
                    "Lower training.batch_size and raise accumulation, or set training.recompute: true.",
                ) from error
            trackers.finish(attempt.outcome(TrialState.RUNNING))
            raise
        if result is None:
            so_far = attempt.outcome(TrialState.RUNNING)
            write_record(paths.progress, so_far)
            trackers.finish(so_far)
            return None
        result = _write_result(paths, result.model_copy(update={"checkpoint": None}), trackers)
        shutil.rmtree(paths.checkpoints, ignore_errors=True)
        return result


class _Attempt:
    """One go at a trial; `outcome` tells how far it came."""

    def __init__(
        self,
        config: TrialConfig,
        paths: TrialPaths,
        trackers: Trackers,
        watcher: Watcher,
        gpus: float,
        so_far: TrialResult,
    ) -> None:
        self._config = config
        self._paths = paths
        self._trackers = trackers
        self._watcher = watcher
        self._gpus = gpus
        self._so_far = so_far
        self._recorder: Recorder | None = None

    def outcome(self, state: TrialState, error: str | None = None) -> TrialResult:
        """The result so far, in this state."""
        if self._recorder:
            self._recorder.close_books()
        result = self._recorder.result if self._recorder else self._so_far
        return result.model_copy(update={"state": state, "error": error})

    def run(self, data: PreparedData) -> TrialResult | None:
        """Train, evaluate, answer; None if the watcher ended it."""
        config, so_far = self._config, self._so_far
        reset_peak_memory()
        tokenizer = load_tokenizer(config.base)
        with lease(config.base) as base:
            modules = expected_modules(base, config.lora)
            wanted = expected(config, modules, num_expected_biases(base, config.lora, modules))
            trainer = build_trainer(config, base, tokenizer, data, self._paths.checkpoints, callbacks=[])
            model = trainer.model
            meter = LossMeter(model)
            metrics = config.evaluation.metrics
            searched = so_far.metric.removeprefix("eval/")

            def generation_metrics() -> dict[str, float]:
                prompts = data.prompts[: config.evaluation.rows]
                new, batch = config.evaluation.max_new_tokens, config.training.eval_batch_size
                return {"eval/exact_match": exact_match(model, tokenizer, prompts, new, batch)}

            def evaluate() -> dict[str, float]:
                return meter.read() | (generation_metrics() if searched in metrics else {})

            def read_applied(optimizer: Any) -> dict[str, Any]:
                live = read_back(model, optimizer)
                compare(wanted, live)
                return live

            self._recorder = Recorder(
                result=so_far.model_copy(update={"data_fingerprint": data.fingerprint, "device": device_name()}),
                paths=self._paths,
                trackers=self._trackers,
                watcher=self._watcher,
                gpus=self._gpus,
                evaluate=evaluate,
                read_applied=read_applied,
                tokenizer=tokenizer,
            )
            trainer.add_callback(self._recorder)
            checkpoint = str(self._paths.root / so_far.checkpoint) if so_far.checkpoint else None
            trainer.train(resume_from_checkpoint=checkpoint)
            if self._recorder.stopped:
                return None
            if metrics and searched not in metrics:
                self._load_best(model)
                self._recorder.record_final(generation_metrics())
            meter.close()
        return self.outcome(TrialState.COMPLETE)

    def _load_best(self, model: Any) -> None:
        """Put the best adapter's weights into the live model."""
        from peft import load_peft_weights, set_peft_model_state_dict

        assert self._recorder is not None
        assert self._recorder.result.best is not None
        best = self._recorder.result.best
        if best.step != self._recorder.result.step:
            set_peft_model_state_dict(model, load_peft_weights(str(self._paths.root / best.adapter)))


def _so_far(config: TrialConfig, spec: SweepSpec, paths: TrialPaths) -> TrialResult:
    """What a checkpoint lets the trial go on from; a fresh start where there is none.

    Step, tokens and the best adapter are those at the checkpoint: what was done after it will be done again.
    """
    fresh = TrialResult(
        trial_id=paths.trial_id,
        state=TrialState.RUNNING,
        config=config,
        metric=spec.search.metric,
        mode=spec.search.resolved_mode,
    )
    if not paths.progress.is_file():
        return fresh
    progress = TrialResult.model_validate_json(paths.progress.read_text(encoding="utf-8"))
    if progress.checkpoint is None or not (paths.root / progress.checkpoint).is_dir():
        return fresh
    at_checkpoint = int(progress.checkpoint.rpartition("-")[2])
    if progress.step == at_checkpoint:
        return progress
    points = [point for point in read_metrics(paths) if point.step <= at_checkpoint]
    return progress.model_copy(update={"step": at_checkpoint, "tokens": points[-1].tokens if points else 0})


def _finished(paths: TrialPaths) -> TrialResult:
    result = TrialResult.model_validate_json(paths.result.read_text(encoding="utf-8"))
    if result.state == TrialState.FAILED:
        raise TrialError(result.error or "failed in an earlier attempt")
    return result


def _write_result(paths: TrialPaths, result: TrialResult, trackers: Trackers) -> TrialResult:
    """Close the trackers, then put the result down: once it exists, nothing of the trial is still to come."""
    trackers.finish(result)
    result = result.model_copy(update={"warnings": list(dict.fromkeys([*result.warnings, *trackers.warnings]))})
    write_record(paths.result, result)
    return result


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)
