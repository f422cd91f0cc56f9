"""Wrong commands, options and folders are refused."""

import sys
from collections.abc import Callable

import pytest

from orchestrator.cli import main
from tests.unit.wrong_calls.calls import Wrong, command, trial
from tests.unit.wrong_calls.conftest import without_work
from tests.unit.wrong_calls.test_data import DATA
from tests.unit.wrong_calls.test_experiment_files import FIELDS, FILES
from tests.unit.wrong_calls.test_search_spaces import MISUSES, SEARCHES

CALLS = [
    command("no such verb", ["swep", "x.yaml"], "swep"),
    command("no such option", ["check", "x.yaml", "--jsn"], "--jsn"),
    command("no file", ["check"], "FILE"),
    command("rows below zero", ["data", "x.yaml", "--rows", "-1"], "--rows"),
    command("tasks' folder without tasks", ["evaluate", "x", "--tasks-folder", "t"], "--tasks-folder t", "--tasks."),
    command("no such port", ["board", "sweeps/open", "--port", "70000"], "--port", "65535"),
    *(
        command(f"{verb} of no sweep", [verb, "nope"], "nope: there is no such sweep", "--output")
        for verb in ("status", "best", "resume", "audit", "board", "chat")
    ),
    command("warm start from no sweep", ["sweep", "x.yaml", "--warm-from", "nope"], "nope: there is no such sweep"),
    command("priors of no sweep", ["priors", "add", "nope", "--file", "p.yaml"], "nope: there is no such sweep"),
    command("priors that are none", ["priors", "list", "--file", "x.yaml"], "x.yaml: is not a library of priors"),
    command("sweep of another folder", ["status", "open", "--output", "nope"], "open: there is no such sweep"),
    command("damaged sweep", ["status", "sweeps/damaged"], "damaged/sweep.json", "damaged"),
    command("draws without a temperature", ["chat", "sweeps/done", "--seed", "1"], "--seed: has no effect on greedy"),
    command("prompts without answers", ["chat", "sweeps/done", "--prompts", "p.txt"], "--answers"),
    command("verify of no bundle", ["verify", "sweeps/half"], "half: has no manifest.json"),
    command("push of no bundle", ["push", "sweeps/half", "--repo", "a/b"], "half: has no manifest.json"),
    command("push to no name", ["push", "sweeps/half", "--repo", "a/b/c"], "--repo 'a/b/c'", "owner/name"),
    command("no such trial", ["stop", "sweeps/open/zzz"], "zzz: ", "sweeps/open has no such trial", "status"),
    command("a trial without its sweep", ["pause", "zzz"], "zzz: is not written as SWEEP/TRIAL"),
    command("go on with a trial of no sweep", ["go-on", "nope/zzz"], "nope: there is no such sweep"),
    command("extend by nothing", ["extend", "sweeps/open"], "give --steps N"),
    command("extend by too much", ["extend", "sweeps/open", "--steps", "9", "--trials", "9"], "give --steps N"),
    command("add nothing", ["add", "sweeps/open"], "a trial needs values", "--set"),
    command("add what is no value", ["add", "sweeps/open", "--set", "x"], "--set x: must be written"),
    command("clone of no trial", ["clone", "sweeps/open/zzz", "--warm"], "has no such trial"),
    command("best of none", ["best", "sweeps/open"], "sweeps/open: no trial has finished", "status"),
    command("audit before the end", ["audit", "sweeps/open"], "sweeps/open: the sweep has not ended", "resume"),
    command("audit of nothing", ["audit", "sweeps/done", "--trials", "0"], "--trials", "greater than or equal to 1"),
    command("chat with none", ["chat", "sweeps/open", "--prompt", "a"], "sweeps/open: no trial has finished"),
    command("export of none", ["best", "sweeps/open", "--export", "out"], "no trial has finished"),
    command("export over files", ["best", "sweeps/done", "--export", "sweeps"], "sweeps: already exists"),
    command("export over a file", ["best", "sweeps/done", "--export", "x.yaml"], "x.yaml: already exists"),
    command("export below a file", ["best", "sweeps/done", "--export", "x.yaml/a"], "x.yaml"),
    command("adapter is not whole", ["chat", "sweeps/half", "--prompt", "a"], "half", "adapter_model.safetensors"),
    command("no TensorBoard", ["board", "sweeps/open"], "sweeps/open: there are no TensorBoard files"),
    command("chat with a folder", ["chat", "sweeps"], "sweeps: contains neither a sweep", "nor an adapter"),
    command("chat with a file", ["chat", "x.yaml"], "x.yaml: there is no such sweep"),
    command("chat of no tokens", ["chat", "sweeps/done", "--max-new-tokens", "0"], "--max-new-tokens"),
    command("endless name of a sweep", ["status", "a" * 300], "a" * 300),
]

OUTPUTS = [
    trial("output of no store", ["output.folder=ftp://b/runs"], "output.folder", "ftp is not supported", "s3://"),
    command("option of no store", ["trial", "x.yaml", "--output", "ftp://b"], "ftp://b", "not supported", "s3://"),
    command("sweep to no store", ["sweep", "x.yaml", "--output", "ftp://b"], "ftp://b", "not supported", "s3://"),
    command("no Azure account", ["sweep", "x.yaml", "--output", "az://b/c"], "az://b", "AZURE_STORAGE_ACCOUNT"),
    command("folder is there", ["trial", "x.yaml", "--output", "sweeps", "--name", "open"], "open", "already exists"),
    command("sweep is there", ["sweep", "x.yaml", "--output", "sweeps", "--name", "open"], "open", "resume"),
    command("output is a file", ["trial", "x.yaml", "--output", "x.yaml"], "output x.yaml", "is not a writable folder"),
    command(
        "name leaves the folder",
        ["trial", "x.yaml", "--name", "../out", "--set", "base.pad_token=<fill>"],
        "../out",
    ),
]


@pytest.mark.parametrize("wrong", [*CALLS, *OUTPUTS], ids=lambda wrong: wrong.name.replace(" ", "-"))
def test_a_wrong_call_is_refused(wrong: Wrong, assert_refused: Callable[[Wrong], None]) -> None:
    assert_refused(wrong)


@pytest.mark.usefixtures("work")
def test_a_refused_trial_prints_what_it_does_and_not_even_an_empty_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["orchestrator", "trial", "x.yaml", "--set", "base.pad_token=<fill>"])
    with pytest.raises(SystemExit):
        main()
    printed = capfd.readouterr().out
    assert "importing libraries, reading the data" in printed
    assert without_work(printed) == ""


@pytest.mark.usefixtures("work")
def test_the_experiment_is_valid_without_what_the_tables_add(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["orchestrator", "check", "x.yaml"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    assert "# valid: 1 trial\n" in capfd.readouterr().out


@pytest.mark.usefixtures("work")
def test_a_sweep_that_may_end_itself_has_at_most_its_number_of_trials(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--set", "search.space={lora.dropout: {uniform: [0.0, 0.1]}}", "--set", "search.num_trials=20"]
    monkeypatch.setattr(sys, "argv", ["orchestrator", "check", "x.yaml", *arguments, "--set", "search.stop.unmoved=3"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    assert "# valid: at most 20 trials, as search.stop may end the sweep\n" in capfd.readouterr().out


def test_the_tables_are_not_empty_and_no_name_appears_twice() -> None:
    calls = [*CALLS, *OUTPUTS, *FILES, *FIELDS, *SEARCHES, *MISUSES, *DATA]
    assert len(calls) > 90
    assert len({wrong.name for wrong in calls}) == len(calls)
    assert all(wrong.words for wrong in calls)
