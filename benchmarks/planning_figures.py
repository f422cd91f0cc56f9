"""Passes and sweeps measured on an H200, beside what `plan` foresees: the figures to which its constants were fitted.

    python -m benchmarks.planning_figures --rows train.jsonl

Needs no GPU. The figures are those of docs/benchmarks.md and docs/log.md; `--rows` are GSM8K's, for the sweeps.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from benchmarks.common import ROOT, Setting
from benchmarks.pack import spec_of
from orchestrator.planning.gpus import GPUS
from orchestrator.planning.step_time import PassWork, bucket_tokens, evaluation_seconds, train_seconds
from orchestrator.planning.sweep_plan import plan_sweep
from orchestrator.spec.load import parse_spec
from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.plan.memory import MemoryOption

sys.path.insert(0, str(ROOT / "scripts"))
from make_base import SHAPES, VOCABULARY, strings_of
from tokenizer import byte_level_bpe

H200 = GPUS["h200"]
ROW = 757 / 4
"""Mean tokens of a GSM8K row."""
OF_A_TOKEN = ROW * (1 + 0.38**2)
"""Mean length of the row of a token; 0.38 is the standard deviation of the lengths over their mean."""


@dataclass(frozen=True)
class Figure:
    """A measured pass."""

    shape: str
    what: str
    seconds: float
    tokens: float = 4 * ROW
    """Real tokens of one trial."""
    bucket: int | None = None
    """Tokens of the bucket; None derives them from the real ones."""
    slots: int = 1
    rank: int = 16
    """Stack rank."""
    targets: float = 1.0
    """Share of the tokens whose logits were computed: 1 until the commit "logits only for tokens with a loss"."""
    row_tokens: float = OF_A_TOKEN
    trains: bool = True

    def foreseen(self) -> float:
        """Return the seconds that the model gives."""
        shape = shape_of(self.shape)
        tokens = self.bucket or bucket_tokens(self.tokens * self.slots, self.slots)
        linears = frozenset(shape.linears)
        work = PassWork(tokens, int(self.targets * tokens), self.row_tokens, self.slots, self.rank, linears)
        seconds = train_seconds if self.trains else evaluation_seconds
        return seconds(shape, H200, MemoryOption(True, "nothing", 16384), work)


FIGURES = (
    Figure("1.1b", "graph of a step, 704 tokens", 9.45e-3, bucket=704),
    Figure("7b", "graph of a step, 704 tokens", 37.3e-3, bucket=704),
    Figure("1.1b", "graph of a step, 4,096 tokens", 41.4e-3, bucket=4096),
    Figure("1.1b", "graph of a step, 16 trials, 12,800 tokens", 131.9e-3, bucket=12800, slots=16, rank=64),
    Figure("7b", "graph of a step, 8 trials, 6,400 tokens", 323e-3, bucket=6400, slots=8, rank=64),
    Figure("1.1b", "alone, batch 4 (75,433 tokens/s)", 4 * ROW / 75_433),
    Figure("7b", "alone, batch 4 (17,399)", 4 * ROW / 17_399),
    Figure("1.1b", "alone, batch 1 (30,272)", ROW / 30_272, tokens=ROW),
    Figure("7b", "alone, batch 1 (10,189)", ROW / 10_189, tokens=ROW),
    Figure("1.1b", "16 trials, turns that train (91,000)", 64 * ROW / 91_000, slots=16, rank=64),
    Figure("qwen3-8b", "alone, batch 4 (13,783)", 4 * ROW / 13_783),
    Figure("llama-3.1-8b", "alone, batch 4 (11,948)", 4 * ROW / 11_948, targets=0.75),
    Figure("llama-3.1-8b", "8 trials (15,957)", 32 * ROW / 15_957, slots=8, rank=64, targets=0.75),
    Figure("gemma-3-4b", "alone, batch 4 (20,984)", 4 * ROW / 20_984),
    Figure("smollm2-135m", "alone, batch 4 (75,267)", 4 * ROW / 75_267),
    Figure("smollm2-135m", "8 trials (188,086, too low)", 32 * ROW / 188_086, slots=8, rank=64),
    Figure("phi-4", "alone, batch 4 (8,050)", 4 * ROW / 8_050, targets=0.75),
    Figure("smollm2-135m", "4 rows of 2,048 (210,591)", 8192 / 210_591, bucket=8192, row_tokens=2048),
    Figure("phi-4", "4 rows of 2,048 (9,141)", 8192 / 9_141, bucket=8192, row_tokens=2048),
    Figure("1.1b", "evaluation (218,332)", 8192 / 218_332, bucket=8192, trains=False),
    Figure("7b", "evaluation (39,205)", 8192 / 39_205, bucket=8192, trains=False),
)

MAKESPANS = (("1.1b", 16, 1, 67.5), ("7b", 16, 1, 207.8), ("1.1b", 32, 1, 107.6), ("1.1b", 32, 2, 69.2))
"""Shape, trials of 200 steps, GPUs and seconds of the whole command, by `benchmarks.sweep` (at 1.1B the mean of two
hosts) and `benchmarks.gpus`. Nothing was fitted to those of 32 trials."""


def shape_of(name: str) -> BaseShape:
    """Return the sizes of a shape of scripts/make_base.py."""
    return BaseShape.of(SimpleNamespace(**({"head_dim": None} | SHAPES[name])))


def base_without_weights(name: str, rows: Path, folder: Path) -> Path:
    """Write the configuration and the tokenizer of a shape, as scripts/make_base.py does, and return the folder."""
    from transformers import AutoConfig

    fields = dict(SHAPES[name])
    byte_level_bpe(strings_of(rows), VOCABULARY).save_pretrained(folder)
    AutoConfig.for_model(fields.pop("model_type"), dtype="bfloat16", **fields).save_pretrained(folder)
    return folder


def makespans(rows: Path) -> Iterator[tuple[str, str, float, float]]:
    """Yield shape, kind of sweep, foreseen and measured seconds of each sweep of `MAKESPANS`."""
    for name, num_trials, num_gpus, measured in MAKESPANS:
        with tempfile.TemporaryDirectory() as folder:
            base = base_without_weights(name, rows, Path(folder))
            document = spec_of(Setting(name, base, rows, base), steps=200, eval_steps=50).model_dump(mode="json")
            if num_trials == 32:
                document["search"]["space"]["training.seed"] = {"grid": [1, 2]}
            plan = plan_sweep(parse_spec(document), name, H200, num_gpus)
            assert plan.whole is not None
            assert plan.num_trials == num_trials
            print(f"{name}, {plan.slots} at a time: {json.dumps(plan.whole.model_dump())}", file=sys.stderr)
            yield name, f"{num_trials} trials on {num_gpus}", plan.whole.total_s, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, help="path of GSM8K's train.jsonl; without it, passes only")
    arguments = parser.parse_args()
    print("| shape | what | foreseen | measured | ratio |\n| --- | --- | --- | --- | --- |")
    for each in FIGURES:
        foreseen = each.foreseen()
        milliseconds = f"{foreseen * 1e3:.1f} ms | {each.seconds * 1e3:.1f} ms"
        print(f"| {each.shape} | {each.what} | {milliseconds} | {foreseen / each.seconds:.2f} |")
    for name, what, foreseen, measured in makespans(arguments.rows.resolve()) if arguments.rows else ():
        print(f"| {name} | sweep: {what} | {foreseen:.0f} s | {measured:.0f} s | {foreseen / measured:.2f} |")


if __name__ == "__main__":
    main()
