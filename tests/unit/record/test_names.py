"""Names and paths in records cannot leave the sweep's folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RecordError
from orchestrator.record import SweepPaths, find_damage, read_exploit_checkpoint, read_sweep, write_info
from orchestrator.record.requests import read_request, unanswered, write_request

OUTSIDE = ["", "..", "../x", "/etc/x", "a/../../x", "a\\..\\x", "a\0"]
NOT_NAMES = [*OUTSIDE, ".", "a/b"]


def change(file: Path, path: tuple[str, ...], value: Any) -> None:
    """Change a field of a record as somebody does by hand, who removes the checksum."""
    document = json.loads(file.read_text())
    document.pop("crc32", None)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((("trial_id",), value) for value in NOT_NAMES),
        *((("best", "adapter"), value) for value in OUTSIDE),
        *((("checkpoint",), value) for value in OUTSIDE),
    ],
)
def test_a_trial_that_names_something_outside_is_passed_over(
    tmp_path: Path, make_sweep: Any, path: tuple[str, ...], value: str
) -> None:
    paths: SweepPaths = make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5)})
    change(paths.trial("a").result, path, value)
    record = read_sweep(paths.root)
    assert all(getattr(trial.best, "adapter", "") != value for trial in record.finished())
    assert all(trial.trial_id == "a" and trial.checkpoint != value for trial in record.trials())
    assert [damage.path for damage in find_damage(record)][:1] == [paths.trial("a").result]


@pytest.mark.parametrize("value", NOT_NAMES)
def test_a_sweep_whose_name_is_a_path_is_refused(tmp_path: Path, make_sweep: Any, value: str) -> None:
    paths: SweepPaths = make_sweep(tmp_path / "s", {})
    write_info(paths, read_sweep(paths.root).info)
    for file in (paths.sweep, paths.sweep_copy):
        change(file, ("name",), value)
    with pytest.raises(RecordError, match=r"sweep.*\.json: is damaged"):
        read_sweep(paths.root)


def test_a_record_in_the_folder_of_another_trial_is_passed_over(tmp_path: Path, make_sweep: Any) -> None:
    paths: SweepPaths = make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5), "b": ("COMPLETE", 0.4)})
    paths.trial("a").result.write_bytes(paths.trial("b").result.read_bytes())
    record = read_sweep(paths.root)
    assert [trial.trial_id for trial in record.finished()] == ["b"]
    assert "a/result.json: is the record of another trial, b" in str(find_damage(record)[0])


@pytest.mark.parametrize("value", [*NOT_NAMES, "other"])
def test_the_answer_to_a_request_is_written_beside_it(tmp_path: Path, make_sweep: Any, value: str) -> None:
    """The answer's file is named by the request."""
    paths: SweepPaths = make_sweep(tmp_path / "s", {"a": ("RUNNING", 0.5)})
    name = write_request(paths, "stop", trial_id="a").name
    change(paths.requests / f"{name}.json", ("name",), value)
    assert unanswered(paths) == [name]
    with pytest.raises(RecordError, match=f"{name}.json: "):
        read_request(paths, name)


@pytest.mark.parametrize("value", NOT_NAMES)
def test_a_checkpoint_that_is_passed_on_comes_from_the_sweep(tmp_path: Path, value: str) -> None:
    file = tmp_path / "checkpoint.json"
    whole = {"trial_id": "a", "checkpoint": "checkpoints/checkpoint-4", "step": 4}
    file.write_text(json.dumps(whole))
    assert read_exploit_checkpoint(file).model_dump() == whole
    file.write_text(json.dumps(whole | {"trial_id": value}))
    with pytest.raises(RecordError, match="is damaged"):
        read_exploit_checkpoint(file)
