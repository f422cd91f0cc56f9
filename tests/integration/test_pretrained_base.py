"""A real pretrained base: the script makes its folder, and both engines train on it with the same result.

Environment variables:

- SMOLLM2_BASE: folder that scripts/smollm2_base.py has made. Default: the test makes one, and downloads 93 MB.
- GSM8K_FOLDER: folder with train.jsonl and test.jsonl of GSM8K, whose shortest rows are used. Default: generated rows
  of the same kind.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from one_trial import ENGINES, curve, run
from tiny import DEMO

from orchestrator.base import evict, load_base
from orchestrator.data import prepare
from orchestrator.deploy.scoring.row_scores import score_rows
from orchestrator.record import SweepPaths
from orchestrator.spec import SweepSpec, load_spec

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

ROOT = DEMO.parents[1]
NAMES = "Ada", "Ben", "Chloe", "Dan", "Eva", "Finn"
THINGS = "apples", "books", "clips", "pens", "shells", "stamps"
PLACES = "market", "school", "library", "fair", "harbor", "park"
NUM_TRAIN, NUM_HELD_OUT = 16, 8
STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of SmolLM2-135M-Instruct."""
    if made := os.environ.get("SMOLLM2_BASE"):
        return Path(made)
    pytest.importorskip("gguf", reason="scripts/smollm2_base.py needs the package gguf")
    folder = tmp_path_factory.mktemp("bases") / "smollm2"
    command = [sys.executable, str(ROOT / "scripts" / "smollm2_base.py"), str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if "cannot be downloaded" in ran.stderr:
        pytest.skip(ran.stderr.strip().splitlines()[-1])
    assert ran.returncode == 0, ran.stderr
    return folder


def made_rows(number: int, seed: int) -> list[dict[str, str]]:
    """Return rows of the kind of GSM8K: a short problem, steps with calculations in <<>>, the result after ####."""
    rng, rows = Random(seed), []
    for _ in range(number):
        name, thing, place, half, price = (
            rng.choice(each) for each in (NAMES, THINGS, PLACES, range(6, 41), range(2, 10))
        )
        question = f"{name} sold half of {2 * half} {thing} at the {place} for ${price} each. How much is that?"
        answer = (
            f"At the {place}, {name} sold {2 * half}/2 = <<{2 * half}/2={half}>>{half} {thing}.\n"
            f"{name} got {half}*{price} = $<<{half}*{price}={half * price}>>{half * price}.\n#### {half * price}"
        )
        rows.append({"question": question, "answer": answer})
    return rows


def rows_of(part: str, number: int) -> list[dict[str, str]]:
    """Return the shortest rows of a part of GSM8K, or generated ones."""
    if (folder := os.environ.get("GSM8K_FOLDER")) is None:
        return made_rows(number, seed=number)
    lines = (Path(folder) / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in sorted(lines, key=len)[:number]]


def spec_of(engine: str, base: Path, rows: Path) -> SweepSpec:
    return load_spec(
        ROOT / "experiments" / "smollm2-gsm8k.yaml",
        [
            f"base.model={base}", "base.compute_dtype=float32", "data.config=", "data.split=",
            f"data.source={rows / 'train.jsonl'}", f"data.held_out={{source: {rows / 'test.jsonl'}}}",
            "lora.dropout=0", f"training.steps={STEPS}",
            f"training.eval_steps={STEPS}", "training.batch_size=4", "training.learning_rate=5e-4", "training.warmup=0",
            f"training.engine={engine}", "scheduler.kind=none", "tracking.tensorboard=false",
            "tracking.wandb.mode=disabled",
        ],
    )  # fmt: skip


def test_both_engines_train_a_pretrained_base_alike(base: Path, tmp_path: Path) -> None:
    for part, number in {"train": NUM_TRAIN, "test": NUM_HELD_OUT}.items():
        lines = [json.dumps(row) + "\n" for row in rows_of(part, number)]
        (tmp_path / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    losses = {}
    for engine in ENGINES:
        spec, folder = spec_of(engine, base, tmp_path), SweepPaths(tmp_path / "runs" / engine)
        result = run(spec, folder)
        assert result.engine == engine
        losses[engine] = next(values["eval/loss"] for _, values in curve(folder) if "eval/loss" in values)
    evict()
    before = score_rows(load_base(spec.base), prepare(spec.data, spec.base).held_out, batch_size=4).loss
    assert losses["fast"] == pytest.approx(losses["trl"], rel=5e-3)
    assert before < 3, "the base is pretrained: a random one would have a loss of about 10.8"
    assert max(losses.values()) < 0.95 * before
