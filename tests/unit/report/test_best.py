"""What `best` prints."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from orchestrator.deploy.finished import FinishedSweep
from orchestrator.record import SweepPaths, TrialResult, read_sweep, write_record
from orchestrator.record.checked import read_record
from orchestrator.report.best import say_best

MakeSweep = Callable[..., SweepPaths]


def test_best_says_how_much_of_the_base_is_quantized(make_sweep: MakeSweep, tmp_path: Path) -> None:
    paths = make_sweep(tmp_path / "run", {"a": ("COMPLETE", 0.5)})
    file = paths.trial("a").result
    result = read_record(TrialResult, file)
    for share, said in ((0.9712, "base: 97% of its weights in 4 bits, 17.3 GiB"), (None, "adapter: ")):
        write_record(file, result.model_copy(update={"base_quantized_share": share, "base_gib": share and 17.34}))
        console = Console(record=True, width=200)
        best = FinishedSweep(read_sweep(paths.root)).best()
        say_best(console, best)
        lines = console.export_text().splitlines()
        assert any(line.startswith(said) for line in lines)
        assert any(line.startswith("base:") for line in lines) == (share is not None)
        assert best.as_dict()["base_quantized_share"] == share
        assert best.as_dict()["base_gib"] == (share and 17.34)


def test_best_says_the_standard_error_of_a_metric_of_answers_and_what_it_cost(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    paths = make_sweep(tmp_path / "run", {"a": ("COMPLETE", 0.5)})
    file = paths.trial("a").result
    result = read_record(TrialResult, file)
    assert result.best is not None
    values = result.best.values | {"eval/exact_match": 0.25, "eval/exact_match_stderr": 0.0546}
    best = result.best.model_copy(update={"values": values})
    update = {"best": best, "generated_tokens": 12_345, "generation_s": 75.4}
    write_record(file, result.model_copy(update=update))
    console, sweep = Console(record=True, width=200), FinishedSweep(read_sweep(paths.root))
    say_best(console, sweep.best("eval/exact_match"))
    text = console.export_text()
    assert ": a, eval/exact_match 0.25 +- 0.055 at step " in text
    assert "its answers for evaluation.metrics: 12,345 tokens in 1m15s" in text
