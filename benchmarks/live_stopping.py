"""The same sweep under several stopping rules, trained for real: the winner's loss, tokens and GPU time of each.

    python -m benchmarks.live_stopping build/smollm2-135m-instruct --rows train.jsonl
    python -m benchmarks.live_stopping build/smollm2-135m-instruct --rows train.jsonl --rules forecast \\
        --earlier benchmarks/out/live_stopping.json

The base is the one that `scripts/smollm2_base.py` makes, the rows are GSM8K's in its chat form. Random search with one
seed draws the same points for each rule: rank, learning rate, dropout, batch size and schedule. The regret of a rule
is the loss of its winner beyond that of the best trial without a rule, as a share of the latter; `regret_of_its_choice`
takes the loss that the winner's point has without a rule. `stopped_best` says whether the rule stopped the best trial.
Trials train together, so their losses differ a little from run to run.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, write
from benchmarks.sweep import Swept, sweep_ours
from orchestrator.record import TrialState
from orchestrator.spec import load_spec

RULES = ("none", "asha", "forecast")
SPACE: dict[str, Any] = {
    "lora.rank": {"choice": [4, 8, 16, 32, 64]},
    "lora.dropout": {"choice": [0.0, 0.1]},
    "training.batch_size": {"choice": [4, 8, 16]},
    "training.learning_rate": {"loguniform": [3e-5, 1e-2]},
    "training.schedule": {"choice": ["cosine", "linear", "constant_with_warmup"]},
}


def document_of(rule: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Return the experiment under one of the rules."""
    spec = load_spec(ROOT / "experiments" / "smollm2-gsm8k.yaml")
    document: dict[str, Any] = spec.model_dump(mode="json", exclude_unset=True)
    document["base"]["model"] = str(asked.base.resolve())
    document["data"] |= {"source": str(asked.rows.resolve()), "held_out": {"count": asked.held_out}}
    for field in ("config", "split"):
        document["data"].pop(field, None)
    document["training"] |= {"steps": asked.steps, "eval_steps": max(1, asked.steps // 15)}
    document["search"] = {"algorithm": "random", "num_trials": asked.trials, "space": SPACE}
    document["search"]["tied"] = {"lora.alpha": "2 * lora.rank"}
    document["scheduler"] = {"kind": rule}
    document["tracking"] = {"wandb": {"mode": "disabled"}}
    return document


def figures_of(swept: Swept) -> dict[str, Any]:
    """Return what a sweep has cost, and its winner."""
    trials, winner = swept.trials(), swept.record.trials()[0]
    assert winner.best is not None
    return {
        "makespan_s": round(swept.seconds, 1),
        "gpu_s": round(sum(trial.gpu_seconds for trial in trials), 1),
        "tokens": sum(trial.tokens for trial in trials),
        "stopped": sum(trial.state == TrialState.STOPPED for trial in trials),
        "winner": winner.trial_id,
        "winner_loss": round(winner.best.value, 5),
        "losses": {trial.trial_id: trial.best and round(trial.best.value, 5) for trial in trials},
        "points": {trial.trial_id: trial.config.varied for trial in trials},
    }


def against_whole(figures: dict[str, Any], whole: dict[str, Any], swept: Swept) -> dict[str, Any]:
    """Compare a rule with no rule: shares of tokens and time, regret, and whether the best trial was stopped.

    A trial is found again by its searched values: its name contains a random part.
    """
    best = whole["points"][whole["winner"]]
    same = next(trial for trial in swept.trials() if trial.config.varied == best)
    points = {name: whole["losses"][name] for name, point in whole["points"].items()}
    chosen = next(name for name, point in whole["points"].items() if point == figures["points"][figures["winner"]])
    return {
        "tokens_share": round(figures["tokens"] / whole["tokens"], 3),
        "gpu_share": round(figures["gpu_s"] / whole["gpu_s"], 3),
        "makespan_share": round(figures["makespan_s"] / whole["makespan_s"], 3),
        "regret": round(figures["winner_loss"] / whole["winner_loss"] - 1, 5),
        "regret_of_its_choice": round(points[chosen] / whole["winner_loss"] - 1, 5),
        "stopped_best": same.state == TrialState.STOPPED,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="folder of the base")
    parser.add_argument("--rows", type=Path, required=True, help="path of GSM8K's train.jsonl")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--earlier", type=Path, help="JSON of an earlier run on the same GPU, whose rules are reused")
    parser.add_argument("--held-out", type=int, default=200, help="rows of an evaluation")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder of the JSON output")
    asked = parser.parse_args()
    found: dict[str, Any] = json.loads(asked.earlier.read_text()) if asked.earlier else {}
    with tempfile.TemporaryDirectory() as folder:
        for rule in asked.rules:
            document = document_of(rule, asked)
            swept = sweep_ours(document, Path(folder), rule)
            found[rule] = figures_of(swept)
            if "none" in found and rule != "none":
                found[rule] |= against_whole(found[rule], found["none"], swept)
            shown = {name: value for name, value in found[rule].items() if not isinstance(value, dict)}
            print(rule, json.dumps(shown), flush=True)
            write(asked.out / "live_stopping.json", found)


if __name__ == "__main__":
    main()
