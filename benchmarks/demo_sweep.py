"""The demo's sweep on this machine's CPU, against one process for each trial under Ray Tune: ratio of times.

    python -m benchmarks.demo_sweep
    python -m benchmarks.demo_sweep --scheduler none

"ours" is the whole command `orchestrator sweep`, which trains two trials at a time in each worker. The baseline trains
the same trials with SFTTrainer under the same scheduler. Each of its trials is a process that imports and loads by
itself; as many run at a time as there are cores. The rows of both are tokenized once.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import write
from benchmarks.sweep import Swept, sweep_one_process, sweep_ours
from orchestrator.spec.load import load_spec

SCHEDULERS = {"asha": "{kind: asha, grace_steps: 40, reduction_factor: 2}", "none": "{kind: none}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheduler", choices=[*SCHEDULERS], default="asha", help="asha, or none")
    parser.add_argument("--set", nargs="+", default=[], help="overrides, such as training.steps=100")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder of the JSON output")
    arguments = parser.parse_args()
    spec = load_spec(
        "experiments/demo.yaml",
        ["tracking.wandb.mode=disabled", f"scheduler={SCHEDULERS[arguments.scheduler]}", *arguments.set],
    )
    document = spec.model_dump(mode="json")
    with tempfile.TemporaryDirectory() as scratch:
        ours = sweep_ours(document, Path(scratch), "ours")
        varied = [trial.config.varied for trial in ours.trials()]
        points = [{name: each[name] for name in spec.search.space} for each in varied]
        document["training"]["engine"] = "trl"
        baseline = sweep_one_process(document, points, Path(scratch), "one_process")
        figures = {
            "benchmark": "demo_sweep",
            "scheduler": arguments.scheduler,
            "ratio": round(baseline.seconds / ours.seconds, 2),
            "workers": next(line.strip() for line in ours.output.splitlines() if "at a time in each" in line),
            "ours": _about(ours),
            "one_process": _about(baseline),
        }
    write(arguments.out / f"demo_sweep-{arguments.scheduler}.json", figures)
    print(json.dumps(figures))


def _about(swept: Swept) -> dict[str, Any]:
    best, *_ = swept.record.trials()
    return {
        "seconds": round(swept.seconds, 1),
        "steps": sum(trial.step for trial in swept.trials()),
        "best_loss": best.best.value if best.best else None,
        "best": best.config.varied,
    }


if __name__ == "__main__":
    main()
