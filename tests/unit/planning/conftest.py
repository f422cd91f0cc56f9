"""Fixtures of the planning tests: experiments, and bases of published shapes without weights."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec import SweepSpec, parse_spec
from orchestrator.training.fast.step.flat_batch import TokenizedRows

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "scripts"))
from make_base import SHAPES  # noqa: E402  (a script, not a package)

MakeSpec = Callable[..., SweepSpec]


@pytest.fixture
def make_spec(document: dict[str, Any]) -> MakeSpec:
    """`make_spec(training={...}, search={...})`: an experiment on the embedded base."""

    def make(**sections: dict[str, Any]) -> SweepSpec:
        merged = document | {name: document.get(name, {}) | fields for name, fields in sections.items()}
        return parse_spec(merged)

    return make


@pytest.fixture
def shape_folder(tmp_path: Path) -> Callable[[str], str]:
    """`shape_folder("7b")`: a folder with the config.json of a shape of scripts/make_base.py, and nothing else."""

    def write(name: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", **SHAPES[name]}))
        return str(folder)

    return write


@pytest.fixture
def rows() -> Callable[..., tuple[TokenizedRows, TokenizedRows]]:
    """`rows(length, count)`: training rows of one length, and 100 held-out ones; half of the tokens have a loss."""

    def make(length: int, count: int = 64) -> tuple[TokenizedRows, TokenizedRows]:
        ids = [[1] * length]
        labels = [[-100] * (length // 2) + [1] * (length - length // 2)]
        return TokenizedRows(ids * count, labels * count), TokenizedRows(ids * 100, labels * 100)

    return make
