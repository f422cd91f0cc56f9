"""`sweep --seed` sets search.seed."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main, train

DEMO = Path(__file__).parents[2] / "experiments" / "demo.yaml"


@pytest.mark.parametrize(
    ("options", "seed"), [([], 0), (["--seed", "7"], 7), (["--set", "search.seed=3", "--seed", "7"], 7)]
)
def test_seed(options: list[str], seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[Any] = []
    monkeypatch.setattr(train, "_sweep", lambda spec, *_: swept.append(spec))
    monkeypatch.setattr(train, "_require_no_failures", lambda _: None)
    command = ["orchestrator", "sweep", str(DEMO), "--output", str(tmp_path), *options]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    assert [spec.search.seed for spec in swept] == [seed]
