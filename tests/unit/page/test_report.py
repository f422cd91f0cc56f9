"""The report: one file without network, escaped text, readable pages of odd sweeps, Markdown and the command."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from planted import HTML, SCRIPT, plant
from typer.testing import CliRunner

from orchestrator.analysis.sweep_data import read_data
from orchestrator.cli import app
from orchestrator.deploy import open_sweep
from orchestrator.deploy.side_by_side import record_answers
from orchestrator.errors import RequestError
from orchestrator.page.figures import FIGURES
from orchestrator.page.report import _environment, html_page, markdown_page, write_report
from orchestrator.record import AnsweredPrompt, Answers, SweepPaths, TrialResult, TrialState, read_sweep, write_record
from orchestrator.record.checked import read_record
from orchestrator.spec import parse_spec


class Page(HTMLParser):
    """The text, the tags and the attributes of a page; scripts and styles are left out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self._skips = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and value]
        self._skips += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._skips -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._skips:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(*sweeps: SweepPaths) -> str:
    return html_page([read_data(read_sweep(paths.root)) for paths in sweeps])


def plots_of(page: str) -> dict[str, object]:
    (found,) = re.findall(r'<script id="plots" type="application/json">(.*?)</script>', page)
    plots = json.loads(found)
    assert isinstance(plots, dict)
    return plots


def test_the_page_holds_every_part_and_needs_no_network(tmp_path: Path) -> None:
    page = page_of(plant(tmp_path / "s", 9, failed=1))
    parsed = Page(page)
    assert set(plots_of(page)) == {f"0-{figure.name}" for figure in FIGURES}
    for part in ("Verdict", "What to try next", "Trials", "Failures", "Warnings", "How to reproduce it",
                 "Answers of the base and of the best adapter", *(figure.title for figure in FIGURES)):  # fmt: skip
        assert part in parsed.words
    assert parsed.links == []
    assert "default-src 'none'" in page
    assert page.count("<script") == 3


def test_html_in_names_and_errors_stays_text(tmp_path: Path) -> None:
    page = page_of(plant(tmp_path / HTML, 9, names=HTML, failed=1))
    parsed = Page(page)
    assert "img" not in parsed.tags
    assert page.count("</script>") == 3
    assert SCRIPT in parsed.words
    assert f"a tracker failed: {HTML}" in parsed.words
    assert f"{HTML}000" in parsed.words
    traces = json.dumps(plots_of(page))
    assert "&lt;img" in traces
    assert "<img" not in traces


def test_long_heads_may_break_and_stay_escaped() -> None:
    page = _environment().from_string("{{ name | breakable }}")
    assert page.render(name="training.learning_rate") == "training.<wbr>learning_<wbr>rate"
    assert "<img" not in page.render(name=HTML)


def test_markdown_holds_the_verdict_and_escapes_what_it_would_read(tmp_path: Path) -> None:
    text = markdown_page([read_data(read_sweep(plant(tmp_path / "s", 9, names="a|b*", failed=1).root))])
    assert "## What mattered?" in text
    assert "## How to reproduce it" in text
    assert r"a\|b\*00" in text
    assert "\\<img" in text
    assert re.search(r"(?<!\\)<img", text) is None
    head, rule, *rows = re.search(r"^\| \\# \|.*?(?=\n\n)", text, re.DOTALL | re.MULTILINE)[0].splitlines()  # type: ignore[index]
    assert len(rows) == 9
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in (head, rule, *rows)} == {len(rule.split("|")) - 1}


def test_answers_are_shown_side_by_side(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 3)
    assert "--answers 6" in Page(page_of(paths)).words
    prompts = [AnsweredPrompt(prompt="How far <b>?", expected="# 2", base="what", adapter="# 2")]
    write_record(paths.answers, Answers(trial_id="t000", step=200, prompts=prompts))
    words = Page(page_of(paths)).words
    assert "How far <b>? # 2 what # 2" in words
    assert "--answers 6" not in words


def test_several_sweeps_are_compared(tmp_path: Path) -> None:
    one, two = plant(tmp_path / "one", 6), plant(tmp_path / "two", 8, seed=5, repeats=2)
    page = page_of(one, two)
    words = Page(page).words
    assert "The sweeps side by side" in words
    values = {paths.name: read_sweep(paths.root).trials()[0].best for paths in (one, two)}
    best = min(values, key=lambda name: values[name].value)  # type: ignore[union-attr]
    assert f"Best is {best} with eval/loss" in words
    assert "two differs from one in: search.num_trials (6 / 8), search.repeats (1 / 2)." in words
    plots = plots_of(page)
    assert {name.partition("-")[0] for name in plots} == {"0", "1", "all"}
    leaders = {paths.name: read_sweep(paths.root).trials()[0].trial_id for paths in (one, two)}
    drawn = plots["all-leaders"]
    assert isinstance(drawn, dict)
    assert [trace["name"] for trace in drawn["data"]] == [f"{name}: {trial}" for name, trial in leaders.items()]


@pytest.mark.parametrize("odd", ["empty", "one", "failed", "running", "damaged", "nan", "no adapters", "early version"])
def test_odd_sweeps_give_a_readable_page(tmp_path: Path, odd: str) -> None:
    num = {"empty": 0, "one": 1}.get(odd, 6)
    paths = plant(tmp_path / "s", num, failed=6 if odd == "failed" else 0, planned=9 if odd == "running" else None)
    first = paths.trial("t000")
    expected = {
        "empty": "There is no winner: no trial has started.",
        "one": "The only trial, t000, reached eval/loss",
        "failed": "There is no winner: all 6 trials failed.",
        "running": "is the best of 6 trials so far",
        "damaged": "could not be read",
        "nan": "is the best of 6 trials",
        "no adapters": "No adapter can be recommended",
        "early version": "the records have no times",
    }[odd]
    if odd == "running":
        first.result.rename(first.progress)
        progress = read_record(TrialResult, first.progress)
        write_record(first.progress, progress.model_copy(update={"state": TrialState.RUNNING, "ended": None}))
    if odd == "damaged":
        first.result.write_text("{")
        paths.trial("t002").metrics.write_text("not json\n")
        paths.decisions.write_text('{"trial_id": 1}\n')
        paths.test.write_text("[]")
    for trial in read_sweep(paths.root).trials() if odd in ("nan", "no adapters", "early version") else []:
        files = paths.trial(trial.trial_id)
        assert trial.best is not None
        if odd == "nan" and trial.trial_id == "t000":
            nan = float("nan")
            best = trial.best.model_copy(update={"value": nan, "values": {"eval/loss": nan}})
            write_record(files.result, trial.model_copy(update={"best": best}))
            files.metrics.write_text(files.metrics.read_text().replace('"eval/loss":', '"eval/loss":"NaN","x":'))
        if odd == "no adapters":
            (files.root / trial.best.adapter / "adapter_config.json").unlink()
        if odd == "early version":
            write_record(files.result, trial.model_copy(update={"started": None, "ended": None}))
    page = page_of(paths)
    words = Page(page).words
    assert expected in words
    assert "NaN" not in json.dumps(plots_of(page))
    for question in ("How sure is the winner?", "What mattered?", "Would longer training help?", "What did it cost?"):
        assert question in words
    assert Page(markdown_page([read_data(read_sweep(paths.root))])).words
    if odd == "damaged":
        assert words.count("could not be read") == 4


def test_the_command_writes_each_format(tmp_path: Path) -> None:
    root = plant(tmp_path / "s", 6).root
    runner = CliRunner()
    done = runner.invoke(app, ["report", str(root)])
    assert done.exit_code == 0, done.output
    assert done.output.split() == [str(root / "report.html")]
    assert (root / "report.html").read_text().startswith("<!DOCTYPE html>")
    done = runner.invoke(
        app, ["report", "s", "--output", str(tmp_path), "--format", "md", "--to", str(tmp_path / "x.md")]
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "x.md").read_text().startswith("# s")
    done = runner.invoke(app, ["report", str(root), "--format", "csv"])
    assert [Path(line).name for line in done.output.split()] == [
        "trials.csv", "curves.csv", "decisions.csv", "importances.csv",
    ]  # fmt: skip


def test_open_shows_the_page_in_the_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    root = plant(tmp_path / "s", 2).root
    assert CliRunner().invoke(app, ["report", str(root), "--open"]).exit_code == 0
    assert shown == [(root / "report.html").as_uri()]


def test_sweeps_with_the_same_folder_name_are_told_apart(tmp_path: Path) -> None:
    one, two = plant(tmp_path / "a" / "demo", 3), plant(tmp_path / "b" / "demo", 4, seed=5)
    text = markdown_page([read_data(read_sweep(paths.root)) for paths in (one, two)])
    assert "b/demo differs from a/demo in: search.num\\_trials (3 / 4)." in text
    files = write_report([read_data(read_sweep(paths.root)) for paths in (one, two, one)], tmp_path / "t", "csv")
    assert len(set(files)) == 12
    assert all(file.is_relative_to(tmp_path / "t") for file in files)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    root = plant(tmp_path / "s", 2).root
    done = CliRunner().invoke(app, ["report", str(root), "--to", str(tmp_path)])
    assert isinstance(done.exception, RequestError)
    assert "cannot be written" in str(done.exception)


def test_a_damaged_file_of_metrics_is_named_whatever_it_holds(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 2)
    file = paths.trial("t000").metrics
    file.write_bytes(b"\xff\xfe\n")
    (message,) = read_data(read_sweep(paths.root)).damaged
    assert message.startswith(f"{file}: ")


def test_rows_without_prompts_are_not_to_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = plant(tmp_path / "s", 2)
    info = read_sweep(paths.root).info
    document = info.spec.model_dump(mode="json", exclude={"data": {"template"}})
    document["data"] |= {"source": str(tmp_path / "rows.jsonl"), "format": "text", "loss_on": "all"}
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    write_record(paths.sweep, info.model_copy(update={"spec": parse_spec(document)}))
    assert "--answers" not in Page(page_of(paths)).words
    assert "--answers" not in markdown_page([read_data(read_sweep(paths.root))])
    monkeypatch.setattr("orchestrator.deploy.side_by_side.load", lambda _: SimpleNamespace(prompts=[]))
    monkeypatch.setattr("orchestrator.deploy.finished.verify_adapter", lambda _: None)
    with pytest.raises(RequestError, match="its held-out rows have no prompts"):
        record_answers(open_sweep(paths.root), 2)


def test_the_command_to_reproduce_says_why_results_may_differ(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 3)
    dirty, gpu = "The git checkout had uncommitted changes (-dirty)", "training.reproducible was false: on a GPU"
    words = Page(page_of(paths)).words
    assert dirty not in words
    assert gpu in words
    info = read_sweep(paths.root).info
    write_record(paths.sweep, info.model_copy(update={"git_commit": "abc-dirty"}))
    for trial in read_sweep(paths.root).trials():
        write_record(paths.trial(trial.trial_id).result, trial.model_copy(update={"device": "cpu"}))
    words = Page(page_of(paths)).words
    assert dirty in words
    assert gpu not in words
    assert dirty in markdown_page([read_data(read_sweep(paths.root))])
