"""The demo's trial on this machine's CPU: speed of the fast engine over trl. The engines run in turns.

    python -m benchmarks.demo_trial

The trials are complete: training, four evaluations with their checkpoints, and the answers at the end.
"""

import argparse
from pathlib import Path
from statistics import median

from benchmarks.common import run, write
from orchestrator.spec.load import load_spec

TURNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder of the JSON output")
    arguments = parser.parse_args()
    speeds: dict[str, list[float]] = {"trl": [], "fast": []}
    seconds: dict[str, list[float]] = {"trl": [], "fast": []}
    for _ in range(TURNS + 1):
        for engine in speeds:
            spec = load_spec("experiments/demo.yaml", [f"training.engine={engine}", "tracking.wandb.mode=disabled"])
            done = run(spec)
            speeds[engine].append(done.result.tokens_per_second or 0.0)
            seconds[engine].append(done.seconds)
    figures = {
        "benchmark": "demo_trial",
        "training_ratio": round(_typical(speeds["fast"]) / _typical(speeds["trl"]), 2),
        "whole_trial_ratio": round(_typical(seconds["trl"]) / _typical(seconds["fast"]), 2),
        "tokens_per_second": speeds,
        "seconds": seconds,
    }
    write(arguments.out / "demo_trial.json", figures)
    print(f"fast over trl: training {figures['training_ratio']}, whole trial {figures['whole_trial_ratio']}")


def _typical(values: list[float]) -> float:
    """Return the median without the first value, whose run loads the base."""
    return median(values[1:])


if __name__ == "__main__":
    main()
