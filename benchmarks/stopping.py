"""Replay stopping rules on a table of whole learning curves: what each would have saved, and what it would have lost.

    python -m benchmarks.stopping TABLE.json [--sizes 8,16,32,64] [--draws 300] [--rules forecast,median,...]

The table holds trials that all ran to their end: `steps`, `eval_steps`, and for each trial its `config` (fields of the
experiment by dotted names) and `evaluations` as [step, tokens, loss]. A draw is a random subset of the trials in random
order, on 16 slots. Trials that run step together, report together, and a freed slot takes the next trial at once. The
best trial is the one with the lowest evaluation of all. Forecast and median rule are the product's own code. The
constants of the forecast are those of the product. `--fit` chooses its two levels anew on one half of the trials and
judges the other half.

`--tables` adds tables on which the rule may fail: alterations of the one that is given, and simulated bases
(`benchmarks/curves.py`), whose curves do not follow the forecast's law.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks.curves import ALTERED, SIMULATED, Table, half, simulated
from orchestrator.spec.sections import TrainingSection
from orchestrator.sweep.schedulers.forecast import verdicts as levels
from orchestrator.sweep.schedulers.forecast.calibration import intervals_held
from orchestrator.sweep.schedulers.forecast.law import Plan
from orchestrator.sweep.schedulers.forecast.rates import learning_rates
from orchestrator.sweep.schedulers.forecast.verdicts import Trial, default_chance, verdicts
from orchestrator.sweep.schedulers.median import is_below_median
from orchestrator.sweep.schedulers.together import Heard

NUM_SLOTS = 16
REGRET = 0.005
"""A sweep whose winner is worse by more than this share of the loss counts as spoiled."""


@dataclass(frozen=True, eq=False)
class Curve:
    """A whole trial of the table."""

    name: str
    plan: Plan
    losses: NDArray[np.float64]
    tokens: NDArray[np.float64]
    """Tokens trained on at each evaluation."""


@dataclass
class Sweep:
    """A sweep that is being replayed."""

    curves: list[Curve]
    seen: dict[str, int] = field(default_factory=dict)
    """Trial -> its evaluations so far; trials that have not begun are left out."""
    running: list[str] = field(default_factory=list)

    def of(self, name: str) -> Curve:
        """Return the curve of a trial."""
        return next(curve for curve in self.curves if curve.name == name)

    def begun(self) -> Iterator[tuple[Curve, int]]:
        """Yield each trial that has begun, with the number of its evaluations."""
        return ((curve, self.seen[curve.name]) for curve in self.curves if self.seen.get(curve.name))


Rule = Callable[[Sweep, list[str]], set[str]]
"""Returns the trials that stop among those that report now."""


def by_forecast(sweep: Sweep, reporting: list[str], chance: float | None = None) -> set[str]:
    """Apply the product's forecast."""
    trials = [
        Trial(curve.name, curve.plan, curve.losses[:seen], curve.name in sweep.running) for curve, seen in sweep.begun()
    ]
    return set(verdicts(trials, set(reporting), chance or default_chance(len(sweep.curves))))


def by_median(sweep: Sweep, reporting: list[str]) -> set[str]:
    """Apply the product's median rule, with its default of three other trials, from the first evaluation on."""
    heard = {
        curve.name: [
            Heard(int(step), float(step), float(loss), float(loss))
            for step, loss in zip(curve.plan.steps[:seen], curve.losses[:seen], strict=True)
        ]
        for curve, seen in sweep.begun()
    }
    return {name for name in reporting if is_below_median(heard, name, 3)}


def asha(factor: int) -> Callable[[], Rule]:
    """Return a maker of ASHA with this factor, first rung at the first evaluation, one report after another."""

    def make() -> Rule:
        rungs: dict[int, list[float]] = {}

        def rule(sweep: Sweep, reporting: list[str]) -> set[str]:
            stops = set()
            for name in reporting:
                seen = sweep.seen[name]
                if seen in (factor**k for k in range(12)):
                    before, loss = rungs.setdefault(seen, []), float(sweep.of(name).losses[seen - 1])
                    if before and loss > np.percentile(before, 100 / factor):
                        stops.add(name)
                    before.append(loss)
            return stops

        return rule

    return make


def halving(factor: int) -> Callable[[], Rule]:
    """Return a maker of synchronous halving: of all trials at a rung, the best 1 in `factor` go on."""

    def make() -> Rule:
        def rule(sweep: Sweep, reporting: list[str]) -> set[str]:
            stops: set[str] = set()
            for seen in {sweep.seen[name] for name in reporting} & {3 * factor**k for k in range(8)}:
                here = sorted(
                    (n for n in reporting if sweep.seen[n] == seen), key=lambda n: sweep.of(n).losses[seen - 1]
                )
                stops |= {*here[max(1, round(len(here) / factor)) :]}
            return stops

        return rule

    return make


def never(*_: object) -> set[str]:
    """Stop no trial."""
    return set()


RULES: dict[str, Callable[[], Rule]] = {
    "forecast": lambda: by_forecast,
    "median": lambda: by_median,
    "asha 2": asha(2),
    "asha 3": asha(3),
    "asha 4": asha(4),
    "halving 3": halving(3),
}


@dataclass
class Tally:
    """What a rule did in all draws of one size."""

    tokens: list[float] = field(default_factory=list)
    regret: list[float] = field(default_factory=list)
    was_stopped: list[bool] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Time of each moment's decisions."""

    def row(self, size: int, name: str) -> str:
        """Return a line of the result table."""
        regret, num = np.array(self.regret), len(self.regret)
        return (
            f"| {size} | {name} | {np.mean(self.tokens):.3f} | {np.mean(self.was_stopped):.1%} "
            f"| {regret.mean():.3%} | {np.quantile(regret, 0.9):.2%} | {regret.max():.2%} "
            f"| {(regret > REGRET).sum() / num:.1%} | {1000 * np.mean(self.seconds or [0]):.2f} |"
        )


def replay(curves: list[Curve], rule: Rule, tally: Tally, allowed: float = 1.0) -> None:
    """Replay one sweep, and add it to the tally.

    Args:
        curves: all trials of the sweep, in the order in which they start.
        rule: decides.
        tally: receives the outcome.
        allowed: share of all tokens after which no trial starts any more.
    """
    total = sum(curve.tokens[-1] for curve in curves)
    sweep, waiting, promised = Sweep(curves), list(curves), 0.0
    while True:
        while waiting and len(sweep.running) < NUM_SLOTS and promised + waiting[0].tokens[-1] <= allowed * total:
            begins = waiting.pop(0)
            promised += begins.tokens[-1]
            sweep.running.append(begins.name)
            sweep.seen[begins.name] = 0
        if not sweep.running:
            break
        for name in sweep.running:
            sweep.seen[name] += 1
        done = {name for name in sweep.running if sweep.seen[name] == len(sweep.of(name).losses)}
        sweep.running = [name for name in sweep.running if name not in done]
        began = time.perf_counter()
        stops = rule(sweep, sweep.running[:]) if sweep.running else set()
        if sweep.running:
            tally.seconds.append(time.perf_counter() - began)
        sweep.running = [name for name in sweep.running if name not in stops]
    _count(sweep, total, tally)


def _count(sweep: Sweep, total: float, tally: Tally) -> None:
    best = min(sweep.curves, key=lambda curve: float(curve.losses.min()))
    kept = min(float(curve.losses[:seen].min()) for curve, seen in sweep.begun())
    tally.tokens.append(sum(float(curve.tokens[seen - 1]) for curve, seen in sweep.begun()) / total)
    tally.regret.append(kept / float(best.losses.min()) - 1)
    tally.was_stopped.append(sweep.seen.get(best.name, 0) < len(best.losses))


def coverage(curves: list[Curve], size: int, draws: int, seed: int) -> str:
    """Return which share of last losses lies in the forecast's 95% interval, by the evaluations that were seen."""
    draw, found = np.random.default_rng(seed), {}
    num = min(len(curve.losses) for curve in curves)
    for seen in sorted({2, 3, num // 4, num // 2, 3 * num // 4}):
        held = []
        for _ in range(draws):
            chosen = [curves[i] for i in draw.permutation(len(curves))[:size]]
            held += intervals_held([Trial(curve.name, curve.plan, curve.losses) for curve in chosen], seen)
        found[seen] = np.mean(held)
    return ", ".join(f"{share:.0%} after {seen}" for seen, share in found.items())


def curves_of(table: Table) -> list[Curve]:
    """Return the trials of a table."""
    return [_curve(f"t{i}", trial, int(table["steps"])) for i, trial in enumerate(table["trials"])]


def _curve(name: str, trial: dict[str, object], steps: int) -> Curve:
    config = trial["config"]
    assert isinstance(config, dict)
    written = {key.removeprefix("training."): value for key, value in config.items() if key.startswith("training.")}
    training = TrainingSection(**{"steps": steps} | written)
    at, tokens, losses = np.array(trial["evaluations"], dtype=np.float64).T
    rates = learning_rates(training, training.steps or steps)
    index = at.astype(int) - 1
    plan = Plan(
        steps=at,
        rates=rates[index],
        summed=np.cumsum(rates)[index],
        peak=training.learning_rate,
        rank=float(config.get("lora.rank", 16)),
        rows=training.batch_size * training.accumulation,
    )
    return Curve(name, plan, losses, tokens)


def main() -> None:
    """Replay the rules and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="table of whole curves")
    parser.add_argument("--tables", choices=("own", "altered", "simulated"), default="own", help="which tables")
    parser.add_argument("--fit", action="store_true", help="choose levels on one half, judge the other")
    parser.add_argument("--sizes", default="8,16,32,64", help="trials of a sweep")
    parser.add_argument("--draws", type=int, default=300, help="sweeps of each size")
    parser.add_argument("--rules", default=",".join(RULES), help="which rules")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    options = parser.parse_args()
    table = json.loads(options.table.read_text(encoding="utf-8"))
    if options.fit:
        _print_halves(table, options)
    elif options.tables == "own":
        _print_rules(curves_of(table), options)
    else:
        altered = options.tables == "altered"
        names = ALTERED if altered else SIMULATED
        _print_tables(((name, ALTERED[name](table) if altered else simulated(name)) for name in names), options)


def _print_rules(curves: list[Curve], options: argparse.Namespace) -> None:
    print("| trials | rule | tokens | best stopped | regret | 90th | worst | over 0.5% | ms a moment |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for size in map(int, options.sizes.split(",")):
        if size > len(curves):
            print(f"(the table has {len(curves)} trials: no sweep of {size})")
            continue
        share = 1.0
        for name in options.rules.split(","):
            tally = _tally(curves, size, options, RULES[name])
            share = float(np.mean(tally.tokens)) if name == "forecast" else share
            print(tally.row(size, name), flush=True)
        fewer = _tally(curves, size, options, lambda: never, share)
        print(fewer.row(size, f"fewer trials, {share:.2f} of the tokens"), flush=True)
    print("\n95% intervals of the forecast held: " + coverage(curves, min(16, len(curves)), 50, options.seed))


def _print_tables(tables: Iterable[tuple[str, Table]], options: argparse.Namespace) -> None:
    """Replay the forecast on each table, at each size."""
    print("| trials | table | tokens | best stopped | regret | 90th | worst | over 0.5% | ms a moment |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, table in tables:
        for size in map(int, options.sizes.split(",")):
            print(_tally(curves_of(table), size, options, RULES["forecast"]).row(size, name), flush=True)


LEVELS = [(chance, sure) for chance in (0.06, 0.09, 0.13, 0.17) for sure in (0.5, 0.75)]
"""Levels of the forecast for 16 trials: the chance below which a trial stops, and `verdicts.SURE`."""


def _print_halves(table: Table, options: argparse.Namespace) -> None:
    """Choose the levels that spend least on one half, with at most 0.1% regret, and judge them on the other half."""
    for fitted in (0, 1):
        found = {}
        for chance, sure in LEVELS:
            tally = _tally(curves_of(half(table, fitted)), 16, options, lambda at=(chance, sure): _by_levels(*at))
            found[chance, sure] = (np.mean(tally.regret) > 0.001, np.mean(tally.tokens))
        best = min(found, key=lambda levels: found[levels])
        tally = _tally(curves_of(half(table, 1 - fitted)), 16, options, lambda at=best: _by_levels(*at))
        print(tally.row(16, f"half {1 - fitted} by the levels {best} of half {fitted}"), flush=True)


def _by_levels(chance: float, sure: float) -> Rule:
    def rule(sweep: Sweep, reporting: list[str]) -> set[str]:
        with mock.patch.object(levels, "SURE", sure):
            return by_forecast(sweep, reporting, chance)

    return rule


def _tally(
    curves: list[Curve], size: int, options: argparse.Namespace, make: Callable[[], Rule], allowed: float = 1.0
) -> Tally:
    draw, tally = np.random.default_rng(options.seed), Tally()
    for _ in range(options.draws):
        replay([curves[i] for i in draw.permutation(len(curves))[:size]], make(), tally, allowed)
    return tally


if __name__ == "__main__":
    main()
