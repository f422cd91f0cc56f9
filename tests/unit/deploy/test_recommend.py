"""The recommended adapter, from artificial scores."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.adapters.bundle import CONFIG, SCORES, WEIGHTS, Facts, seal
from orchestrator.cli.frame import console_on
from orchestrator.deploy import open_sweep
from orchestrator.deploy.recommend import Candidate, Recommendation, pareto, recommend
from orchestrator.errors import RecordError, RequestError
from orchestrator.record import BestPoint, RowScores, SweepPaths, TrialResult, read_result, read_sweep, write_record
from orchestrator.record.checked import read_record
from orchestrator.report.best import say_best

ROWS = 100
MakeSweep = Callable[..., SweepPaths]
Make = Callable[..., Candidate]


@pytest.fixture
def make(tmp_path: Path, make_sweep: MakeSweep) -> Make:
    """Makes a finished trial with these losses, ten tokens per row: `make("a", losses, size)`."""
    (pattern,) = read_sweep(make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5)}).root).trials()

    def candidate(name: str, losses: list[float], size: int | None = None, answers: int = 0) -> Candidate:
        scores = RowScores(
            losses=losses,
            hits=[5] * len(losses),
            tokens=[10] * len(losses),
            metrics={"exact_match": [float(i < answers) for i in range(ROWS)]} if answers else {},
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
    """Return losses that vary much between rows."""
    rng = random.Random(seed)
    return [mean * 10 + rng.uniform(-spread, spread) for _ in range(ROWS)]


def names(result: Recommendation) -> list[str]:
    return [rival.candidate.trial.trial_id for rival in result.tied]


def test_a_small_lead_on_every_row_is_significant(make: Make) -> None:
    """The bootstrap is paired: losses vary by 4 between rows, but the candidates differ by 0.05 on each row."""
    losses = noisy(1.0)
    result = recommend([make("big", losses, 200), make("small", [x + 0.05 for x in losses], 100)], "eval/loss", "min")
    assert names(result) == []
    assert result.recommended.trial.trial_id == "big"


def test_a_lead_that_depends_on_single_rows_is_a_tie(make: Make) -> None:
    losses = noisy(1.0)
    moved = [x + (0.6 if i % 2 else -0.5) for i, x in enumerate(losses)]
    candidates = [make("big", losses, 200), make("small", moved, 100), make("bad", [x + 2 for x in losses], 10)]
    result = recommend(candidates, "eval/loss", "min")
    assert result.leader.trial.trial_id == "big"
    assert names(result) == ["small"]
    assert result.recommended.trial.trial_id == "small"
    assert [rival.is_tied for rival in result.rivals] == [True, False]
    (small, bad) = result.rivals
    assert small.difference == pytest.approx(0.005)
    assert (bad.difference, bad.low, bad.high) == pytest.approx((0.2, 0.2, 0.2))
    assert recommend(candidates, "eval/loss", "min", strict=True).recommended.trial.trial_id == "big"


def test_the_interval_agrees_with_theory(make: Make) -> None:
    """For differences with standard deviation sigma, the half width is 1.96 sigma / sqrt(rows)."""
    rng = random.Random(1)
    losses, shifts = noisy(1.0), [rng.gauss(0, 1.0) for _ in range(ROWS)]
    shifts = [x - sum(shifts) / ROWS + 0.1 for x in shifts]
    sigma = (sum((x - 0.1) ** 2 for x in shifts) / ROWS) ** 0.5
    (rival,) = recommend(
        [make("a", losses), make("b", [x + s for x, s in zip(losses, shifts, strict=True)])], "eval/loss", "min"
    ).rivals
    assert rival.difference == pytest.approx(0.01)
    assert rival.high - rival.low == pytest.approx(2 * 1.96 * sigma / ROWS**0.5 / 10, rel=0.08)


def test_the_comparison_is_deterministic(make: Make) -> None:
    candidates = [make("a", noisy(1.0, 1)), make("b", noisy(1.0, 2))]
    first, again = (recommend(candidates, "eval/loss", "min").rivals for _ in range(2))
    assert [(each.low, each.high) for each in first] == [(each.low, each.high) for each in again]


def test_a_metric_that_is_maximized(make: Make) -> None:
    candidates = [make("a", noisy(1.0), 100, answers=90), make("b", noisy(1.0), 300, answers=91)]
    result = recommend([*candidates, make("c", noisy(1.0), 10, answers=40)], "eval/exact_match", "max")
    assert result.leader.trial.trial_id == "b"
    assert names(result) == ["a"]
    assert result.recommended.trial.trial_id == "a"


def test_trials_with_other_rows_or_without_scores_are_not_compared(make: Make) -> None:
    losses = noisy(1.0)
    candidates = [make("a", losses, 5), make("b", losses[:-1], 4), Candidate(make("c", losses).trial, None)]
    result = recommend(candidates, "eval/loss", "min")
    assert (result.num_compared, result.rivals) == (3, [])
    alone = recommend([Candidate(each.trial, None) for each in candidates], "eval/loss", "min")
    assert alone.why_not_compared == "its adapter folder has no scores of single rows"
    by_size = recommend(candidates[:2], "size", "min")
    assert (by_size.leader.trial.trial_id, by_size.why_not_compared) == ("b", "sizes are exact")


def test_an_unknown_metric_is_rejected_with_the_known_ones(make: Make) -> None:
    with pytest.raises(RequestError, match="--metric eval/bleu") as caught:
        recommend([make("a", noisy(1.0))], "eval/bleu", "max")
    assert caught.value.remedy == "Choose one of: eval/loss, size."


def test_pareto_drops_dominated_candidates(make: Make) -> None:
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


def test_the_best_of_a_sweep_is_the_smallest_tied_adapter(tmp_path: Path, make_sweep: MakeSweep, make: Make) -> None:
    paths = make_sweep(tmp_path / "t", {"a": ("COMPLETE", 0.5), "b": ("STOPPED", 0.5), "c": ("FAILED", 0.5)})
    losses = noisy(1.0)
    for name, size, values in (
        ("a", 200, losses),
        ("b", 100, [x + (0.6 if i % 2 else -0.5) for i, x in enumerate(losses)]),
    ):
        made, trial = make(name, values, size), paths.trial(name)
        assert made.scores is not None
        result = read_record(TrialResult, trial.result)
        write_record(trial.result, result.model_copy(update={"best": made.trial.best, "applied": made.trial.applied}))
        (trial.adapter(7) / SCORES).write_text(made.scores.model_dump_json())
    sweep = open_sweep(paths.root)
    best = sweep.best()
    assert (best.trial.trial_id, best.adapter) == ("b", paths.trial("b").adapter(7))
    assert sweep.best(strict=True).trial.trial_id == "a"
    assert sweep.best("size").trial.trial_id == "b"
    assert [trial.trial_id for trial in sweep.top(1)] == ["a"]
    assert [trial.trial_id for trial in sweep.pareto(["eval/loss", "size"])] == ["a", "b"]
    document = best.as_dict()
    assert (document["value"], document["num_parameters"]) == pytest.approx((sum(losses) / ROWS / 10 + 0.005, 100))
    assert document["choice"]["leader"] == "a"
    assert [each["trial_id"] for each in document["choice"]["tied"]] == ["b"]
    shutil.rmtree(paths.trial("b").adapter(7))
    assert sweep.best(strict=True).damaged == {}
    without = sweep.best("size")
    assert without.trial.trial_id == "a"
    assert without.as_dict()["damaged"] == {"b": f"{paths.trial('b').adapter(7)}: the adapter of trial b is missing"}


def _flip(file: Path) -> None:
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


@pytest.mark.parametrize("name", [WEIGHTS, SCORES])
def test_a_damaged_best_adapter_is_reported_and_the_next_one_recommended(
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
    assert best.damaged == {"a": f"{file}: has changed since it was saved (manifest.json lists another sha256)"}
    say_best(console_on(), best)
    assert f"left out, because its adapter is damaged: a: {file}: has changed" in capsys.readouterr().out
    with pytest.raises(RecordError, match="adapter of trial a is damaged, and the choice may depend on it") as caught:
        best.adapter_ref()  # the user has to decide
    assert str(best.adapter) in caught.value.remedy
    for trial in "bc":
        (paths.trial(trial).adapter(7) / WEIGHTS).unlink()
    with pytest.raises(RecordError, match="no finished trial with eval/loss has an undamaged adapter") as caught:
        open_sweep(paths.root).best()
    assert caught.value.message.count("is missing") == 2
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("orchestrator.deploy.finished._MOST_NAMED", 1)
        with pytest.raises(RecordError, match="and 2 more adapters"):
            open_sweep(paths.root).best()


@pytest.mark.parametrize(
    ("lost", "sizes", "strict", "why"),
    [
        ("a", (500, 500, 500), True, "it has the best value"),
        ("a", (500, 500, 500), False, "it has the best value"),
        (
            "c",
            (500, 500, 400),
            False,
            "its damage hides whether it is tied with the best (`best --strict` ignores ties)",
        ),
        ("c", (500, 500, 400), True, None),
        ("c", (500, 500, 500), False, None),  # tied or not: of equal sizes the better value wins
        ("c", (500, 500, 600), False, None),
        ("c", (500, 500, None), False, None),
        ("b", (500, 450, 400), False, None),  # c is tied with the leader and even smaller
        ("b", (500, 300, 400), False, "its damage hides whether it is tied with the best"),
    ],
)
def test_damage_matters_only_if_the_choice_may_depend_on_it(
    tmp_path: Path,
    make_sweep: MakeSweep,
    make: Make,
    lost: str,
    sizes: tuple[int | None, ...],
    strict: bool,
    why: str | None,
) -> None:
    """Three tied adapters, where the scores of one cannot be read."""
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
            RecordError, match=rf"trial {lost} is damaged, and the choice may depend on it: .*{re.escape(why)}"
        ):
            best.adapter_ref()


def test_damage_behind_the_leader_does_not_matter_if_rows_are_not_compared(
    tmp_path: Path, make_sweep: MakeSweep
) -> None:
    paths = make_sweep(tmp_path / "t", {"a": ("COMPLETE", 0.5), "b": ("COMPLETE", 0.6)})
    (paths.trial("b").adapter(7) / SCORES).write_text("{")
    best = open_sweep(paths.root).best()
    assert (best.trial.trial_id, best.damaged.keys(), best.in_doubt) == ("a", {"b"}, {})


def test_too_few_rows_are_not_compared(make: Make) -> None:
    result = recommend([make("a", [9.0, 9.0]), make("b", [9.1, 9.1])], "eval/loss", "min")
    assert (result.rivals, result.why_not_compared) == ([], "2 held-out rows are too few to compare")


def test_the_best_by_size_as_json(tmp_path: Path, make_sweep: MakeSweep) -> None:
    paths = make_sweep(tmp_path / "t", {"a": ("COMPLETE", 0.5)})
    result = read_record(TrialResult, paths.trial("a").result)
    write_record(paths.trial("a").result, result.model_copy(update={"applied": {"num_trainable_parameters": 7}}))
    assert open_sweep(paths.root).best("size").as_dict()["value"] == 7


def test_damaged_scores_are_reported(tmp_path: Path, make_sweep: MakeSweep) -> None:
    paths = make_sweep(tmp_path / "t", {"a": ("COMPLETE", 0.5)})
    (paths.trial("a").adapter(7) / SCORES).write_text('{"losses": [1.0]}')
    with pytest.raises(RecordError, match=r"held_out\.json: is damaged"):
        open_sweep(paths.root).best()


def test_scores_missing_from_the_manifest_are_reported(tmp_path: Path, make_sweep: MakeSweep, make: Make) -> None:
    paths, made = make_sweep(tmp_path / "t", {"a": ("COMPLETE", 0.5)}), make("a", noisy(1.0))
    seal(paths.trial("a").adapter(7), Facts(format="adapter", base={}, versions={}, metrics={}))
    assert made.scores is not None
    (paths.trial("a").adapter(7) / SCORES).write_text(made.scores.model_dump_json())
    with pytest.raises(RecordError, match=r"held_out\.json: does not belong here"):
        open_sweep(paths.root).best()
