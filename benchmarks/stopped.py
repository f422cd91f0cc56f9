"""The search of `auto` under the forecast, with stopped trials counted by their forecast or by their best evaluation.

    python -m benchmarks.stopped --seeds 8

Each sweep has 16 trials, 4 at a time in lockstep, on a simulated base (`benchmarks/curves.py`). Searcher and forecast
are the product's. Printed are the lowest loss of the sweep, relative to the lowest of 64 random trials that all run to
their end, and the share of the tokens of 16 whole trials.
"""

import argparse
import statistics
from typing import Any

import numpy as np
import optuna

from benchmarks.curves import SIMULATED, Table, simulated, trained
from benchmarks.stopping import Curve, curves_of
from orchestrator.rate_prior import with_prior
from orchestrator.spec import parse_spec
from orchestrator.spec.search import RATE
from orchestrator.sweep.schedulers.forecast.verdicts import Trial, default_chance, outcomes, verdicts
from orchestrator.sweep.search.factory import make_searcher

NUM_TRIALS, AT_A_TIME = 16, 4
SPACE = {
    RATE: {"loguniform": [3e-5, 1e-2]},
    "lora.rank": {"choice": [4, 8, 16, 32, 64]},
    "training.schedule": {"choice": ["cosine", "linear", "constant_with_warmup"]},
}


def main() -> None:
    """Search with both ways to count, and print a line for each base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--bases", default="plain,range 5%,steep spectrum")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name in options.bases.split(","):
        table = simulated(name)
        for by_forecast in (False, True):
            found = [search(name, table, seed, by_forecast) for seed in range(options.seeds)]
            losses, tokens = zip(*found, strict=True)
            how = "forecast" if by_forecast else "best evaluation"
            print(
                f"{name}, by {how}: loss {statistics.fmean(losses):+.2%} (worst {max(losses):+.2%}), "
                f"tokens {statistics.fmean(tokens):.2f}",
                flush=True,
            )


def search(name: str, table: Table, seed: int, by_forecast: bool) -> tuple[float, float]:
    """Run one sweep; return its lowest loss, relative to the table's, and its share of the tokens."""
    base, reference = SIMULATED[name], [trial["config"] for trial in table["trials"]]
    lowest = min(point[2] for trial in table["trials"] for point in trial["evaluations"])
    searcher, draw = _searcher(seed), np.random.default_rng(seed)
    curves: dict[str, Curve] = {}
    seen: dict[str, int] = {}
    running: list[str] = []
    stopped: set[str] = set()
    while running or len(curves) < NUM_TRIALS:
        while len(running) < AT_A_TIME and len(curves) < NUM_TRIALS:
            number = str(len(curves))
            config = searcher.suggest(number) | {"training.batch_size": 8}
            (curve,) = curves_of(table | {"trials": trained(base, [config], reference, draw)})
            curves[number], seen[number] = Curve(number, curve.plan, curve.losses, curve.tokens), 0
            running.append(number)
        for each in running:
            seen[each] += 1
            searcher.on_trial_result(each, _report(curves[each], seen[each]))
        ended = {each for each in running if seen[each] == len(curves[each].losses)}
        running = [each for each in running if each not in ended]
        trials = [Trial(each, curves[each].plan, curves[each].losses[: seen[each]], each in running) for each in curves]
        stops = verdicts(trials, {*running}, default_chance(NUM_TRIALS))
        for each in sorted(ended | stops.keys()):
            searcher.on_trial_complete(each, _report(curves[each], seen[each]))
        stopped |= stops.keys()
        if by_forecast and stopped:
            expected = outcomes(trials)
            for each in stopped:
                searcher.count_as(each, expected[each])
        running = [each for each in running if each not in stops]
    best = min(float(curves[each].losses[: seen[each]].min()) for each in curves)
    return best / lowest - 1, sum(seen.values()) / sum(len(curve.losses) for curve in curves.values())


def _report(curve: Curve, seen: int) -> dict[str, Any]:
    return {"eval/loss": float(curve.losses[seen - 1]), "training_iteration": seen}


def _searcher(seed: int) -> Any:
    document = {
        "base": {"model": "embedded"},
        "data": {"source": "embedded", "format": "template", "template": "{question} {answer}"},
        "search": {"space": SPACE, "num_trials": NUM_TRIALS, "seed": seed, "prior": {RATE: 5e-4}},
    }
    return make_searcher(with_prior(parse_spec(document))[0], AT_A_TIME)


if __name__ == "__main__":
    main()
