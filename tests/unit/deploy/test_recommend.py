"""Which adapter is chosen, from made-up scores."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.adapters.bundle import CONFIG, SCORES, WEIGHTS, Facts, seal
from orchestrator.cli.frame import console_on
from orchestrator.deploy import open_sweep
from orchestrator.deploy.recommend import Candidate, Recommendation, choose, pareto
from orchestrator.errors import RecordError, RequestError
from orchestrator.record import BestPoint, RowScores, SweepPaths, TrialResult, read_result, read_sweep, write_record
from orchestrator.report.best import say_best

ROWS = 100
MakeSweep = Callable[..., SweepPaths]
Make = Callable[..., Candidate]


@pytest.fixture
def make(tmp_path: Path, make_sweep: MakeSweep) -> Make:
    """`make("a", losses, size)`: a finished trial with these losses of rows, ten tokens each."""
    (pattern,) = read_sweep(make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5)}).root).trials()

    def candidate(name: str, losses: list[float], size: int | None = None, answers: int = 0) -> Candidate:
        scores = RowScores(
            losses=losses,
            hits=[5] * len(losses),
            tokens=[10] * len(losses),
            answers=[i < answers for i in range(ROWS)] if answers else [],
        )
        values = {"eval/loss": scores.loss} | ({"eval/exact_match": answers / ROWS} if answers else {})
        trial = pattern.model_copy(
            update={
                "trial_id": name,
                "best": BestPoint(value=scores.loss, step=7, values=values, adapter="adapters/step-7"),
                "applied": {} if size is None else {"num_trainable_parameters": size},
            }
        )
        return Candidate(trial, scores)

    return candidate


def noisy(mean: float, seed: int = 0, spread: float = 2.0) -> list[float]:
    """Losses of rows that differ much from row to row."""
    rng = random.Random(seed)
    return [mean * 10 + rng.uniform(-spread, spread) for _ in range(ROWS)]


def names(choice: Recommendation) -> list[str]:
    return [rival.candidate.trial.trial_id for rival in choice.tied]


def test_a_small_lead_on_every_row_is_a_lead(make: Make) -> None:
    """The pairing: rows differ by 4, the candidates by 0.05 on each row."""
    losses = noisy(1.0)
    choice = choose([make("big", losses, 200), make("small", [x + 0.05 for x in losses], 100)], "eval/loss", "min")
    assert names(choice) == []
    assert choice.recommended.trial.trial_id == "big"


def test_a_lead_that_hangs_on_single_rows_is_none(make: Make) -> None:
    losses = noisy(1.0)
    moved = [x + (0.6 if i % 2 else -0.5) for i, x in enumerate(losses)]
    candidates = [make("big", losses, 200), make("small", moved, 100), make("bad", [x + 2 for x in losses], 10)]
    choice = choose(candidates, "eval/loss", "min")
    assert choice.leader.trial.trial_id == "big"
    assert names(choice) == ["small"]
    assert choice.recommended.trial.trial_id == "small"
    assert [rival.is_tied for rival in choice.rivals] == [True, False]
    (small, bad) = choice.rivals
    assert small.difference == pytest.approx(0.005)
    assert (bad.difference, bad.low, bad.high) == pytest.approx((0.2, 0.2, 0.2))
    assert choose(candidates, "eval/loss", "min", strict=True).recommended.trial.trial_id == "big"


def test_the_interval_is_that_of_theory(make: Make) -> None:
    """Differences with a spread of sigma: 1.96 sigma / sqrt(rows) to each side."""
    rng = random.Random(1)
    losses, shifts = noisy(1.0), [rng.gauss(0, 1.0) for _ in range(ROWS)]
    shifts = [x - sum(shifts) / ROWS + 0.1 for x in shifts]
    sigma = (sum((x - 0.1) ** 2 for x in shifts) / ROWS) ** 0.5
    (rival,) = choose(
        [make("a", losses), make("b", [x + s for x, s in zip(losses, shifts, strict=True)])], "eval/loss", "min"
    ).rivals
    assert rival.difference == pytest.approx(0.01)
    assert rival.high - rival.low == pytest.approx(2 * 1.96 * sigma / ROWS**0.5 / 10, rel=0.08)


def test_it_says_the_same_each_time(make: Make) -> None:
    candidates = [make("a", noisy(1.0, 1)), make("b", noisy(1.0, 2))]
    first, again = (choose(candidates, "eval/loss", "min").rivals for _ in range(2))
    assert [(each.low, each.high) for each in first] == [(each.low, each.high) for each in again]


def test_a_metric_of_which_more_is_better(make: Make) -> None:
    candidates = [make("a", noisy(1.0), 100, answers=90), make("b", noisy(1.0), 300, answers=91)]
    choice = choose([*candidates, make("c", noisy(1.0), 10, answers=40)], "eval/exact_match", "max")
    assert choice.leader.trial.trial_id == "b"
    assert names(choice) == ["a"]
    assert choice.recommended.trial.trial_id == "a"


def test_trials_of_other_rows_or_without_any_are_not_compared(make: Make) -> None:
    losses = noisy(1.0)
    candidates = [make("a", losses, 5), make("b", losses[:-1], 4), Candidate(make("c", losses).trial, None)]
    choice = choose(candidates, "eval/loss", "min")
    assert (choice.num_compared, choice.rivals) == (3, [])
    alone = choose([Candidate(each.trial, None) for each in candidates], "eval/loss", "min")
    assert alone.why_not_compared == "its adapter does not hold the scores of single rows"
    by_size = choose(candidates[:2], "size", "min")
    assert (by_size.leader.trial.trial_id, by_size.why_not_compared) == ("b", "sizes are exact")


def test_a_metric_that_nobody_has_is_refused_with_those_there_are(make: Make) -> None:
    with pytest.raises(RequestError, match="--metric eval/bleu") as caught:
        choose([make("a", noisy(1.0))], "eval/bleu", "max")
    assert caught.value.remedy == "Measured were: eval/loss, size."


def test_pareto_drops_what_another_beats(make: Make) -> None:
    candidates = [
        make("good and big", noisy(1.0), 400),
        make("worse and bigger", noisy(1.1), 500),
        make("worse and small", noisy(1.2), 100),
        make("much worse and small", noisy(1.5), 100),
        make("unknown", noisy(0.9)),
    ]
    front = pareto(candidates, {"eval/loss": "min", "size": "min"})
    assert [each.trial.trial_id for each in front] == ["good and big", "worse and small"]
    assert pareto(candidates[:1] * 2, {"eval/loss": "min", "size": "min"}) == candidates[:1] * 2


def test_a_sweeps_best_is_the_smallest_of_the_tied(tmp_path: Path, make_sweep: MakeSweep, make: Make) -> None:
    paths = make_sweep(tmp_path / "t", {"a": ("COMPLETE", 0.5), "b": ("STOPPED", 0.5), "c": ("FAILED", 0.5)})
    losses = noisy(1.0)
    for name, size, values in (
        ("a", 200, losses),
        ("b", 100, [x + (0.6 if i % 2 else -0.5) for i, x in enumerate(losses)]),
    ):
        made, trial = make(name, values, size), paths.trial(name)
        assert made.scores is not None
        result = TrialResult.model_validate_json(trial.result.read_text())
        write_record(trial.result, result.model_copy(update={"best": made.trial.best, "applied": made.trial.applied}))
        (trial.adapter(7) / SCORES).write_text(made.scores.model_dump_json())
    sweep = open_sweep(paths.root)
    best = sweep.best()
    assert (best.trial.trial_id, best.adapter) == ("b", paths.trial("b").adapter(7))
    assert sweep.best(strict=True).trial.trial_id == "a"
    assert sweep.best("size").trial.trial_id == "b"
    assert [trial.trial_id for trial in sweep.top(1)] == ["a"]
    assert [trial.trial_id for trial in sweep.pareto(["eval/loss", "size"])] == ["a", "b"]
    told = best.as_dict()
    assert (told["value"], told["num_parameters"]) == pytest.approx((sum(losses) / ROWS / 10 + 0.005, 100))
    assert told["choice"]["leader"] == "a"
    assert [each["trial_id"] for each in told["choice"]["tied"]] == ["b"]
    shutil.rmtree(paths.trial("b").adapter(7))
    assert sweep.best(strict=True).damaged == {}
    without = sweep.best("size")
    assert without.trial.trial_id == "a"
    assert without.as_dict()["damaged"] == {"b": f"{paths.trial('b').adapter(7)}: the adapter of trial b is missing"}


def _flip(file: Path) -> None:
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


@pytest.mark.parametrize("name", [WEIGHTS, SCORES])
def test_a_best_that_is_damaged_is_told_and_the_next_one_recommended(
    tmp_path: Path, make_sweep: MakeSweep, make: Make, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = make_sweep(tmp_path / "t", {"a": ("COMPLETE", 0.5), "b": ("COMPLETE", 0.6), "c": ("COMPLETE", 0.7)})
    for trial, losses in (("a", noisy(1.0)), ("b", noisy(2.0)), ("c", noisy(3.0))):
        scores = make(trial, losses).scores
        assert scores is not None
        (paths.trial(trial).adapter(7) / SCORES).write_text(scores.model_dump_json())
        (paths.trial(trial).adapter(7) / WEIGHTS).write_bytes(b"weights")
        seal(paths.trial(trial).adapter(7), Facts(format="adapter", base={}, versions={}, metrics={}))
    file = paths.trial("a").adapter(7) / name
    assert open_sweep(paths.root).best().damaged == {}
    _flip(file)
    sweep = open_sweep(paths.root)
    best = sweep.best()
    assert best.trial.trial_id == best.recommendation.leader.trial.trial_id == "b"
    assert [rival.candidate.trial.trial_id for rival in best.recommendation.rivals] == ["c"]
    assert best.damaged == {"a": f"{file}: has changed since it was saved (manifest.json holds another sha256)"}
    say_best(console_on(), best)
    assert f"left out, for its adapter is damaged: a: {file}: has changed" in capsys.readouterr().out
    with pytest.raises(RecordError, match="adapter of trial a is damaged, and the choice may hang on it") as told:
        best.adapter_ref()  # nobody has asked for the next one yet
    assert str(best.adapter) in told.value.remedy
    for trial in "bc":
        (paths.trial(trial).adapter(7) / WEIGHTS).unlink()
    with pytest.raises(RecordError, match="no finished trial with eval/loss has a whole adapter") as told:
        open_sweep(paths.root).best()
    assert told.value.message.count("is missing") == 2


@pytest.mark.parametrize(
    ("lost", "sizes", "strict", "why"),
    [
        ("a", (500, 500, 500), True, "it leads"),
        ("a", (500, 500, 500), False, "it leads"),
        ("c", (500, 500, 400), False, "only its rows tell (`best --strict` does not ask)"),
        ("c", (500, 500, 400), True, None),
        ("c", (500, 500, 500), False, None),  # tied or not: of equal ones the better is taken
        ("c", (500, 500, 600), False, None),
        ("c", (500, 500, None), False, None),
        ("b", (500, 450, 400), False, None),  # c is tied with the leader, and smaller yet
        ("b", (500, 300, 400), False, "only its rows tell"),
    ],
)
def test_damage_matters_only_where_the_choice_may_hang_on_it(
    tmp_path: Path,
    make_sweep: MakeSweep,
    make: Make,
    lost: str,
    sizes: tuple[int | None, ...],
    strict: bool,
    why: str | None,
) -> None:
    """Three adapters that their rows do not tell apart; the scores of one cannot be read."""
    states = {"a": ("COMPLETE", 0.50), "b": ("COMPLETE", 0.51), "c": ("COMPLETE", 0.52)}
    paths = make_sweep(tmp_path / "t", states)
    spreads = {"a": (0, 4), "b": (2, 2), "c": (4, 0)}
    for (trial, (_, value)), size in zip(states.items(), sizes, strict=True):
        made = make(trial, [value * 10 + spread for spread in spreads[trial]] * (ROWS // 2), size)
        assert made.scores is not None
        record = read_result(paths.trial(trial))
        write_record(paths.trial(trial).result, record.model_copy(update={"applied": made.trial.applied}))
        folder = paths.trial(trial).adapter(7)
        (folder / SCORES).write_text(made.scores.model_dump_json() if trial != lost else "{")
        (folder / CONFIG).write_text("{}")
        (folder / WEIGHTS).touch()
    best = open_sweep(paths.root).best(strict=strict)
    assert best.damaged.keys() == {lost}
    assert len(best.recommendation.tied) == 1
    if why is None:
        assert best.in_doubt == {}
        assert best.adapter_ref().folder == best.adapter
    else:
        with pytest.raises(
            RecordError, match=rf"trial {lost} is damaged, and the choice may hang on it, .*{re.escape(why)}"
        ):
            best.adapter_ref()


def test_where_no_rows_are_compared_damage_behind_the_leader_does_not_matter(
    tmp_path: Path, make_sweep: MakeSweep
) -> None:
    paths = make_sweep(tmp_path / "t", {"a": ("COMPLETE", 0.5), "b": ("COMPLETE", 0.6)})
    (paths.trial("b").adapter(7) / SCORES).write_text("{")
    best = open_sweep(paths.root).best()
    assert (best.trial.trial_id, best.damaged.keys(), best.in_doubt) == ("a", {"b"}, {})


def test_a_few_rows_tell_nothing(make: Make) -> None:
    choice = choose([make("a", [9.0, 9.0]), make("b", [9.1, 9.1])], "eval/loss", "min")
    assert (choice.rivals, choice.why_not_compared) == ([], "2 held-out rows are too few to tell")


def test_the_best_by_size_is_told_as_json(tmp_path: Path, make_sweep: MakeSweep) -> None:
    paths = make_sweep(tmp_path / "t", {"a": ("COMPLETE", 0.5)})
    result = TrialResult.model_validate_json(paths.trial("a").result.read_text())
    write_record(paths.trial("a").result, result.model_copy(update={"applied": {"num_trainable_parameters": 7}}))
    assert open_sweep(paths.root).best("size").as_dict()["value"] == 7


def test_damaged_scores_are_told(tmp_path: Path, make_sweep: MakeSweep) -> None:
    paths = make_sweep(tmp_path / "t", {"a": ("COMPLETE", 0.5)})
    (paths.trial("a").adapter(7) / SCORES).write_text('{"losses": [1.0]}')
    with pytest.raises(RecordError, match=r"held_out\.json: is damaged"):
        open_sweep(paths.root).best()


def test_scores_that_a_manifest_does_not_list_are_told(tmp_path: Path, make_sweep: MakeSweep, make: Make) -> None:
    paths, made = make_sweep(tmp_path / "t", {"a": ("COMPLETE", 0.5)}), make("a", noisy(1.0))
    seal(paths.trial("a").adapter(7), Facts(format="adapter", base={}, versions={}, metrics={}))
    assert made.scores is not None
    (paths.trial("a").adapter(7) / SCORES).write_text(made.scores.model_dump_json())
    with pytest.raises(RecordError, match=r"held_out\.json: does not belong here"):
        open_sweep(paths.root).best()
