"""Trials whose figures must be the same bits alone, beside any others, evaluated at any time, and resumed."""

from pathlib import Path

import torch
from hosts import Followed, Hosted
from packed import COMMON, Trained, alone, trial
from safetensors.torch import load_file
from tiny import DEMO

from orchestrator.spec import TrialConfig, load_spec
from orchestrator.training.attempt.events import Completed, Evaluated, Logged, Saved
from orchestrator.training.attempt.recorder import TrialRecorder
from orchestrator.training.engines.trial_inputs import TrialInputs

# High rates, so that a last bit that differs is soon a digit that differs.
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
    """The watched trials under some more overrides, and each of them alone."""

    def __init__(self, inputs: TrialInputs, folder: Path, *overrides: str, gpus: float = 0) -> None:
        self.inputs = inputs
        self._overrides = overrides
        self._gpus = gpus
        self.solos = {name: alone(inputs, folder / name, self.trial(*of)) for name, of in WATCHED.items()}

    def trial(self, *overrides: str) -> TrialConfig:
        return trial(*overrides, *self._overrides)

    def host(self, folder: Path) -> Hosted:
        """A host of four slots."""
        space = "search.space={lora.rank: {choice: [1, 16]}, training.batch_size: {choice: [1, 8]}}"
        spec = load_spec(DEMO, [*COMMON, space, "search.num_trials=4", *self._overrides])
        return Hosted(folder, spec, self.inputs.data, slots=4, gpus=self._gpus)

    def assert_same_beside_others(self, folder: Path) -> None:
        """Others begin before and after, evaluate at other steps, end, and diverge; one takes another's slot."""
        hosted = self.host(folder)
        others = [self._start(hosted, name, _BESIDE[name]) for name in ("short", "wild")]
        watched = {name: self._start(hosted, name, of) for name, of in WATCHED.items()}
        hosted.follow(hosted.has_free)
        others.append(self._start(hosted, "single", _BESIDE["single"]))
        hosted.follow(hosted.has_free)
        again = self._start(hosted, "even again", WATCHED["even"])
        hosted.follow(lambda: all(each.end for each in (*others, *watched.values(), again)))
        hosted.close()
        for name, followed in watched.items():
            assert_same_bits(followed, self.solos[name])
        assert_same_bits(again, self.solos["even"])

    def assert_same_resumed(self, folder: Path, name: str) -> None:
        """Interrupted after a checkpoint, beside one trial; resumed beside two."""
        hosted = self.host(folder)
        self._start(hosted, "single", _BESIDE["single"])
        first = self._start(hosted, name, WATCHED[name])
        recorder = TrialRecorder(first.start, first.paths, hosted.spec)
        hosted.follow(lambda: first.end or any(event.step == 10 for event in first.of(Saved)))
        assert not first.end
        hosted.host.release(first.lease)
        hosted.follow(lambda: first.end)
        for event in first.events:
            recorder.record(event)
            if isinstance(event, Saved) and event.step == 10:
                break
        self._start(hosted, "short", _BESIDE["short"])
        resumed = self._start(hosted, name, WATCHED[name], again=True)
        assert resumed.start.step == 10
        hosted.follow(lambda: resumed.end)
        hosted.close()
        assert_same_bits(resumed, self.solos[name], after=10)

    def _start(self, hosted: Hosted, name: str, overrides: list[str], again: bool = False) -> Followed:
        followed = hosted.start(name, self.trial(*overrides), again)
        assert followed
        return followed


def assert_same_bits(followed: Followed, solo: Trained, after: int = 0) -> None:
    """Every figure that is reported, and the weights at the end."""
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
