from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record import (
    DamagedError,
    MetricPoint,
    TrialState,
    end_trial,
    find_damage,
    read_metrics,
    read_sweep,
    repair,
    write_record,
)
from orchestrator.record.checked import append_record, read_lines, read_record
from orchestrator.record.faults import read_faults

POINT = MetricPoint(step=4, tokens=40, time_s=1.0, values={"eval/loss": 0.5})


def test_every_flipped_byte_of_a_record_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    write_record(file, POINT)
    whole = file.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with suppress(DamagedError):
                assert read_record(MetricPoint, file) == POINT
    for end in range(len(whole) - 2):  # without its last line break or brace, too
        file.write_bytes(whole[:end])
        with pytest.raises(DamagedError):
            read_record(MetricPoint, file)


def test_a_record_without_its_checksum_is_read(tmp_path: Path) -> None:
    (tmp_path / "edited.json").write_text(POINT.model_dump_json())
    assert read_record(MetricPoint, tmp_path / "edited.json") == POINT


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_record(file, POINT.model_copy(update={"step": step}))
    file.write_bytes(file.read_bytes().replace(b'"step":2', b'"step":7'))
    lines = read_lines(MetricPoint, file)
    assert [point.step for point in lines.records] == [1, 3]
    assert lines.num_before == 1
    assert lines.fault == "line 2: its checksum does not match its content"


def test_a_damaged_progress_is_put_together(tmp_path: Path, make_sweep: Callable[..., Any]) -> None:
    paths = make_sweep(tmp_path / "sweep", {"a": ("RUNNING", 0.5)})
    trial = paths.trial("a")
    record = read_sweep(paths.root)
    (before,) = record.trials()
    assert before.best is not None
    write_record(trial.config, before.config)
    trial.metrics.unlink(missing_ok=True)
    append_record(trial.metrics, MetricPoint(step=before.best.step, tokens=9, time_s=2.0, values=before.best.values))
    (trial.root / before.best.adapter).mkdir(parents=True, exist_ok=True)
    trial.progress.write_text("{")
    (damage,) = [each for each in find_damage(record) if each.path == trial.progress]
    assert "`resume` writes it anew from the trial's other files" in str(damage)
    repair(record)
    (after,) = record.trials()
    assert (after.state, after.step, after.tokens) == (TrialState.RUNNING, before.best.step, 9)
    assert after.best == before.best
    assert find_damage(record) == []
    assert [fault.trial_id for fault in read_faults(paths)] == ["a"]


def test_a_trial_of_which_too_little_is_left_blocks_no_other(tmp_path: Path, make_sweep: Callable[..., Any]) -> None:
    paths = make_sweep(tmp_path / "sweep", {"a": ("COMPLETE", 0.5), "b": ("COMPLETE", 0.6)})
    trial = paths.trial("a")
    for file in (trial.config, trial.progress, trial.result):
        file.write_bytes(b"")
    record = read_sweep(paths.root)
    assert [each.trial_id for each in record.trials()] == ["b"]
    assert {damage.path for damage in find_damage(record)} >= {trial.config, trial.result}
    assert read_metrics(trial) == []


def test_a_result_that_cannot_be_written_leaves_the_progress_as_it_was(
    tmp_path: Path, make_sweep: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_sweep(tmp_path / "sweep", {"a": ("RUNNING", 0.5)})
    (trial,) = read_sweep(paths.root).trials()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("orchestrator.record.checked.write_atomic", fail)
    with pytest.raises(OSError, match="no space left"):
        end_trial(paths.trial("a"), trial.model_copy(update={"state": TrialState.COMPLETE}))
    assert read_sweep(paths.root).trials() == [trial]
