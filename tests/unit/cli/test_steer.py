"""`extend --steps` while no driver runs: the command resumes the sweep itself."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import train
from orchestrator.cli.steer import extend
from orchestrator.errors import RequestError
from orchestrator.record.models import time_now
from orchestrator.record.requests import RequestAnswer, read_request, unanswered, write_answer
from tests.unit.conftest import MakeSweep


@pytest.mark.parametrize("is_accepted", [True, False])
def test_more_steps_without_a_driver_resume_the_sweep_and_say_what_came_of_it(
    is_accepted: bool,
    tmp_path: Path,
    make_sweep: MakeSweep,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5)}, num_trials=1)

    def resume(sweep: str, *_: Any, **__: Any) -> None:
        assert sweep == str(paths.root)
        (name,) = unanswered(paths)
        request = read_request(paths, name)
        assert (request.verb, request.trial_id, request.warm) == ("clone", "a", True)
        assert request.values["training.steps"] == 8
        write_answer(paths, RequestAnswer(name=name, is_accepted=is_accepted, text="so be it", answered=time_now()))

    monkeypatch.setattr(train, "resume", resume)
    if is_accepted:
        extend(f"{paths.root}/a", steps=8)
    else:
        with pytest.raises(RequestError, match="clone: refused by the driver: so be it"):
            extend(f"{paths.root}/a", steps=8)
    said = capsys.readouterr().out
    assert said.startswith("no driver is running; this command resumes the sweep, which takes the request up\n")
    assert said.endswith("so be it\n") == is_accepted
