"""The verdict in words: the winner, how sure it is, what mattered, what it cost, and what to try next.

Each answer gives its numbers. Where the records do not hold the evidence, it says that this cannot be said, and why.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from orchestrator.analysis.cost import Cost, find_cost
from orchestrator.analysis.coverage import say_coverage, say_tied
from orchestrator.analysis.effects import coordinate_of
from orchestrator.analysis.importance import Importances, find_importances
from orchestrator.analysis.longer import WORTH, Longer, find_longer
from orchestrator.analysis.next_step import Edge, Step, find_edges, next_steps
from orchestrator.analysis.sweep_data import SweepData, value_of
from orchestrator.analysis.wording import listed, say_effect, say_number, say_share, say_short
from orchestrator.deploy import ChosenTrial
from orchestrator.deploy.recommend import CONFIDENCE, mean_interval
from orchestrator.record import OPEN, TrialState
from orchestrator.report.tables import duration
from orchestrator.spec.search import LOSS
from orchestrator.spec.sections.evaluation import STDERR
from orchestrator.spec.sections.scheduler import Population
from orchestrator.words import counted

_MUCH: Final = 1.2
"""Widening of forecast intervals that is worth a sentence."""


@dataclass(frozen=True)
class Answer:
    """One question about a sweep, and its answer in sentences."""

    question: str
    sentences: list[str]


@dataclass(frozen=True)
class Verdict:
    """What a sweep has shown."""

    headline: str
    """The winner in one sentence."""
    answers: list[Answer]
    next_steps: list[Step]
    edges: list[Edge]
    importances: Importances
    longer: Longer | str
    cost: Cost


def find_verdict(data: SweepData) -> Verdict:
    """Return what a sweep has shown."""
    found, longer, edges, cost = find_importances(data), find_longer(data), find_edges(data), find_cost(data)
    steps = next_steps(data, edges, found, longer)
    answers = [
        Answer("Which trial won?", list(_winner(data))),
        Answer("How sure is the winner?", list(_certainty(data))),
        Answer("What mattered?", list(_mattered(data, found))),
        Answer("Do the best trials touch the edge of a range?", list(_edges(data, edges, found))),
        Answer("Would longer training help?", list(_longer(data, longer))),
        Answer("What did it cost?", list(_cost(data, cost))),
    ]
    return Verdict(_headline(data), answers, steps, edges, found, longer, cost)


def _headline(data: SweepData) -> str:
    num = counted(len(data.trials), "trial")
    if not data.trials:
        return "There is no winner: no trial has started."
    leader = data.leader
    if leader is None:
        failed = sum(trial.state == TrialState.FAILED for trial in data.trials)
        if failed == len(data.trials):
            return f"There is no winner: {'all ' if failed > 1 else 'the only one of '}{num} failed."
        running = next((trial for trial in data.trials if value_of(trial) is not None), None)
        if running is not None and running.state in OPEN:
            value = say_number(value_of(running))
            return f"There is no winner yet: no trial has finished. {running.trial_id} is ahead, {data.metric} {value}."
        return f"There is no winner: none of {num} has finished with a finite {data.metric}."
    value, seeds = say_number(value_of(leader)), data.over_seeds.get(leader.trial_id)
    if seeds:
        value = f"{say_number(fmean(seeds))}, mean over {counted(len(seeds), 'seed')} ({value} with the first)"
    so_far = "" if data.is_over else " so far"
    if len(data.trials) == 1:
        return f"The only trial, {leader.trial_id}, reached {data.metric} {value}."
    return f"{leader.trial_id} is the best of {num}{so_far}: {data.metric} {value}."


def _winner(data: SweepData) -> Iterator[str]:
    leader = data.leader
    if leader is None:
        yield f"Cannot be said: {data.why_no_choice or 'no trial has finished'}."
        return
    assert leader.best is not None
    values = [f"{name} {say_short(value)}" for name, value in leader.config.varied.items()]
    others = [
        f"{name} {say_number(value)}"
        for name, value in leader.best.values.items()
        if name != data.metric and not name.endswith(STDERR)
    ]
    yield (
        f"{leader.trial_id} with {listed(values, 20) if values else 'the values of the experiment'}, at step "
        f"{leader.best.step} of {leader.total_steps or '?'}" + (f"; {', '.join(others)}." if others else ".")
    )
    choice = data.choice
    if choice is not None and choice.trial.trial_id != leader.trial_id:
        recommended = choice.trial
        yield (
            f"Recommended is {recommended.trial_id}: its {data.metric} of {say_number(value_of(recommended))} cannot "
            f"be told apart from that of {leader.trial_id}, and its adapter is smaller "
            f"({say_number(recommended.num_parameters)} instead of {say_number(leader.num_parameters)} parameters)."
        )
    if data.choice is None:
        yield f"No adapter can be recommended: {data.why_no_choice}."
    yield from _failed(data)


def _failed(data: SweepData) -> Iterator[str]:
    causes = Counter(
        (trial.failure or "unknown cause").replace("_", " ")
        for trial in data.trials
        if trial.state == TrialState.FAILED
    )
    if causes:
        named = listed([f"{number} {cause}" for cause, number in causes.most_common()])
        yield f"{causes.total()} of {counted(len(data.trials), 'trial')} failed: {named}."


def _certainty(data: SweepData) -> Iterator[str]:
    choice, leader = data.choice, data.leader
    if leader is None:
        yield "Cannot be said: there is no winner."
        return
    if choice is None:
        yield f"Cannot be said: {data.why_no_choice}."
    elif choice.recommendation.num_compared == 1:
        yield "Cannot be said: no other trial has finished, so there is nothing to compare it with."
    elif choice.recommendation.why_not_compared:
        yield f"Cannot be said: trials were not compared row by row, because {choice.recommendation.why_not_compared}."
    else:
        yield from _margin(data, choice)
        yield from _seeds(choice)
    yield _on_new_rows(data)


def _margin(data: SweepData, choice: ChosenTrial) -> Iterator[str]:
    found = choice.recommendation
    tied, leader, rows = found.tied, found.leader.trial.trial_id, counted(data.info.num_held_out, "held-out row")
    if not found.rivals:
        yield "Cannot be said: no other trial has scores of the same held-out rows."
        return
    nearest = found.rivals[0]
    interval = f"{CONFIDENCE:.0%} interval {nearest.low:+.2g} to {nearest.high:+.2g}"
    trial = nearest.candidate.trial
    early = f" (stopped at step {trial.step})" if trial.state == TrialState.STOPPED else ""
    metric = data.info.spec.search.metric
    rival = f"{trial.trial_id}{early}, differs from it by {nearest.difference:+.2g} in {metric} ({interval})"
    if not tied:
        yield f"The {rows} suffice to tell {leader} from the others: the next best, {rival}."
    else:
        names = listed([each.candidate.trial.trial_id for each in tied], 4)
        yield (
            f"Not very: on the {rows} {counted(len(tied), 'trial')} cannot be told apart from it: {names}. "
            f"The nearest, {rival}."
        )
    if early:
        yield (
            f"{trial.trial_id} was stopped before its end and is compared at its best evaluation until then: this "
            "does not say how it would have ended."
        )
    left_out = found.num_compared - 1 - len(found.rivals)
    if left_out and not found.over_seeds:
        yield f"{counted(left_out, 'finished trial')} could not be compared, for lack of scores of the same rows."


def _seeds(choice: ChosenTrial) -> Iterator[str]:
    seeds = choice.recommendation.over_seeds
    if not seeds:
        yield "Whether another seed would keep this order cannot be said: no trial ran with a second seed."
        return
    means = [
        f"{name} {say_number(fmean(values))} over {counted(len(values), 'seed')} "
        f"({say_number(min(values))} to {say_number(max(values))})"
        for name, values in seeds.items()
    ]
    yield f"The finalists ran again with other seeds, and the comparison counts them: {listed(means)}."


def _on_new_rows(data: SweepData) -> str:
    score = data.test_score
    if score is None:
        why = "there are no test rows (data.test)" if data.info.spec.data.test is None else "test rows come at the end"
        return (
            "How it does on new rows cannot be said: the held-out rows chose it, so their value is somewhat too good, "
            f"and {why}."
        )
    low, high = mean_interval(score.scores)
    return (
        f"On {counted(len(score.scores.losses), 'test row')}, which no decision has seen, {score.trial_id} has loss "
        f"{say_number(score.scores.loss)} ({CONFIDENCE:.0%} interval {say_number(low)} to {say_number(high)}), "
        f"{score.optimism:+.2g} against the held-out rows."
    )


def _mattered(data: SweepData, found: Importances) -> Iterator[str]:
    yield from _divergence(data, found)
    if found.why_none:
        yield f"Cannot be said: {found.why_none}."
        return
    basis = counted(len(found.outcomes.known), "trial")
    for each in found.fields:
        if each.matters:
            yield (
                f"{each.field}: {say_share(each.share)} of the importance ({CONFIDENCE:.0%} interval "
                f"{say_share(each.share_low)} to {say_share(each.share_high)}); "
                f"{say_effect(each.effect, data.metric, found.is_log)}, {_chance(each.effect.p_value)}."
            )
    others = [f"{each.field} ({say_share(each.share)})" for each in found.fields if not each.matters]
    if others and len(others) == len(found.fields):
        yield (
            f"Cannot be said with {basis}: no field's effect stands out from chance. Shares of the importance, "
            f"which chance alone could give: {listed(others)}."
        )
    elif others:
        yield f"With {basis}, no effect can be shown of {listed(others)}; that does not mean that there is none."
    yield from say_tied(data)
    yield from say_coverage(data)
    yield from _how_trials_count(data, found)


def _divergence(data: SweepData, found: Importances) -> Iterator[str]:
    """Name the fields whose highest or lowest values alone have diverged."""
    diverged, others = found.outcomes.diverged, [each.trial for each in found.outcomes.known]
    for name, axis in data.info.spec.search.space.items() if diverged and others else []:
        if coordinate_of(axis).is_category:
            continue
        bad = [trial.config.varied[name] for trial in diverged if name in trial.config.varied]
        good = [trial.config.varied[name] for trial in others if name in trial.config.varied]
        if bad and good and (min(bad) > max(good) or max(bad) < min(good)):
            side, edge, inside = (
                ("or more", min(bad), f"the highest that did not is {say_short(max(good))}")
                if min(bad) > max(good)
                else ("or less", max(bad), f"the lowest that did not is {say_short(min(good))}")
            )
            yield f"{counted(len(bad), 'trial')} diverged, all with {name} of {say_short(edge)} {side}; {inside}."


def _how_trials_count(data: SweepData, found: Importances) -> Iterator[str]:
    num_forecast = sum(each.is_forecast for each in found.outcomes.known)
    if num_forecast:
        counts = f"{counted(num_forecast, 'trial')} stopped early and {_verb(num_forecast)}"
        yield f"{counts} with the loss forecast for the end."
    if found.outcomes.num_short:
        number = found.outcomes.num_short
        yield f"{counted(number, 'trial')} stopped early and {_verb(number)} with the best value so far."
    if found.outcomes.diverged:
        number = len(found.outcomes.diverged)
        yield f"{counted(number, 'trial')} diverged and {_verb(number)} as the worst."
    if isinstance(data.info.spec.scheduler, Population):
        yield "Values changed while trials trained (PBT); each counts with its last values."


def _edges(data: SweepData, edges: list[Edge], found: Importances) -> Iterator[str]:
    if data.leader is None:
        yield "Cannot be said: there is no winner."
    elif not data.fields():
        yield "No field was searched."
    elif not edges:
        yield "No: the best trials lie inside every range."
    for edge in edges:
        values = sorted({say_short(value) for value in edge.values})
        is_shown = any(each.field == edge.field and each.matters for each in found.fields)
        place = f"{edge.field} {listed(values)} is at the {edge.side} end of its range ({say_short(edge.limit)})"
        if edge.space is None:
            yield f"Yes: {place}; a wider range there is not valid."
        else:
            unsure = "" if is_shown else ", though no effect of it can be shown"
            yield f"Yes: {place}; better values may lie beyond it{unsure}."


def _longer(data: SweepData, longer: Longer | str) -> Iterator[str]:
    if isinstance(longer, str):
        yield f"Cannot be said: {longer}."
        return
    if longer.has_risen:
        yield (
            f"No: the leader's loss was lowest at step {longer.lowest_step} of {longer.steps} "
            f"({say_number(longer.lowest)}) and rose to {say_number(longer.loss)}; it overfits."
        )
        yield from _other_metric(data)
        return
    interval = f"{say_number(longer.low)} to {say_number(longer.high)}"
    if longer.is_unsure:
        yield (
            f"Cannot be said: with {2 * longer.steps} steps instead of {longer.steps}, the leader's loss "
            f"({say_number(longer.loss)} now) is forecast to be anywhere in {interval} "
            f"({CONFIDENCE:.0%} interval)."
        )
        yield from _how_wide(longer)
        return
    verdict = "Probably" if longer.chance >= 0.8 else "Perhaps" if longer.chance >= 0.2 else "Hardly"
    yield (
        f"{verdict}: with {2 * longer.steps} steps instead of {longer.steps}, the leader's loss is forecast to be "
        f"{say_number(longer.forecast)} ({CONFIDENCE:.0%} interval {interval}), "
        f"from {say_number(longer.loss)} now. The chance that it falls by {WORTH:.0%} or "
        f"more is {longer.chance:.0%}."
    )
    yield from _how_wide(longer)
    yield from _other_metric(data)


def _other_metric(data: SweepData) -> Iterator[str]:
    if data.metric != LOSS:
        yield f"What that does to {data.metric} cannot be said: only the loss can be forecast."


def _how_wide(longer: Longer) -> Iterator[str]:
    if longer.widened > _MUCH:
        yield (
            f"The interval is {longer.widened:.1f} times as wide as the forecast's own, because forecasts of this "
            "sweep's trials from half-way were off by that much."
        )


def _cost(data: SweepData, cost: Cost) -> Iterator[str]:
    if not cost.trial_seconds:
        yield "Nothing yet: no trial has trained."
        return
    device = listed(cost.devices) if cost.devices else "an unknown device"
    gpu = f"{cost.gpu_hours:.3g} GPU-hours" if cost.gpu_hours else "No GPU time"
    wall = f", {duration(cost.wall_seconds)} from start to end" if cost.wall_seconds is not None else ""
    runs = f"; {counted(len(data.repeats), 'run')} of finalists with other seeds included" if data.repeats else ""
    yield f"{gpu}, {cost.tokens:,} tokens and {duration(cost.trial_seconds)} of trials' work on {device}{wall}{runs}."
    if cost.winner_share:
        own = " (without its repeats)" if data.over_seeds else ""
        yield f"The winner's own run{own} took {say_share(cost.winner_share)} of the trials' work."
    stopped = sum(trial.state == TrialState.STOPPED for trial in data.trials)
    if stopped:
        search = " of the search (without the repeats)" if data.repeats else ""
        yield (
            f"{counted(stopped, 'trial was', 'trials were')} stopped early; {say_share(cost.steps_saved)} of all "
            f"planned steps{search} were skipped."
        )
        if cost.tokens_saved:
            yield (
                f"That saved about {int(float(f'{cost.tokens_saved:.2g}')):,} tokens and "
                f"{duration(cost.seconds_saved)} of trials' work: an estimate, from each stopped trial's own speed."
            )
    if cost.failed_share:
        yield f"{say_share(cost.failed_share)} of the work went into trials that failed."
    if data.why_over is not None:
        yield f"The sweep ended early: {data.why_over}."


def _chance(p_value: float) -> str:
    return f"p {p_value:.3f}" if p_value > 0.001 else "p 0.001 or less"


def _verb(number: int) -> str:
    return "counts" if number == 1 else "count"
