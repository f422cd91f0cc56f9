"""What `best` prints."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from orchestrator.deploy.finished import FinishedSweep
from orchestrator.record import SweepPaths, TrialResult, read_sweep, write_record
from orchestrator.report.best import say_best

MakeSweep = Callable[..., SweepPaths]


def test_best_says_how_much_of_the_base_is_quantized(make_sweep: MakeSweep, tmp_path: Path) -> None:
    paths = make_sweep(tmp_path / "run", {"a": ("COMPLETE", 0.5)})
    file = paths.trial("a").result
    result = TrialResult.model_validate_json(file.read_text())
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
