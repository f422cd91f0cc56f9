"""The library of priors: what a row holds, and where a search begins by it."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from orchestrator.cli import priors as command
from orchestrator.errors import RequestError
from orchestrator.priors.library import (
    PriorRow,
    add_rows,
    change_library,
    library_path,
    read_library,
    remove_rows,
    row_of,
    with_library,
    write_library,
)
from orchestrator.rate_prior import with_prior
from orchestrator.record import read_sweep, write_record
from orchestrator.spec import SweepSpec, parse_spec
from orchestrator.spec.search import RATE

Document = dict[str, Any]
SPACE = {RATE: {"loguniform": [1e-5, 1e-2]}, "lora.rank": {"choice": [8, 16, 64]}}
ROW = PriorRow(
    family="llama", width=64, data="template with loss on all", rate=1e-3, rank=16, spread=1.5, trials=4,
    sweep="first", date="2026-01-01",
)  # fmt: skip


@pytest.fixture
def row(document: Document) -> PriorRow:
    """Return a row that fits the smallest experiment."""
    from orchestrator.priors.kinship import Kin

    kin = Kin.of(parse_spec(document))
    assert kin is not None
    return ROW.model_copy(update={"family": kin.family, "width": kin.width, "data": kin.data})


def searching(document: Document, prior: Any = "auto") -> SweepSpec:
    return parse_spec(document | {"search": {"space": SPACE, "num_trials": 8, "prior": prior}})


def test_a_row_holds_the_best_values_and_how_far_good_rates_differ(
    make_sweep: Callable[..., Any], tmp_path: Path
) -> None:
    losses = {"a": ("COMPLETE", 1.0), "b": ("COMPLETE", 1.01), "c": ("COMPLETE", 3.0), "d": ("STOPPED", 0.5)}
    record = read_sweep(make_sweep(tmp_path / "s", losses).root)
    for trial in record.trials():
        rate = {"a": 1e-3, "b": 4e-3, "c": 1e-5, "d": 9e-3}[trial.trial_id]
        training = trial.config.training.model_copy(update={"learning_rate": rate})
        config = trial.config.model_copy(update={"training": training})
        write_record(record.paths.trial(trial.trial_id).result, trial.model_copy(update={"config": config}))
    found = row_of(record)
    assert (found.rate, found.rank, found.trials) == (1e-3, record.info.spec.lora.rank, 3)
    assert found.spread == pytest.approx(2.0, rel=0.01), "rates of 1e-3 and 4e-3: a factor of 2 around their mean"
    assert found.family == "llama"
    assert found.data == "template with loss on all"


def test_a_sweep_without_a_whole_trial_has_no_row(make_sweep: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no trial has run to its end"):
        row_of(read_sweep(make_sweep(tmp_path / "s", {"a": ("STOPPED", 1.0)}).root))


def test_rows_are_added_replaced_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "team" / "priors.yaml"
    assert read_library(path) == []
    other = ROW.model_copy(update={"sweep": "second"})
    write_library(path, add_rows([ROW], [other, ROW.model_copy(update={"rate": 2e-3})]))
    assert [(each.sweep, each.rate) for each in read_library(path)] == [("second", 1e-3), ("first", 2e-3)]
    assert remove_rows(read_library(path), ["second"]) == [ROW.model_copy(update={"rate": 2e-3})]
    with pytest.raises(RequestError, match="third: has no row in the library"):
        remove_rows(read_library(path), ["third"])


@pytest.mark.parametrize("text", ["a: 1", "- {family: llama}", "- [", "- {rate: -1}", "- !!python/name:os.system"])
def test_a_file_that_is_no_library_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "priors.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=r"priors\.yaml: is not a library of priors: "):
        read_library(path)


@pytest.mark.parametrize("field", ["rate", "spread"])
def test_a_row_with_an_infinite_number_is_refused(tmp_path: Path, field: str) -> None:
    path = tmp_path / "priors.yaml"
    write_library(path, [ROW.model_copy(update={field: float("inf")})])
    with pytest.raises(RequestError, match=f"is not a library of priors: {field}: .*finite"):
        read_library(path)


def test_sweeps_that_are_given_twice_have_one_row() -> None:
    assert add_rows([], [ROW, ROW]) == [ROW]


def test_changes_at_the_same_time_lose_no_row(tmp_path: Path) -> None:
    """A thread that read before another one wrote would drop its row."""
    path = tmp_path / "priors.yaml"

    def add(number: int) -> None:
        def change(rows: list[PriorRow]) -> list[PriorRow]:
            time.sleep(0.02)
            return add_rows(rows, [ROW.model_copy(update={"sweep": f"sweep{number}"})])

        change_library(path, change)

    with ThreadPoolExecutor(6) as pool:
        [*pool.map(add, range(6))]
    assert sorted(row.sweep for row in read_library(path)) == [f"sweep{number}" for number in range(6)]


def test_a_library_that_another_process_changes_for_too_long_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.priors.library.PATIENCE_S", 0.05)
    path = tmp_path / "priors.yaml"
    with FileLock(tmp_path / ".priors.yaml.lock"), pytest.raises(RequestError, match="another process is changing"):
        change_library(path, lambda rows: rows)


def test_a_linked_library_stays_a_link(tmp_path: Path) -> None:
    """The user's own path may be a link into the team's repository."""
    team, own = tmp_path / "team.yaml", tmp_path / "own.yaml"
    write_library(team, [])
    own.symlink_to(team)
    change_library(own, lambda rows: add_rows(rows, [ROW]))
    assert own.is_symlink()
    assert read_library(team) == [ROW]


def test_the_path_is_given_or_in_the_environment_or_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORCHESTRATOR_PRIORS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/config")
    assert library_path() == Path("/config/orchestrator/priors.yaml")
    monkeypatch.setenv("ORCHESTRATOR_PRIORS", "/team.yaml")
    assert library_path() == Path("/team.yaml")
    assert library_path("own.yaml") == Path("own.yaml")


def test_a_search_begins_at_the_rows_that_fit(document: Document, tmp_path: Path, row: PriorRow) -> None:
    """The mean of the rates is geometric and weighted by trials: (1e-3 * 8e-3 ** 2) ** (1 / 3) is 4e-3."""
    path = tmp_path / "priors.yaml"
    more = row.model_copy(update={"sweep": "more", "rate": 8e-3, "rank": 64, "trials": 8})
    unlike = row.model_copy(update={"sweep": "unlike", "family": "other", "trials": 99})
    write_library(path, [row, more, unlike])
    spec, said = with_library(searching(document, str(path)))
    assert isinstance(spec.search.prior, dict)
    assert spec.search.prior == {RATE: pytest.approx(4e-3), "lora.rank": 64}
    assert said == [f"search.prior: the search begins at 2 rows of {path} (first, more)"]
    assert with_library(spec) == (spec, []), "a recorded sweep keeps its prior"


def test_without_a_row_that_fits_the_search_begins_as_without_a_library(
    document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_PRIORS", str(tmp_path / "none.yaml"))
    spec, said = with_library(searching(document))
    assert spec.search.prior == {}
    assert with_prior(spec)[0].search.prior == with_prior(searching(document, {}))[0].search.prior
    assert "no row of" in said[0]
    assert "the search begins as without it" in said[0]
    with pytest.raises(RequestError, match=r"search\.prior nowhere\.yaml: there is no such file"):
        with_library(searching(document, "nowhere.yaml"))


def test_the_commands_keep_the_file(
    make_sweep: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, path = make_sweep(tmp_path / "s", {"a": ("COMPLETE", 1.0)}).root, str(tmp_path / "priors.yaml")
    command.add([str(folder)], path)
    assert "s: learning rate 0.0002, rank 16 for llama of width " in capsys.readouterr().out
    command.list_(path)
    shown = capsys.readouterr().out
    assert "llama" in shown
    command.list_(path, as_json=True)
    listed = json.loads(capsys.readouterr().out)
    assert [each["sweep"] for each in listed["rows"]] == ["s"]
    command.remove(["s"], path)
    assert read_library(Path(path)) == []
