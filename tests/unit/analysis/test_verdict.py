"""The verdict's sentences: right numbers where there is evidence, and `cannot be said` where there is none."""

import math
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from planted import LEARNING, STEPS, phi, plant

from orchestrator.analysis.longer import Longer, find_longer
from orchestrator.analysis.next_step import find_edges, reproduce_command, widened
from orchestrator.analysis.sweep_data import SweepData, read_data
from orchestrator.analysis.verdict import Verdict, find_verdict
from orchestrator.deploy import FinishedSweep
from orchestrator.page.report import markdown_page
from orchestrator.record import (
    BudgetSpent,
    ExperimentSource,
    RowScores,
    SearchEnded,
    SweepPaths,
    TestScore,
    TrialResult,
    TrialState,
    read_sweep,
    write_record,
)
from orchestrator.record.checked import read_record
from orchestrator.spec import SweepSpec, load_spec
from orchestrator.spec.axes import Axis
from orchestrator.spec.search import SEED

WON, SURE, MATTERED, EDGE, LONGER, COST = range(6)


def data_of(paths: SweepPaths) -> SweepData:
    return read_data(read_sweep(paths.root))


def said(verdict: Verdict, question: int) -> str:
    return " ".join(verdict.answers[question].sentences)


def change(paths: SweepPaths, name: str, **fields: Any) -> None:
    trial = paths.trial(name)
    result = read_record(TrialResult, trial.result)
    write_record(trial.result, result.model_copy(update=fields))


def test_the_winner_its_values_and_its_margin_are_named(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 12)
    verdict, best = find_verdict(data_of(paths)), read_sweep(paths.root).trials()[0]
    assert best.best is not None
    assert verdict.headline == f"{best.trial_id} is the best of 12 trials: eval/loss {best.best.value:.4g}."
    assert f"{best.trial_id} with training.learning_rate {best.config.training.learning_rate:.3g}" in said(verdict, WON)
    choice = FinishedSweep(read_sweep(paths.root)).best().recommendation
    nearest = choice.rivals[0]
    sure = said(verdict, SURE)
    assert f"{nearest.difference:+.2g} in eval/loss (95% interval {nearest.low:+.2g} to {nearest.high:+.2g})" in sure
    assert ("suffice to tell" in sure) == (not choice.tied)
    assert ("does not say how it would have ended" in sure) == (nearest.candidate.trial.state == TrialState.STOPPED)
    assert "another seed would keep this order cannot be said" in sure
    assert "How it does on new rows cannot be said" in sure


def test_a_tie_is_not_called_a_lead(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 12, stops=False)
    first, second = read_sweep(paths.root).trials()[:2]
    record = read_sweep(paths.root)
    scores = record.adapter_path(first) / "held_out.json"
    rows = RowScores.model_validate_json(scores.read_text())
    nudged = [loss * (1.02 if i % 2 else 0.985) for i, loss in enumerate(rows.losses)]
    nudged_rows = rows.model_copy(update={"losses": nudged})
    (record.adapter_path(second) / "held_out.json").write_text(nudged_rows.model_dump_json())
    sure = said(find_verdict(data_of(paths)), SURE)
    assert sure.startswith("Not very: on the 40 held-out rows 1 trial cannot be told apart from it: " + second.trial_id)


def test_test_rows_and_their_optimism_are_told(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 6)
    best = read_sweep(paths.root).trials()[0]
    assert best.best is not None
    rows = RowScores(losses=[1.0] * 20, hits=[1] * 20, tokens=[4] * 20)
    write_record(paths.test, TestScore(trial_id=best.trial_id, step=200, scores=rows, held_out={"eval/loss": 0.2}))
    assert (
        f"On 20 test rows, which no decision has seen, {best.trial_id} has loss 0.25 (95% interval 0.25 to 0.25), "
        "+0.05 against the held-out rows."
    ) in said(find_verdict(data_of(paths)), SURE)


def test_what_mattered_is_told_with_its_interval(tmp_path: Path) -> None:
    verdict = find_verdict(data_of(plant(tmp_path / "s", 24)))
    first = verdict.importances.fields[0]
    mattered = said(verdict, MATTERED)
    assert mattered.startswith(f"training.learning_rate: {first.share:.0%} of the importance (95% interval ")
    assert "changes eval/loss by -" in mattered
    assert "no effect can be shown of" in mattered
    assert "8 trials stopped early and count with the loss forecast for the end." in mattered


def test_with_few_trials_what_mattered_cannot_be_said(tmp_path: Path) -> None:
    verdict = find_verdict(data_of(plant(tmp_path / "s", 4)))
    assert said(verdict, MATTERED) == "Cannot be said: 4 of the trials have a value, and at least 6 are needed."


def test_costs_are_the_sums_of_the_records(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 6, failed=1)
    trials = read_sweep(paths.root).trials()
    cost = said(find_verdict(data_of(paths)), COST)
    hours = sum(trial.gpu_seconds for trial in trials) / 3600
    assert cost.startswith(
        f"{hours:.3g} GPU-hours, {sum(trial.tokens for trial in trials):,} tokens and 1m32s of trials'"
    )
    assert "on NVIDIA H200, 40s from start to end." in cost
    assert "2 trials were stopped early; 23% of all planned steps were skipped." in cost
    assert "That saved about 28,000 tokens and 28s of trials' work: an estimate" in cost
    assert "of the work went into trials that failed." in cost


def test_longer_helps_a_curve_that_still_falls_and_not_one_that_rises(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 12, stops=False)
    falling = find_longer(data_of(paths))
    assert isinstance(falling, Longer)
    best = read_sweep(paths.root).trials()[0]
    planted = LEARNING * phi(STEPS, best.config.varied) * (1 - 2**-0.3)
    assert falling.low < falling.loss * math.exp(-planted) < falling.high
    assert falling.forecast < falling.loss * 0.99
    word = "Probably" if falling.chance >= 0.8 else "Perhaps"
    assert said(find_verdict(data_of(paths)), LONGER).startswith(f"{word}: with 400 steps instead of 200")
    lines = paths.trial(best.trial_id).metrics.read_text().splitlines()
    at_100 = yaml.safe_load(lines[4])["values"]["eval/loss"]
    losses = [str(yaml.safe_load(line)["values"]["eval/loss"]) for line in lines]
    for i in range(5, len(lines)):
        lines[i] = lines[i].replace(losses[i], str(at_100 * (1 + i / 50)))
    paths.trial(best.trial_id).metrics.write_text("\n".join(lines) + "\n")
    assert best.best is not None
    change(paths, best.trial_id, best=best.best.model_copy(update={"value": at_100 * 0.5}))
    told = said(find_verdict(data_of(paths)), LONGER)
    assert told.startswith("No: the leader's loss was lowest at step 100 of 200")
    assert told.endswith("it overfits.")


def test_whether_longer_helps_cannot_be_said_of_a_stopped_leader(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 6)
    best = read_sweep(paths.root).trials()[0]
    change(paths, best.trial_id, state=TrialState.STOPPED, step=100)
    told = said(find_verdict(data_of(paths)), LONGER)
    assert told == f"Cannot be said: the leader, {best.trial_id}, was itself stopped early, at step 100."


def test_a_winner_at_the_edge_leads_to_a_wider_search(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 24, effect=2.0)
    verdict = find_verdict(data_of(paths))
    assert [(edge.field, edge.side) for edge in verdict.edges][:1] == [("training.learning_rate", "highest")]
    assert "training.learning_rate" in said(verdict, EDGE)
    assert "loguniform: [0.0001, 0.04]" in verdict.next_steps[0].command


def test_an_inner_winner_touches_no_edge(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 6)
    best = read_sweep(paths.root).trials()[0]
    inner = {"training.learning_rate": 1e-3, "lora.rank": 8, "lora.dropout": 0.05}
    change(paths, best.trial_id, config=read_sweep(paths.root).info.spec.trial_config(inner))
    data = data_of(paths)
    assert data.choice is not None
    assert not data.choice.recommendation.tied
    assert find_edges(data) == []


@pytest.mark.parametrize(
    ("axis", "side", "expected"),
    [
        ({"loguniform": [1e-4, 1e-2]}, "highest", {"loguniform": [1e-4, 0.04]}),
        ({"loguniform": [1e-4, 1e-2]}, "lowest", {"loguniform": [2.5e-5, 1e-2]}),
        ({"choice": [8, 16, 32]}, "highest", {"choice": [8, 16, 32, 64]}),
        ({"choice": [8, 16, 32]}, "lowest", {"choice": [4, 8, 16, 32]}),
        ({"choice": [1, 2]}, "lowest", None),
        ({"uniform": [0.0, 0.1]}, "lowest", None),
        ({"uniform": [0.0, 0.1]}, "highest", {"uniform": [0.0, 0.2]}),
        ({"choice": [0.0, 0.1]}, "lowest", None),
    ],
)
def test_a_range_is_widened_beyond_its_edge(axis: Any, side: str, expected: Any) -> None:
    assert widened(Axis.model_validate(axis), side) == expected


def test_every_command_is_one_that_the_project_takes(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 24, effect=2.0)
    info = read_sweep(paths.root).info
    file = tmp_path / "my experiment.yaml"
    file.write_text(yaml.safe_dump(info.spec.model_dump(mode="json", exclude={"search": {"mode"}})))
    source = ExperimentSource(file=str(file), overrides=["lora.bias=none"], folder=str(tmp_path))
    write_record(paths.sweep, info.model_copy(update={"source": source}))
    steps = find_verdict(data_of(paths)).next_steps
    commands = [shlex.split(step.command) for step in steps]
    assert {command[1] for command in commands} >= {"sweep", "trial", "evaluate"}
    for command in commands:
        assert command[0] == "orchestrator"
        if command[1] in ("sweep", "trial"):
            sets = [word for before, word in pairwise(command) if before == "--set"]
            spec = load_spec(command[2], sets)
            if command[1] == "trial":
                best = read_sweep(paths.root).trials()[0].config
                assert spec.training.steps == 2 * STEPS
                assert spec.training.learning_rate == best.training.learning_rate
                assert spec.lora.rank == best.lora.rank
            else:
                assert spec.lora.bias == "none"


@pytest.mark.parametrize(
    ("num", "failed", "headline"),
    [
        (0, 0, "There is no winner: no trial has started."),
        (1, 1, "There is no winner: the only one of 1 trial failed."),
        (5, 5, "There is no winner: all 5 trials failed."),
    ],
)
def test_sweeps_without_a_winner_say_so(tmp_path: Path, num: int, failed: int, headline: str) -> None:
    verdict = find_verdict(data_of(plant(tmp_path / "s", num, failed=failed)))
    assert verdict.headline == headline
    for question in (WON, SURE, MATTERED, EDGE, LONGER):
        assert said(verdict, question).startswith("Cannot be said: "), question
    if failed:
        assert "lower learning rate" in verdict.next_steps[0].why


def test_a_running_sweep_is_told_as_it_stands(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 6, planned=10)
    verdict = find_verdict(data_of(paths))
    assert "is the best of 6 trials so far" in verdict.headline
    assert verdict.next_steps[0].command == f"orchestrator resume {paths.root}"
    assert verdict.next_steps[0].why.startswith("4 trials have not ended")


def test_a_sweep_that_has_ended_itself_is_over(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 6, planned=10, effect=0.0)
    ended = SearchEnded(rule="unmoved", num_ended=6, leader="t000", metric="eval/loss", best=0.5, unmoved=3)
    write_record(paths.search_ended, ended)
    verdict = find_verdict(data_of(paths))
    assert "is the best of 6 trials:" in verdict.headline
    assert said(verdict, COST).endswith(f"The sweep ended early: {ended}.")
    commands = [step.command for step in verdict.next_steps]
    assert f"orchestrator resume {paths.root}" not in commands
    assert f"orchestrator resume {paths.root} --trials 12" in commands


def test_one_trial_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    verdict = find_verdict(data_of(plant(tmp_path / "s", 1)))
    assert verdict.headline.startswith("The only trial, t000, reached eval/loss")
    assert said(verdict, SURE).startswith("Cannot be said: no other trial has finished")


def write_experiment(paths: SweepPaths, file: Path, document: dict[str, Any], overrides: list[str]) -> None:
    """Let the sweep be one of this experiment file, with the trials that it has."""
    file.write_text(yaml.safe_dump(document))
    spec, record = load_spec(file, overrides, file.parent), read_sweep(paths.root)
    source = ExperimentSource(file=str(file), overrides=overrides, folder=str(file.parent))
    write_record(paths.sweep, record.info.model_copy(update={"spec": spec, "source": source}))
    for trial in record.trials():
        values = {name: trial.config.varied[name] for name in spec.search.space}
        change(paths, trial.trial_id, config=spec.trial_config(values))


def document_of(paths: SweepPaths) -> dict[str, Any]:
    return read_sweep(paths.root).info.spec.model_dump(mode="json", exclude={"search": {"mode"}})


def loaded(command: str) -> SweepSpec:
    words = shlex.split(command)
    return load_spec(words[2], [word for before, word in pairwise(words) if before == "--set"])


def test_the_longer_trial_needs_nothing_of_the_search_and_stretches_the_schedule(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 12, stops=False)
    document = document_of(paths)
    document["search"]["algorithm"] = "optuna"
    document["training"] |= {"steps": None, "epochs": 2.5, "schedule": "constant_with_warmup", "warmup": 2}
    document["output"]["name"] = "mine"
    write_experiment(paths, tmp_path / "x.yaml", document, ["search.num_trials=12"])
    (command,) = [step.command for step in find_verdict(data_of(paths)).next_steps if " trial " in step.command]
    spec, leader = loaded(command), read_sweep(paths.root).trials()[0].config
    assert (spec.training.steps, spec.training.epochs, spec.training.warmup) == (2 * STEPS, None, 4)
    assert spec.training.learning_rate == leader.training.learning_rate
    assert spec.search.metric == "eval/loss"
    assert spec.output.name is None


def test_commands_start_where_the_paths_of_overrides_do_and_take_a_new_folder(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 12)
    document = document_of(paths)
    document["output"]["name"] = "mine"
    write_experiment(paths, tmp_path / "x.yaml", document, ["data.source=embedded"])
    command = reproduce_command(data_of(paths))
    place, _, rest = command.partition(" && ")
    assert place == f"cd {tmp_path}"
    assert loaded(rest).output.name is None


def test_other_seeds_are_not_advised_where_they_are_refused(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 6, stops=False)
    for scores in paths.root.rglob("held_out.json"):
        rows = RowScores(losses=[5.0, 2.0] * 20, hits=[5] * 40, tokens=[10] * 40)
        scores.write_text(rows.model_dump_json())
    advice = "finalists run with other seeds"
    assert any(advice in step.why for step in find_verdict(data_of(paths)).next_steps)
    document = document_of(paths)
    document["scheduler"] = {"kind": "pbt"}
    document["search"]["space"].pop("lora.rank")
    write_experiment(paths, tmp_path / "x.yaml", document, [])
    assert not any(advice in step.why for step in find_verdict(data_of(paths)).next_steps)


def test_more_trials_are_not_advised_once_the_budget_is_spent(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 8, effect=0.0)
    assert any("--trials 16" in step.command for step in find_verdict(data_of(paths)).next_steps)
    write_record(paths.budget, BudgetSpent(limit="gpu_hours", allowed=1.0, spent=1.0))
    assert not any("--trials" in step.command for step in find_verdict(data_of(paths)).next_steps)


def test_a_single_trial_searched_no_field_and_is_run_again_as_one(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 1)
    info = read_sweep(paths.root).info
    write_record(paths.sweep, info.model_copy(update={"is_single_trial": True}))
    change(paths, "t000", config=info.spec.trial_config({}))
    verdict = find_verdict(data_of(paths))
    assert said(verdict, MATTERED) == "Cannot be said: no field was searched."
    assert said(verdict, EDGE) == "No field was searched."
    change(paths, "t000", state=TrialState.FAILED, best=None)
    assert find_verdict(data_of(paths)).next_steps[0].command.startswith("orchestrator trial ")


def test_steps_that_a_running_trial_has_yet_to_make_are_not_saved(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 3)
    before = find_verdict(data_of(paths)).cost
    assert before.steps_saved == pytest.approx(140 / 600)
    change(paths, "t000", state=TrialState.RUNNING, step=20)
    assert find_verdict(data_of(paths)).cost.steps_saved == pytest.approx(140 / 420)


def test_steps_of_a_donor_are_neither_made_nor_saved(tmp_path: Path) -> None:
    """A trial of 200 steps took 100 of them over from another one (PBT)."""
    paths = plant(tmp_path / "s", 3)
    change(paths, "t000", adopted_tokens=10_000)
    cost = find_verdict(data_of(paths)).cost
    assert (cost.steps, cost.planned_steps) == (360, 500)
    assert cost.steps_saved == pytest.approx(140 / 500)


def test_a_stopped_trial_whose_loss_is_zero_has_that_outcome(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 8)
    best = read_record(TrialResult, paths.trial("t001").result).best
    assert best is not None
    change(paths, "t001", best=best.model_copy(update={"value": 0.0}))
    found = find_verdict(data_of(paths)).importances.outcomes.known
    assert [each.value for each in found if each.trial.trial_id == "t001"] == [0.0]


def test_a_rising_loss_says_nothing_of_another_metric(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 6, stops=False, metric="eval/token_accuracy")
    for trial in read_sweep(paths.root).trials():
        assert trial.best is not None
        value = trial.best.values["eval/token_accuracy"]
        change(paths, trial.trial_id, best=trial.best.model_copy(update={"value": value}), mode="max",
               metric="eval/token_accuracy")  # fmt: skip
    leader = data_of(paths).leader
    assert leader is not None
    file = paths.trial(leader.trial_id).metrics
    lines = file.read_text().splitlines()
    losses = [str(yaml.safe_load(line)["values"]["eval/loss"]) for line in lines]
    raised = [line.replace(loss, str(1 + i / 10)) for i, (line, loss) in enumerate(zip(lines, losses, strict=True))]
    file.write_text("\n".join(raised) + "\n")
    told = said(find_verdict(data_of(paths)), LONGER)
    assert told.startswith("No: the leader's loss was lowest at step 20")
    assert told.endswith("What that does to eval/token_accuracy cannot be said: only the loss can be forecast.")


def test_an_override_of_several_lines_stays_one_word_on_one_line(tmp_path: Path) -> None:
    override = "data.template='Don''t \\ {question}\n\n  A: {answer}'"
    paths = plant(tmp_path / "s", 1)
    write_experiment(paths, tmp_path / "x.yaml", document_of(paths), [override])
    text = markdown_page([data_of(paths)])
    (command,) = re.findall(r"^cd .* && orchestrator sweep .*$", text, re.MULTILINE)
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command.rpartition('--set ')[2]}"], capture_output=True, text=True, check=True
    )
    assert words.stdout.split("\0") == [override, ""]


def test_beyond_an_end_that_nothing_valid_follows_nothing_is_promised(tmp_path: Path) -> None:
    space = {"lora.dropout": {"uniform": [0.0, 0.1]}, "lora.rank": {"choice": [4, 8]}, SEED: {"randint": [1, 9]}}
    paths = plant(tmp_path / "s", 3, space=space)
    best = read_sweep(paths.root).trials()[0]
    at_ends = {"lora.dropout": 0.0, "lora.rank": 8, SEED: 8}
    change(paths, best.trial_id, config=read_sweep(paths.root).info.spec.trial_config(at_ends))
    verdict = find_verdict(data_of(paths))
    assert [edge.field for edge in verdict.edges] == ["lora.dropout", "lora.rank"]
    first, second = verdict.answers[EDGE].sentences
    assert first == "Yes: lora.dropout 0 is at the lowest end of its range (0); a wider range there is not valid."
    assert "lora.rank 8 is at the highest end of its range (8); better values may lie beyond it" in second
    assert "search beyond 8" in verdict.next_steps[0].why
