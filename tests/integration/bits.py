"""Check that a trial's results are the same bits alone, beside other trials, and after a resume."""

from pathlib import Path

import torch
from followed_worker import FollowedTrial, FollowedWorker
from safetensors.torch import load_file
from shared_engine import COMMON, Trained, train_alone, trial
from tiny import DEMO

from orchestrator.spec import TrialConfig, load_spec
from orchestrator.training.attempt.events import Completed, Evaluated, Logged, Saved
from orchestrator.training.attempt.recorder import TrialRecorder
from orchestrator.training.engines.trial_inputs import TrialInputs

# High learning rates, so that a difference in the last bit soon grows to a visible one.
_HIGH = ["training.learning_rate=1e-2", "training.max_grad_norm=1.0", "training.save_steps=5"]
WATCHED = {
    "even": [*_HIGH, "lora.rank=8", "lora.alpha=16", "training.steps=20", "training.eval_steps=5", "training.seed=1"],
    "odd": [
        *_HIGH, "lora.rank=5", "lora.alpha=9", "training.steps=15", "training.eval_steps=4", "training.seed=2",
        "training.batch_size=3", "training.accumulation=2",
    ],
}  # fmt: skip
_BESIDE = {
    "short": ["lora.rank=16", "training.steps=7", "training.eval_steps=3", "training.batch_size=7"],
    "single": ["lora.rank=1", "lora.dropout=0", "training.batch_size=1", "training.steps=30", "training.eval_steps=4"],
    "wild": ["lora.rank=16", "training.learning_rate=1e30", "training.max_grad_norm=0", "training.steps=9"],
}


class Setting:
    """The trials in `WATCHED` under some more overrides, each of which has been trained alone too."""

    def __init__(self, inputs: TrialInputs, folder: Path, *overrides: str, gpus: float = 0) -> None:
        self.inputs = inputs
        self._overrides = overrides
        self._gpus = gpus
        self.solos = {name: train_alone(inputs, folder / name, self.trial(*of)) for name, of in WATCHED.items()}

    def trial(self, *overrides: str) -> TrialConfig:
        return trial(*overrides, *self._overrides)

    def worker(self, folder: Path) -> FollowedWorker:
        """Start a worker of four slots."""
        space = "search.space={lora.rank: {choice: [1, 16]}, training.batch_size: {choice: [1, 8]}}"
        spec = load_spec(DEMO, [*COMMON, space, "search.num_trials=4", *self._overrides])
        return FollowedWorker(folder, spec, self.inputs.data, slots=4, gpus=self._gpus)

    def assert_same_beside_others(self, folder: Path) -> None:
        """Train beside trials that begin or end at other steps, evaluate at others, and diverge; one reuses a slot."""
        worker = self.worker(folder)
        others = [self._start(worker, name, _BESIDE[name]) for name in ("short", "wild")]
        watched = {name: self._start(worker, name, of) for name, of in WATCHED.items()}
        worker.follow(worker.has_free)
        others.append(self._start(worker, "single", _BESIDE["single"]))
        worker.follow(worker.has_free)
        again = self._start(worker, "even again", WATCHED["even"])
        worker.follow(lambda: all(each.end for each in (*others, *watched.values(), again)))
        worker.close()
        for name, followed in watched.items():
            assert_same_bits(followed, self.solos[name])
        assert_same_bits(again, self.solos["even"])

    def assert_same_resumed(self, folder: Path, name: str) -> None:
        """Interrupt a trial after a checkpoint, beside one other; resume it beside two others."""
        worker = self.worker(folder)
        self._start(worker, "single", _BESIDE["single"])
        first = self._start(worker, name, WATCHED[name])
        recorder = TrialRecorder(first.start, first.paths, worker.spec)
        worker.follow(lambda: first.end or any(event.step == 10 for event in first.of(Saved)))
        assert not first.end
        worker.runtime.release(first.lease)
        worker.follow(lambda: first.end)
        for event in first.events:
            recorder.record(event)
            if isinstance(event, Saved) and event.step == 10:
                break
        self._start(worker, "short", _BESIDE["short"])
        resumed = self._start(worker, name, WATCHED[name], again=True)
        assert resumed.start.step == 10
        worker.follow(lambda: resumed.end)
        worker.close()
        assert_same_bits(resumed, self.solos[name], after=10)

    def _start(self, worker: FollowedWorker, name: str, overrides: list[str], again: bool = False) -> FollowedTrial:
        followed = worker.start(name, self.trial(*overrides), again)
        assert followed
        return followed


def assert_same_bits(followed: FollowedTrial, solo: Trained, after: int = 0) -> None:
    """Compare every reported metric, and the weights at the end, bit by bit."""
    assert isinstance(followed.end, Completed)
    assert "not_packed_reason" not in followed.fields
    logged, evaluated = followed.of(Logged), followed.of(Evaluated)
    for name, expected in (("loss", solo.losses), ("grad_norm", solo.norms)):
        found = {event.step: event.values[f"train/{name}"] for event in logged}
        assert found == {step: value for step, value in expected.items() if step > after}
    found = {event.step: event.values for event in evaluated}
    assert found == {step: values for step, values in solo.evaluations.items() if step > after}
    steps = followed.start.config.training.steps
    saved = load_file(followed.paths.checkpoints / f"checkpoint-{steps}" / "adapter_model.safetensors")
    for name, end in solo.end.items():
        assert torch.equal(saved[name.replace(".default", "")], end.cpu()), name
