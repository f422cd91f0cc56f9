import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RequestError
from orchestrator.record.new_sweep import claim_folder
from orchestrator.spec import SweepSpec, parse_spec


def claimed(spec: SweepSpec, source: str, name: str | None, output: str | None) -> Path:
    with claim_folder(spec, source, name, output) as paths:
        assert list(paths.root.iterdir()) == []
        return paths.root


def test_the_option_comes_before_the_experiment_and_both_before_the_default(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = parse_spec(document)
    named = parse_spec(document | {"output": {"folder": "mine", "name": "one"}})
    assert claimed(named, "x.yaml", "two", "yours") == tmp_path / "yours" / "two"
    assert claimed(named, "x.yaml", None, None) == tmp_path / "mine" / "one"
    root = claimed(plain, "some/x.y.yaml", None, None)
    assert root.parent == tmp_path / "runs"
    assert re.fullmatch(r"x\.y-\d{4}-\d{6}", root.name)
    assert not list(tmp_path.iterdir()), "no sweep has begun: nothing stays, the parents neither"


def test_an_existing_folder_is_refused(document: dict[str, Any], tmp_path: Path) -> None:
    spec = parse_spec(document)
    for name in ("sweep", "empty", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "sweep" / "sweep.json").touch()
    (tmp_path / "other" / "notes").touch()
    for name, remedy in (("sweep", "resume"), ("empty", "It is empty"), ("other", "It holds no sweep")):
        with pytest.raises(RequestError, match=rf"{name}: already exists\n.*{remedy}"):
            claimed(spec, "x.yaml", name, str(tmp_path))
        assert (tmp_path / name).is_dir()


def test_a_file_in_place_of_the_folder_is_refused(document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="is not a writable folder"):
        claimed(parse_spec(document), "x.yaml", "one", str(tmp_path / "file" / "runs"))


def test_a_folder_in_which_a_sweep_has_begun_stays(document: dict[str, Any], tmp_path: Path) -> None:
    with claim_folder(parse_spec(document), "x.yaml", "one", str(tmp_path / "runs")) as paths:
        paths.sweep.touch()
    assert paths.sweep.is_file()


def test_unnamed_sweeps_that_begin_in_one_second_get_different_folders(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped:
        @staticmethod
        def now() -> Any:
            from datetime import datetime

            return datetime(2026, 11, 30, 3, 1, 55)

    monkeypatch.setattr("orchestrator.record.new_sweep.datetime", Stopped)
    spec = parse_spec(document)
    with (
        claim_folder(spec, "base.yaml", None, str(tmp_path)) as first,
        claim_folder(spec, "base.yaml", None, str(tmp_path)) as second,
        claim_folder(spec, "base.yaml", None, str(tmp_path)) as third,
    ):
        names = [paths.root.name for paths in (first, second, third)]
    assert names == ["base-1130-030155", "base-1130-030155-2", "base-1130-030155-3"]


def test_a_name_that_another_process_takes_at_this_moment_is_refused(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, lost = Path.mkdir, []

    def lose_once(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name.startswith("base-") and not lost:
            lost.append(path)
            mkdir(path)  # by the other process, after this one has looked
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", lose_once)
    with claim_folder(parse_spec(document), "base.yaml", None, str(tmp_path)) as paths:
        assert paths.root == lost[0].with_name(f"{lost[0].name}-2")


CLAIM = """
import sys
from orchestrator.errors import RequestError
from orchestrator.record.new_sweep import claim_folder
from orchestrator.spec import load_spec
spec = load_spec(sys.argv[1], [])
print("ready", flush=True)
sys.stdin.readline()
try:
    with claim_folder(spec, "base.yaml", sys.argv[3] or None, sys.argv[2]) as paths:
        print(paths.root.name, flush=True)
        sys.stdin.readline()
        paths.sweep.touch()
except RequestError as error:
    print(error.message, flush=True)
"""


@pytest.mark.parametrize("name", ["", "one"], ids=["unnamed", "named"])
def test_processes_that_begin_at_once_never_share_a_folder(tmp_path: Path, name: str) -> None:
    """With a name, one process gets the folder and the others are refused. Without, each gets its own."""
    demo, number = Path(__file__).parents[3] / "experiments" / "demo.yaml", 6
    command = [sys.executable, "-c", CLAIM, str(demo), str(tmp_path / "runs"), name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(number)]  # type: ignore[call-overload]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        with ThreadPoolExecutor() as pool:
            lines = list(pool.map(lambda process: process.stdout.readline().strip(), processes))
    finally:
        for process in processes:
            process.communicate()
    folders = {path.name for path in (tmp_path / "runs").iterdir()}
    if name:
        refused = [line for line in lines if line != "one"]
        assert len(refused) == number - 1
        assert all(line.endswith("one: already exists") for line in refused)
        assert folders == {"one"}
    else:
        assert len(set(lines)) == number
        assert folders == set(lines)
