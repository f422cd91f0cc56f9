"""Search algorithms on recorded results: how near they come to a grid's best, and with what share of its tokens.

    python -m benchmarks.searching --curves CURVES.json --rates sft_sweep.md

Two tables, each given by its path; nothing is trained.

- `--curves`: trials with their configurations and evaluations, as in `shared/data/curves`. A Gaussian process over
  rate, rank, dropout, batch size, schedule and weight decay stands for the base (`scikit-learn`, extra `pb2`): trials
  report its mean plus noise of the size that it finds in the table, and are judged by its mean. Its error at a trial
  that it has not seen is printed. The batch size is the table's largest, so that all trials have as many tokens.
- `--rates`: results over learning rate and rank for some 35 bases, `tinker_cookbook/recipes/chat_sl/results/
  sft_sweep.md` of thinking-machines-lab/tinker-cookbook. A cell that is missing there (mostly diverged) is reported as
  a failure of the trial's values.

The searchers are the product's own. `gp` is `auto`'s model without a prior; `grid` is the grid in random order.

`--stop` lets a search end itself (`search.stop`), such as `--stop gain=0.3%`: `saved` is the share of its trials that
were not drawn, and so of its tokens, because all trials of a table have as many.
"""

import argparse
import json
import math
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import optuna

from benchmarks.common import write
from orchestrator.rate_prior import RANK, rate_of, with_prior
from orchestrator.spec import SweepSpec, parse_spec
from orchestrator.spec.search import RATE, SearchSection, Stop
from orchestrator.sweep.search import auto
from orchestrator.sweep.search.ending import small_gain
from orchestrator.sweep.search.factory import make_searcher

Point = dict[str, Any]
METHODS = ("auto", "gp", "tpe", "random", "grid")
SHARE = 0.25
"""Share of the grid's tokens that a search may spend."""
REACH = 0.005
"""Relative distance from the grid's best that counts as reached."""
WIDTHS = {
    "Llama-3.2-1B": 2048, "Llama-3.2-3B": 3072, "Llama-3.1-8B": 4096, "Llama-3.1-70B": 8192, "Llama-3.3-70B": 8192,
    "DeepSeek-V3.1": 7168, "Kimi-K2": 7168, "Qwen3-235B": 4096, "Qwen3-VL-235B": 4096, "Qwen3-30B": 2048,
    "Qwen3-VL-30B": 2048, "Qwen3-32B": 5120, "Qwen3-8B": 4096, "Qwen3-4B": 2560, "Qwen3.5-397B": 4096,
    "Qwen3.5-35B": 2048, "Qwen3.6-35B": 2048, "Qwen3.5-27B": 5120, "Qwen3.6-27B": 5120, "Qwen3.5-9B": 4096,
    "Qwen3.5-4B": 2560, "gpt-oss": 2880, "Nemotron-3-Super": 4096, "Nemotron-3-Nano": 2688,
}  # fmt: skip
"""Part of a base's name -> size of its hidden states."""
_BASE: dict[str, Any] = {
    "base": {"model": "embedded"},
    "data": {"source": "embedded", "format": "template", "template": "{question} {answer}"},
}


@dataclass(frozen=True)
class Problem:
    """Results that a search can ask for."""

    name: str
    space: dict[str, dict[str, list[Any]]]
    grid: dict[str, list[Any]]
    """Field -> values of the grid."""
    rate: float
    """Learning rate that suits the base."""
    loss: Callable[[Point], float]
    """Loss by which trials are judged; infinite for a trial that diverges."""
    noise: float = 0.0
    """Standard deviation of what a trial reports around its loss, as a share of it."""

    @property
    def num_cells(self) -> int:
        """Trials of the whole grid."""
        return math.prod(map(len, self.grid.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path)
    parser.add_argument("--rates", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--at-a-time", type=int, default=1, help="trials that run side by side")
    parser.add_argument("--off", type=float, default=1.0, help="factor by which auto's first rate is wrong")
    parser.add_argument("--share", type=float, default=SHARE, help="share of the grid's tokens that may be spent")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument(
        "--stop", default="", help="rule by which auto, gp and tpe end themselves: gain=0.3%%, unmoved=8"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    tables: dict[str, list[Problem]] = {}
    if arguments.curves:
        tables["curves"] = [curves_problem(json.loads(arguments.curves.read_text(encoding="utf-8")))]
    if arguments.rates:
        tables["rates"] = rate_problems(arguments.rates.read_text(encoding="utf-8"))
    if not tables:
        parser.error("give --curves or --rates")
    figures: dict[str, Any] = {
        name: {
            method: judge(
                method, problems, arguments.seeds, arguments.at_a_time, arguments.off, arguments.share, arguments.stop
            )
            for method in arguments.methods
        }
        for name, problems in tables.items()
    }
    for name, methods in figures.items():
        for method, found in methods.items():
            print(f"{name} {method}: " + ", ".join(f"{key} {value}" for key, value in found.items()))
    figures["arguments"] = {name: str(value) for name, value in vars(arguments).items()}
    write(arguments.out / "searching.json", figures)


def judge(
    method: str, problems: Sequence[Problem], seeds: int, at_a_time: int, off: float, share: float, stop: str
) -> dict[str, Any]:
    """Run a method on each problem and seed, and report its regrets at a share of the grid's tokens.

    Runs in which every trial diverges are counted apart (`diverged`), and in `within_reach` as missed.
    """
    regrets, seconds, saved = [], [], []
    for problem in problems:
        number = max(1, int(share * problem.num_cells))
        best = min(problem.loss(point) for point in cells(problem.grid))
        for seed in range(seeds):
            began = time.perf_counter()
            found, drawn = run(method, problem, number, seed, at_a_time, off, stop)
            seconds.append((time.perf_counter() - began) / drawn)
            saved.append(1 - drawn / number)
            regrets.append(found / best - 1)
    ordered = sorted(regrets)
    return {
        "runs": len(regrets),
        "within_reach": round(sum(each <= REACH for each in regrets) / len(regrets), 3),
        "diverged": sum(map(math.isinf, regrets)),
        "saved": round(statistics.fmean(saved), 3),
        "regret_mean": round(statistics.fmean(filter(math.isfinite, regrets)), 5),
        "regret_median": round(statistics.median(regrets), 5),
        "regret_90": round(ordered[int(0.9 * (len(ordered) - 1))], 5),
        "regret_worst": round(max(filter(math.isfinite, ordered)), 5),
        "s_a_trial": round(statistics.fmean(seconds), 4),
    }


def run(
    method: str, problem: Problem, number: int, seed: int, at_a_time: int, off: float, stop: str
) -> tuple[float, int]:
    """Search with so many trials; return the loss of the trial with the best report, and the number of trials drawn."""
    if method == "grid":
        points = cells(problem.grid)
        random.Random(seed).shuffle(points)
        return min(problem.loss(point) for point in points[:number]), number
    spec = spec_of(method, problem, number, seed, off, stop)
    if method == "random":
        generator = random.Random(seed)
        draws = [
            spec.search.decode({path: axis.draw(generator) for path, axis in spec.search.space.items()})
            for _ in range(number)
        ]
        return min(map(problem.loss, draws)), number
    noise = random.Random(f"noise {seed}")
    searcher = make_searcher(spec, at_a_time)
    if method == "gp":
        searcher.searcher._designed = list
    running: list[tuple[str, Point]] = []
    reports: list[tuple[float, float]] = []
    results: list[tuple[Point, float]] = []
    with mock.patch.object(auto, "_PRIOR_WEIGHT", auto._PRIOR_WEIGHT if method == "auto" else 0.0):
        for i in range(number):
            if len(running) == at_a_time:
                name, point = running.pop(0)
                reports.append(report(searcher, name, point, problem, noise))
                results.append((point, reports[-1][0]))
                if ends(spec.search, results, [each for _, each in running]):
                    break
            running.append((str(i), searcher.suggest(str(i))))
        reports += [report(searcher, *each, problem, noise) for each in running]
    return min(reports)[1], len(reports)


def ends(search: SearchSection, results: list[tuple[Point, float]], running: list[Point]) -> bool:
    """Return whether a search ends itself. Rows of the held-out part are not in the tables, so every lead is a move."""
    stop, values = search.stop, [value for _, value in results]
    if not stop.is_set or len(results) < stop.min_trials:
        return False
    if stop.unmoved is not None and len(results) > stop.unmoved and min(values[: -stop.unmoved]) == min(values):
        return True
    return stop.gain is not None and small_gain(search, results, running) is not None


def report(searcher: Any, name: str, point: Point, problem: Problem, noise: random.Random) -> tuple[float, float]:
    """Have a trial report; return its report and its loss."""
    loss = problem.loss(point)
    reported = loss * math.exp(problem.noise * noise.gauss(0, 1))
    if math.isinf(loss):
        searcher.report_failure(name)
    else:
        searcher.on_trial_complete(name, {"eval/loss": reported, "training_iteration": 1})
    return reported, loss


def spec_of(method: str, problem: Problem, number: int, seed: int, off: float, stop: str) -> SweepSpec:
    """Make the experiment of a method. `tpe` and `gp` draw a third of the trials at random, at most 10."""
    search: dict[str, Any] = {"space": problem.space, "num_trials": number, "seed": seed}
    search["algorithm"] = {"tpe": "optuna", "random": "random"}.get(method, "auto")
    if method in ("tpe", "gp") and number > 1:
        search["startup_trials"] = max(1, min(10, number // 3))
    rule, _, limit = stop.partition("=")
    written = {rule: limit if "%" in limit else json.loads(limit)} if stop else {}
    if Stop.model_validate(written).first_end < number:
        search["stop"] = written
    training = {"learning_rate": problem.rate * off}
    return with_prior(parse_spec(_BASE | {"training": training, "search": search}))[0]


def cells(grid: dict[str, list[Any]]) -> list[Point]:
    """Return all points of a grid."""
    points: list[Point] = [{}]
    for path, values in grid.items():
        points = [point | {path: value} for point in points for value in values]
    return points


def rate_problems(text: str) -> list[Problem]:
    """Read the table of rates and ranks: one problem for each base."""
    problems = []
    for part in re.split(r"^## (?=\S+/)", text, flags=re.M)[1:]:
        name = part.split(maxsplit=1)[0]
        found = {
            (float(rate), int(rank)): float(loss)
            for rate, rank, loss in re.findall(r"^\| (\S+) \| (\d+) \| ([\d.]+) \|", part, flags=re.M)
        }
        rates = json.loads(re.search(r"Learning rates: (\[.*\])", part)[1])  # type: ignore[index]
        ranks = json.loads(re.search(r"LoRA ranks: (\[.*\])", part)[1])  # type: ignore[index]
        grid = {RATE: [float(rate) for rate in rates], RANK: ranks}

        def loss(point: Point, found: dict[tuple[float, int], float] = found) -> float:
            return found.get((point[RATE], point[RANK]), math.inf)

        width = next((width for key, width in WIDTHS.items() if key in name), 2000)
        rate = rate_of(width, name.split("/")[1].lower())
        problems.append(Problem(name, {path: {"choice": values} for path, values in grid.items()}, grid, rate, loss))
    return problems


def curves_problem(table: dict[str, Any]) -> Problem:
    """Fit a surrogate to whole curves."""
    import numpy as np
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
    from sklearn.model_selection import LeaveOneOut, cross_val_predict

    schedules = sorted({trial["config"]["training.schedule"] for trial in table["trials"]})

    def features(point: Point) -> list[float]:
        return [
            math.log10(point[RATE]), math.log2(point[RANK]), point["lora.dropout"] * 10,
            math.log2(point["training.batch_size"]), point["training.weight_decay"] * 10,
            *(float(point["training.schedule"] == each) for each in schedules),
        ]  # fmt: skip

    inputs = np.array([features(trial["config"]) for trial in table["trials"]])
    best = [min(loss for _, _, loss in trial["evaluations"]) for trial in table["trials"]]
    results = np.log(np.minimum(best, 2 * statistics.median(best)))
    kernel = ConstantKernel(1.0) * RBF([1.0] * inputs.shape[1], (0.3, 1e3)) + WhiteKernel(1e-3, (1e-6, 1e-1))
    model = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=0)
    model.fit(inputs, results)
    fixed = GaussianProcessRegressor(model.kernel_, optimizer=None, normalize_y=True)
    errors = cross_val_predict(fixed, inputs, results, cv=LeaveOneOut()) - results
    noise = math.sqrt(model.kernel_.k2.noise_level) * float(np.std(results))
    print(
        f"surrogate of {len(best)} trials: error at an unseen trial {np.median(np.abs(errors)):.3f} (median of the "
        f"logarithm), {math.sqrt(np.mean(errors**2)):.3f} (root mean square, {np.std(results):.3f} between trials); "
        f"noise {noise:.4f}"
    )
    batch_size = max(trial["config"]["training.batch_size"] for trial in table["trials"])
    rates = [3e-5, 1.3e-4, 5.5e-4, 2.3e-3, 1e-2]
    grid = {RATE: rates, RANK: [4, 8, 16, 32, 64], "lora.dropout": [0.0, 0.1], "training.schedule": schedules}
    space = {path: {"choice": values} for path, values in grid.items()} | {RATE: {"loguniform": [3e-5, 1e-2]}}
    width, family = 576, "llama"  # of SmolLM2-135M

    def loss(point: Point) -> float:
        whole = point | {"training.batch_size": batch_size, "training.weight_decay": 0.0}
        return math.exp(float(model.predict(np.array([features(whole)]))[0]))

    return Problem("curves", space, grid, rate_of(width, family), loss, noise)


if __name__ == "__main__":
    main()
