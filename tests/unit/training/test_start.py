"""A new sweep's folder appears complete, or not at all."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.prepare import Prompt
from orchestrator.errors import RequestError
from orchestrator.record import SweepPaths, read_sweep
from orchestrator.record.new_sweep import claim_folder
from orchestrator.spec import SweepSpec, load_spec
from orchestrator.training import start
from orchestrator.training.start import start_sweep

DEMO = Path(__file__).parents[3] / "experiments" / "demo.yaml"


@pytest.fixture
def spec() -> SweepSpec:
    return load_spec(DEMO, ["data.max_rows=60", "data.held_out={count: 10}"])


def test_claimed_folder_is_used_and_one_with_a_sweep_is_refused(spec: SweepSpec, tmp_path: Path) -> None:
    with claim_folder(spec, "x.yaml", "one", str(tmp_path)) as paths:
        info = start_sweep(spec, paths)
    assert read_sweep(paths.root).info == info
    with pytest.raises(RequestError, match=r"one: already exists\n.*resume"):
        start_sweep(spec, paths)
    assert [path.name for path in tmp_path.iterdir()] == ["one"], "the second sweep leaves nothing"
    assert read_sweep(paths.root).info == info


def test_a_prompt_without_tokens_is_refused_where_it_must_be_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template may begin with the answer, and a tokenizer may have no beginning-of-text token."""
    prepare = start.prepare

    def prepared(*arguments: Any) -> Any:
        rows = prepare(*arguments)
        return replace(rows, prompts=[*rows.prompts[:3], Prompt([], "4"), *rows.prompts[4:]])

    monkeypatch.setattr(start, "prepare", prepared)
    asks = ["data.max_rows=60", "data.held_out={count: 10}", "evaluation.metrics=[exact_match]"]
    with pytest.raises(RequestError, match=r"evaluation\.metrics: a held-out row has no token before its answer"):
        start_sweep(load_spec(DEMO, asks), SweepPaths(tmp_path / "one"))
    assert start_sweep(load_spec(DEMO, [*asks, "evaluation.rows=3"]), SweepPaths(tmp_path / "two"))


@pytest.mark.parametrize("place", ["save", "write_info"])
def test_full_disk_at_the_start_leaves_nothing(
    spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(start, place, fail)
    with pytest.raises(RequestError, match=r"one: cannot be written: .*No space left on device"):
        start_sweep(spec, SweepPaths(tmp_path / "one"))
    assert list(tmp_path.iterdir()) == []
